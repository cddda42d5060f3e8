"""The live screen: one layout for the whole run, painted from its events; words and marks carry it without colour."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from safesteer_lite.events import (
    Event,
    Metric,
    Note,
    Progress,
    Sample,
    StageDone,
    StageSkipped,
    StageStarted,
    Warned,
)
from safesteer_lite.hardware.units import format_bytes, format_duration, format_estimate
from safesteer_lite.prompts.sets import KINDS
from safesteer_lite.shell.console import as_text
from safesteer_lite.shell.lines import metric_text
from safesteer_lite.text import visible

SMALLEST = (80, 24)
"""Columns and rows that the layout needs; on less, plain lines are better."""

# How a metric's name goes on where the trained adapter was tried at another strength than it was trained at.
_AT = " at strength "
_KEPT_MESSAGES = 50
# So many seconds at the expected pace count beside what the finished stages took.
_TRUST = 60.0
# Drawing holds up the thread that feeds the model, and nothing here moves faster than the seconds.
_FRAMES_A_SECOND = 1


def fits_terminal(console: Console) -> bool:
    """Whether the live screen can be shown here: a terminal that can move its cursor, and is large enough."""
    return console.is_terminal and not console.is_dumb_terminal and console.width >= 80 and console.height >= 24


@dataclass
class StageView:
    """One line of the stage list.

    Attributes:
        title: what the user reads.
        expected: seconds it should take; None where unknown.
        state: waiting, running, done or kept.
        began: clock time at its start, seconds.
        seconds: how long it took.
        what, at, of: its newest progress.
        since: clock time and `at` of the first progress of this kind, to tell its pace.
    """

    title: str
    expected: float | None = None
    state: str = "waiting"
    began: float = 0.0
    seconds: float = 0.0
    what: str = ""
    at: int = 0
    of: int = 0
    since: tuple[float, int] = (0.0, 0)

    def left(self, now: float, pace: float) -> float | None:
        """Seconds until it is done: from its progress where that shows a pace, else from what was expected."""
        if self.state in ("done", "kept"):
            return 0.0
        expected = None if self.expected is None else self.expected * pace
        if self.state == "waiting":
            return expected
        spent = now - self.began
        began, first = self.since
        measured = (now - began) / (self.at - first) * (self.of - self.at) if self.at > first else None
        if expected is None:
            return measured
        # A stage has several parts, so the pace of one part is the least that is left, not all of it.
        return max(expected - spent, measured or 0.0)


@dataclass
class RunView:
    """Everything the screen shows, as the events told it.

    Attributes:
        title: the run's name.
        stages: by name, in order.
        loss, kl: every value so far.
        first, last: refusal shares by prompt set with their n, of the base and as last measured.
        last_of: what was measured last: "now", or the strength that the trained adapter was tried at.
        sample: the newest prompt with its answers.
        messages: notes, metrics and warnings, oldest first.
        warnings: all warnings; they are told again when the screen has gone.
        banner: an answer to the user, such as to Ctrl-C.
    """

    title: str
    stages: dict[str, StageView]
    clock: Callable[[], float] = time.monotonic
    loss: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    first: dict[str, tuple[float, int | None]] = field(default_factory=dict)
    last: dict[str, tuple[float, int | None]] = field(default_factory=dict)
    last_of: str = "now"
    sample: Sample | None = None
    messages: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    banner: str = ""
    started: float = 0.0

    def __post_init__(self) -> None:
        self.started = self.clock()

    def take(self, event: Event) -> None:
        """Remember what an event told."""
        match event:
            case StageStarted(stage, title):
                view = self.stages.setdefault(stage, StageView(title))
                view.state, view.began = "running", self.clock()
            case StageSkipped(stage, _):
                self.stages.setdefault(stage, StageView(stage)).state = "kept"
            case StageDone(stage, seconds):
                view = self.stages.setdefault(stage, StageView(stage))
                view.state, view.seconds = "done", seconds
            case Progress(stage, what, done, total):
                view = self.stages.setdefault(stage, StageView(stage))
                if view.what != what or done < view.at:
                    view.since = (self.clock(), done)
                view.what, view.at, view.of = what, done, total
            case Metric():
                self._measure(event)
            case Sample():
                self.sample = event
            case Note(_, message):
                self._say(message)
            case Warned(_, message):
                self.warnings.append(message)
                self._say(f"Warning: {message}")

    def _measure(self, event: Metric) -> None:
        if event.name == "loss":
            self.loss.append(event.value)
        elif event.name == "KL to base":
            self.kl.append(event.value)
        name, _, rest = event.name.partition(" refused")
        if name in KINDS:
            known = self.first if event.step is None and rest != ", after" else self.last
            known[name] = (event.value, event.n)
            self.last_of = f"x {rest.removeprefix(_AT)}" if rest.startswith(_AT) else "now"
            if rest == ", before":
                # The test split begins: what was measured on the selection split does not belong beside it.
                self.last.pop(name, None)
        elif event.name not in ("loss", "anchor loss", "KL to base"):
            self._say(metric_text(event.name, event.value, event.n, event.step))

    def _say(self, message: str) -> None:
        self.messages = [*self.messages, message][-_KEPT_MESSAGES:]

    def left(self) -> float | None:
        """Seconds until the run is done, or None where some stage's time is unknown."""
        done = [view for view in self.stages.values() if view.state == "done" and view.expected]
        expected = sum(view.expected or 0.0 for view in done)
        # What the finished stages took, against what was expected, corrects the others; a short one says little by itself.
        pace = (sum(view.seconds for view in done) + _TRUST) / (expected + _TRUST)
        parts = [view.left(self.clock(), pace) for view in self.stages.values()]
        return None if any(part is None for part in parts) else sum(part or 0.0 for part in parts)


class Screen:
    """The live screen as a sink of events; use as a context manager around the run."""

    def __init__(
        self,
        console: Console,
        title: str,
        stages: Sequence[tuple[str, str]],
        expected: Mapping[str, float] | None = None,
    ) -> None:
        """Prepare the screen; nothing is painted yet.

        Args:
            console: a terminal of at least `SMALLEST`.
            title: the run's name.
            stages: (name, title) in order.
            expected: seconds by stage; without them only the running stage has an estimate.
        """
        seconds = expected or {}
        self.view = RunView(title, {name: StageView(title, seconds.get(name)) for name, title in stages})
        self._console = console
        self._live = Live(
            Frame(self.view),
            console=console,
            screen=True,
            refresh_per_second=_FRAMES_A_SECOND,
            vertical_overflow="crop",
        )

    def __call__(self, event: Event) -> None:
        self.view.take(event)

    def say(self, message: str) -> None:
        """Answer the user at the bottom of the screen; safe to call from a signal handler."""
        self.view.banner = message

    def __enter__(self) -> Screen:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        # The screen takes its warnings along when it goes, and they matter afterwards too.
        for warning in self.view.warnings:
            self._console.print(as_text(f"Warning: {warning}"), soft_wrap=True)


class Frame:
    """One frame, made anew for the size that the terminal has now."""

    def __init__(self, view: RunView, memory: Callable[[], str] | None = None) -> None:
        self._view = view
        self._memory = memory or memory_line

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        view = self._view
        plain = not (options.encoding or "").startswith("utf")
        height = options.height or console.height
        layout = Layout()
        # A window made smaller than the layout needs shows less of it, but is no reason to stop.
        sample = max(min(8 + (height - SMALLEST[1]) // 3, 12, height - 16), 3)
        lines = max(height - 12 - sample, 1)
        layout.split_column(
            Layout(_head(view), size=1),
            Layout(name="middle", size=10),
            Layout(
                Panel(
                    _sample(view, console, options.max_width - 4, sample - 2),
                    title="Latest answers, their beginnings",
                    title_align="left",
                ),
                name="sample",
                size=sample,
            ),
            Layout(_messages(view, console, options.max_width, lines), name="messages"),
            Layout(_foot(view, self._memory()), size=1),
        )
        layout["middle"].split_row(
            Layout(Panel(_stages(view), title="Stages, time taken or left", title_align="left")),
            Layout(Panel(_figures(view, plain), title="Figures", title_align="left"), size=34),
        )
        yield layout


def _head(view: RunView) -> Text:
    spent = format_duration(view.clock() - view.started)
    left = view.left()
    about = f", about {format_estimate(left)} left" if left else ""
    return Text.assemble((f" {visible(view.title)}", "bold"), f"  {spent}{about}", overflow="ellipsis", no_wrap=True)


_MARKS = {"waiting": " ", "running": ">", "done": "x", "kept": "x"}


def _stages(view: RunView) -> Table:
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, ratio=1, overflow="ellipsis")
    table.add_column(no_wrap=True, justify="right")
    for stage in view.stages.values():
        left = stage.left(view.clock(), 1.0)
        told = {
            "done": format_duration(stage.seconds),
            "kept": "done before",
            "waiting": f"~{format_estimate(left)}" if left else "",
            "running": f"~{format_estimate(left)}" if left else "running",
        }[stage.state]
        table.add_row(
            Text(f"[{_MARKS[stage.state]}]"), as_text(stage.title, "bold" if stage.state == "running" else ""), told
        )
    running = next((stage for stage in view.stages.values() if stage.state == "running"), None)
    if running and running.of:
        table.add_row("", as_text(_amount(running), "dim"), "")
    return table


def _amount(stage: StageView) -> str:
    if stage.what.startswith("bytes"):
        return f"{format_bytes(stage.at)} of {format_bytes(stage.of)}{stage.what.removeprefix('bytes')}"
    return f"{stage.at} of {stage.of} {stage.what}"


def _figures(view: RunView, plain: bool) -> Group:
    curves = Table.grid(padding=(0, 1))
    for name, values in (("loss", view.loss), ("KL", view.kl)):
        newest = f"{values[-1]:.4f}" if values else "-"
        curves.add_row(name, sparkline(values, 14, plain), newest)
    rates = Table.grid(padding=(0, 1))
    rates.add_column()
    for _ in ("base", "now"):
        rates.add_column(min_width=len("100 %"), justify="right")
    rates.add_row("refused", "base", view.last_of, "")
    for name in KINDS:
        before, now = view.first.get(name), view.last.get(name)
        n = (now or before or (0.0, None))[1]
        rates.add_row(name, _share(before), _share(now), f"n {n}" if n else "")
    return Group(curves, rates)


def _share(rate: tuple[float, int | None] | None) -> str:
    return "-" if rate is None else f"{100 * rate[0]:.0f} %"


def sparkline(values: Sequence[float], width: int, plain: bool = False) -> str:
    """All values as one line of at most `width` bars, each the mean of as many values, the lowest to the highest."""
    bars = "_.-=+*#@" if plain else "▁▂▃▄▅▆▇█"
    count = min(len(values), width)
    edges = [len(values) * place // count for place in range(count + 1)] if count else []
    means = [sum(values[low:high]) / (high - low) for low, high in pairwise(edges)]
    low, span = min(means, default=0.0), max(means, default=0.0) - min(means, default=0.0)
    return "".join(bars[round((mean - low) / span * (len(bars) - 1)) if span else 0] for mean in means)


def _sample(view: RunView, console: Console, width: int, lines: int) -> Text:
    """The newest prompt with both answers, in equal parts of the lines, so that neither hides the other."""
    if view.sample is None:
        return Text("Comes with the first step of the distillation.", "dim")
    asked = _spoken("asked", view.sample.prompt, console, width)
    base = _spoken("base", view.sample.before, console, width) if view.sample.before else []
    now = _spoken("now", view.sample.after, console, width)
    # One line is the prompt's. What one answer leaves over is the other's, and what both leave over is the prompt's.
    for_base = min(len(base), max((lines - 1) // 2, lines - 1 - len(now)))
    for_now = min(len(now), lines - 1 - for_base)
    parts = ((asked, lines - for_base - for_now), (base, for_base), (now, for_now))
    return Text("\n").join(line for part, most in parts for line in _first_lines(part, most, width))


def _spoken(name: str, words: str, console: Console, width: int) -> list[Text]:
    text = Text.assemble((f"{name + ':':<7}", "bold"), visible(" ".join(words.split())) or "(nothing)")
    return list(text.wrap(console, width))


def _first_lines(lines: list[Text], most: int, width: int) -> list[Text]:
    """At most so many lines, the last of which shows that more would follow."""
    if len(lines) > most > 0:
        lines[most - 1].rstrip()
        lines[most - 1].truncate(width - 4)
        lines[most - 1].append(" ...")
    return lines[: max(most, 0)]


def _messages(view: RunView, console: Console, width: int, lines: int) -> Text:
    """The newest messages, wrapped, as many as the lines hold."""
    shown: list[Text] = []
    for message in reversed(view.messages):
        wrapped = as_text(message).wrap(console, width - 2)
        if len(shown) + len(wrapped) > lines and shown:
            break
        shown = [*wrapped, *shown]
    # rich puts a picture of its own where a layout has nothing to show.
    return Text("\n").join(Text(f" {line.plain}") for line in shown[:lines]) or Text(" ")


def _foot(view: RunView, memory: str) -> Text:
    # An answer comes first: what does not fit is cut off at the right.
    parts = [view.banner, memory] if view.banner else [memory, "Ctrl-C finishes the step and saves; it can be resumed."]
    return Text(f" {visible('  '.join(parts))}", "reverse", no_wrap=True, overflow="ellipsis")


def memory_line() -> str:
    """What this process holds now: memory, and the card's where one is used."""
    import psutil

    text = f"RAM {format_bytes(psutil.Process().memory_info().rss)}"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        # Each thread has a current card of its own, and the model's is the one that holds something.
        free, total = torch.cuda.mem_get_info(max(range(torch.cuda.device_count()), key=torch.cuda.memory_allocated))
        text += f", VRAM {format_bytes(total - free)} of {format_bytes(total)}"
    return text

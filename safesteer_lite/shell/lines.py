"""Plain lines for a terminal or a file: what happens, how far it is, how long it will take."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.box import SIMPLE
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from safesteer_lite.evaluation import dial
from safesteer_lite.evaluation.contexts import sections
from safesteer_lite.evaluation.scorecard import cut_in_thought, kinds_of
from safesteer_lite.events import (
    Event,
    Metric,
    Note,
    Progress,
    StageDone,
    StageSkipped,
    StageStarted,
    Warned,
    write_json_line,
)
from safesteer_lite.hardware.units import format_bytes, format_duration
from safesteer_lite.shell.console import as_text
from safesteer_lite.text import visible

# A line of progress at most this often, in seconds: often enough to see that it lives, seldom enough to read a log.
_EVERY = 15.0
_QUIET_METRICS = {"loss", "anchor loss"}


class Lines:
    """A sink that prints events as lines, with an estimate of the time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._began: dict[tuple[str, str], tuple[float, int]] = {}
        self._shown = 0.0

    def __call__(self, event: Event) -> None:
        match event:
            case StageStarted(_, title):
                self._line(f"== {title}", "bold")
            case StageSkipped(stage, reason):
                self._line(f"== {stage}: {reason}")
            case StageDone(stage, seconds):
                self._line(f"   {stage} took {format_duration(seconds)}")
            case Note(_, message):
                self._line(f"   {message}")
            case Warned(_, message):
                self._line(f"   Warning: {message}", "yellow")
            case Metric(_, name, value, n, step) if name not in _QUIET_METRICS:
                self._line("   " + metric_text(name, value, n, step))
            case Progress():
                self._progress(event)
            case _:
                pass

    def _progress(self, event: Progress) -> None:
        now = time.monotonic()
        began, first = self._began.setdefault((event.stage, event.what), (now, event.done))
        if now - self._shown < _EVERY and event.done < event.total:
            return
        if event.done >= event.total and now - began < _EVERY:
            return
        self._shown = now
        left = ""
        if event.done > first and event.done < event.total:
            seconds = (now - began) / (event.done - first) * (event.total - event.done)
            left = f", about {format_duration(seconds)} left"
        amounts = f"{event.done} of {event.total} {event.what}"
        if event.what.startswith("bytes"):
            amounts = f"{format_bytes(event.done)} of {format_bytes(event.total)}{event.what.removeprefix('bytes')}"
        self._line(f"   {amounts}{left}", "dim")

    def _line(self, text: str, style: str = "") -> None:
        """One line of a log; at a terminal wrapped between words, below where its text begins."""
        text = visible(text)  # A new line in a name begins no new line.
        if not self.console.is_terminal:
            self.console.print(as_text(text, style), soft_wrap=True)
            return
        words = text.lstrip()
        self.console.print(Padding(as_text(words, style), (0, 0, 0, len(text) - len(words)), expand=False))


class Json:
    """A sink that prints events as JSON Lines, for machines."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __call__(self, event: Event) -> None:
        write_json_line(self.stream, event, ascii_only=True)


def metric_text(name: str, value: float, n: int | None, step: int | None) -> str:
    """One metric in words; shares of refusals as a percentage with their n."""
    where = f"step {step}: " if step is not None else ""
    share = "refus" in name or "with harm" in name
    amount = f"{100 * value:.0f} %" if share else f"{value:.4f}"
    return f"{where}{name} {amount}" + (f" (n = {n})" if n is not None else "")


def scorecard_table(
    scorecard: Mapping[str, Any], contexts: Mapping[str, Any] | None = None, *, alone: bool = False
) -> Table:
    """Refusals before and after, asked plainly with 95 % intervals, and in contexts; 80 columns hold it.

    Args:
        scorecard: `before` and `after`, as the report has them.
        contexts: the same by context, as the report has them; None where nothing was asked in any.
        alone: of one model, before which there was none; both sides are its own.
    """
    table = Table(
        title="Refusals on the test split (95 % Wilson intervals)", title_justify="left", caption_justify="left"
    )
    sides = (1,) if alone else (0, 1)
    for heading in ("prompts", "n", *(("refused",) if alone else ("before", "after"))):
        table.add_column(heading, justify="left" if heading == "prompts" else "right")
    plainly, *in_contexts = sections(scorecard, contexts)
    for name, *rates in plainly.rows:
        table.add_row(name, str(rates[1]["n"]), *(rate_text(rates[side]) for side in sides))
    whose = {"of the answers": scorecard["after"]} if alone else {side: scorecard[side] for side in ("before", "after")}
    notes = list(filter(None, [cut_in_thought(whose)]))
    if not alone:
        kl = scorecard["after"]["kl_to_base"]
        table.add_row("KL, nats a token", "", "0", f"{kl:.4f}" if isinstance(kl, float) else "not measured")
        notes.append("KL: to the base, on harmless prompts.")
    table.add_section()
    for section in in_contexts:
        counts = sorted({new["n"] for _, _, new in section.rows})
        told = [" / ".join(str(rates[side]["refused"]) for _, *rates in section.rows) for side in sides]
        table.add_row(section.title, "-".join(map(str, dict.fromkeys((counts[0], counts[-1])))), *told)
    asked = [name for name, _, _ in plainly.rows]
    if "twin" in asked:
        notes.append("twin: harmless requests in the words of harmful ones.")
    if "critical" in asked:
        notes.append("critical: requests for help in danger, where a refusal may do harm.")
    if in_contexts:
        kinds = " / ".join(name for name, _, _ in in_contexts[0].rows)
        notes.append(
            f"In contexts: {kinds} prompts refused, of n each; where an answer was begun, whether the model turns back."
        )
    table.caption = "\n".join(notes)
    return table


def dial_table(points: Sequence[dict[str, Any]]) -> Table:
    """The strength dial: what each strength refuses, and its trade-off.

    Args:
        points: records as `evaluation.dial` makes them, weakest first.
    """
    title = "Strength dial, selection split: refused, with 95 % Wilson intervals"
    # 80 columns hold all kinds where they stand close together.
    table = Table(title=title, title_justify="left", box=SIMPLE, show_edge=False, padding=(0, 0, 0, 1))
    kinds = kinds_of(points[0])
    for heading in ("strength", *kinds, "KL", "score", "apart"):
        table.add_column(heading, justify="right", no_wrap=True)
    best = dial.best([dial.Point.from_record(point) for point in points]).strength
    for point in points:
        rates = [_share_text(point[name]) for name in kinds]
        mark = "> " if point["strength"] == best else ""
        apart = point.get("separation")
        table.add_row(
            f"{mark}{point['strength']:g}",
            *rates,
            f"{point['kl_to_base']:.3f}",
            f"{point['score']:+.1f}",
            "-" if apart is None else f"{apart:+.1f}",
        )
    sizes = ", ".join(str(points[0][name]["n"]) for name in kinds)
    table.caption = (
        f"n = {sizes}; > marks the best trade-off. apart: nats by which harmful prompts moved farther towards a refusal than the "
        "others, which decides where scores differ by one answer or less"
    )
    return table


def artifacts_table(record: dict[str, Any]) -> Table:
    """One row an artifact: its refusals, and how it agrees with the trained model; lost safety in red."""
    rows, names = record["artifacts"], kinds_of(record["artifacts"][0])
    title = f"Refusals on {record['split']} prompts (95 % Wilson intervals), each artifact as it is run"
    # 80 columns hold all kinds where they stand close together.
    table = Table(title=title, title_justify="left", caption_justify="left", padding=0)
    table.add_column("")
    for name in names:
        counts = sorted({row[name]["n"] for row in rows})
        table.add_column(
            f"{name}\nn = {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))}", justify="right"
        )
    for heading in ("same\nanswers", "first\ntoken KL"):
        table.add_column(heading, justify="right")
    for row in rows:
        lost, agreement = bool(row["safety_lost"]), row["agreement"]
        cells = [Text(_share_text(row[name])) for name in names]
        cells[0].stylize("bold red" if lost else "")
        close = ("", "")
        if agreement:
            kl = "not finite" if agreement["first_kl"] is None else f"{agreement['first_kl']:.4f}"
            close = (f"{agreement['same_answers']} of {agreement['prompts']}", kl)
        table.add_row(as_text(row["artifact"], "red" if lost else ""), *cells, *close)
    told = [f"{row['artifact']} lost safety: {row['safety_lost']}." for row in rows if row["safety_lost"]]
    table.caption = as_text("\n".join(told), "red") if told else None
    return table


def _share_text(rate: Mapping[str, Any]) -> str:
    """`64 %` above `54-73`, narrow enough for a row of seven."""
    share = rate["refused"] / rate["n"] if rate["n"] else 0.0
    return f"{100 * share:.0f} %\n{100 * rate['low']:.0f}-{100 * rate['high']:.0f}"


def rate_text(rate: Mapping[str, Any]) -> str:
    """`51 (80 %, 68 to 88)`."""
    share = rate["refused"] / rate["n"] if rate["n"] else 0.0
    return f"{rate['refused']} ({100 * share:.0f} %, {100 * rate['low']:.0f} to {100 * rate['high']:.0f})"

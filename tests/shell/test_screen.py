"""The live screen: what each event does to it, and whole frames at two sizes, with and without colour."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from safesteer_lite.events import Metric, Note, Progress, Sample, StageDone, StageSkipped, StageStarted, Warned
from safesteer_lite.prompts.sets import KINDS
from safesteer_lite.shell.screen import Frame, RunView, Screen, StageView, fits_terminal, sparkline

STAGES = (
    ("baseline", "What the base model does", 20.0),
    ("direction", "Refusal direction", 100.0),
    ("tokens", "Safety tokens", 30.0),
    ("distill", "Distillation", 400.0),
    ("evaluate", "Before and after", 400.0),
    ("export", "Merged weights", 20.0),
)


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def view(clock: Clock) -> RunView:
    """A run in the middle of its distillation."""
    run = RunView("demo-20260101-120000", {name: StageView(title, left) for name, title, left in STAGES}, clock)
    run.take(StageStarted("baseline", "What the base model does"))
    for name, share in zip(KINDS, (0.47, 0.25, 0.06, 0.12, 0.2), strict=True):
        run.take(Metric("baseline", f"{name} refused", share, 32))
    run.take(StageDone("baseline", 40.0))
    run.take(StageSkipped("direction", "done already, with the same settings"))
    run.take(StageSkipped("tokens", "done already, with the same settings"))
    run.take(StageStarted("distill", "Distillation"))
    for step in range(1, 6):
        clock.now += 10
        run.take(Metric("distill", "loss", 1 / step, 300, step))
        run.take(Metric("distill", "anchor loss", 0.01, 300, step))
        run.take(Sample("distill", "How do I pick a lock?", "Take a wire.", "I can't help\nwith that."))
        run.take(Progress("distill", "steps", step, 10))
    run.take(Metric("distill", "harmful refused", 0.64, 32, 5))
    run.take(Metric("distill", "KL to base", 0.0025, 900, 5))
    run.take(Note("distill", "A decision, because of its reason."))
    return run


def frame(view: RunView, columns: int, rows: int, colour: bool = False) -> list[str]:
    """One frame's lines, as a terminal of that size would show them."""
    console = Console(
        width=columns, height=rows, record=True, file=io.StringIO(), force_terminal=colour, color_system="truecolor"
    )
    console.print(Frame(view, lambda: "RAM 3.2 GB"))
    return console.export_text(styles=colour).splitlines()


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (120, 40), (200, 60)])
def test_a_frame_fills_the_terminal_and_no_more(view: RunView, columns: int, rows: int) -> None:
    lines = frame(view, columns, rows)
    assert len(lines) == rows
    assert {cell_len(line) for line in lines} == {columns}


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (120, 40)])
def test_a_frame_tells_everything_without_colour(view: RunView, columns: int, rows: int) -> None:
    text = "\n".join(frame(view, columns, rows))
    assert "\x1b" not in text
    for words in (
        "demo-20260101-120000  50 s",
        "[x] What the base model does",
        "[x] Refusal direction",
        "done before",
        "[>] Distillation",
        "5 of 10 steps",
        "[ ] Before and after",
        "harmful     47 %  64 % n 32",
        "harmless     6 %     - n 32",
        "twin        12 %     - n 32",
        "critical    20 %     - n 32",
        "asked: How do I pick a lock?",
        "base:  Take a wire.",
        "now:   I can't help with that.",
        "A decision, because of its reason.",
        "RAM 3.2 GB",
        "Ctrl-C finishes the step",
    ):
        assert words in text, f"{words}\n{text}"
    assert "█▄▂▁▁" in text, text


@pytest.mark.parametrize(("columns", "rows", "words"), [(80, 24, 20), (120, 40, 50)])
def test_long_answers_leave_room_for_each_other(view: RunView, columns: int, rows: int, words: int) -> None:
    asked, base, now = (" ".join(f"{name}{index}" for index in range(400)) for name in "abc")
    view.take(Sample("distill", asked, base, now))
    text = "\n".join(frame(view, columns, rows))
    assert all(f"{name}{words}" in text for name in "bc") and "a30" not in text
    assert text.count(" ...") == 3, "where something is left out, it shows"
    view.take(Sample("distill", "Short?", "No.", now))
    left = "\n".join(frame(view, columns, rows))
    assert left.count("c") > text.count("c"), "what one answer leaves over is the other's"
    assert "base:  No." in left


@pytest.mark.parametrize("size", [(80, 17), (60, 24), (40, 10), (20, 5)])
def test_a_window_made_too_small_meanwhile_is_no_reason_to_stop(view: RunView, size: tuple[int, int]) -> None:
    assert len(frame(view, *size)) == size[1]


def test_the_layout_stays_where_it_is(view: RunView, clock: Clock) -> None:
    empty = RunView("demo", {name: StageView(title) for name, title, _ in STAGES}, clock)
    corners = [
        [(row, line.index("╭")) for row, line in enumerate(frame(run, 80, 24)) if "╭" in line] for run in (empty, view)
    ]
    assert corners[0] == corners[1]


def test_time_left_follows_the_measured_pace(view: RunView, clock: Clock) -> None:
    stage = view.stages["distill"]
    # The first step was seen at 10 s, and each takes 10 s; the plan said 400 s and 50 have gone.
    assert stage.left(clock(), 1.0) == 350.0
    stage.expected = None
    assert stage.left(clock(), 1.0) == pytest.approx(50.0)
    # The one finished stage took 40 s instead of 20; a minute at the expected pace counts beside it.
    stage.expected = 400.0
    assert view.left() == pytest.approx(1.25 * 400 - 50 + 1.25 * (400 + 20))
    view.stages["baseline"].seconds, view.stages["baseline"].expected = 4000.0, 2000.0
    assert view.left() == pytest.approx(2 * 400 - 50 + 2 * (400 + 20), rel=0.02)
    view.stages["export"].expected = None
    assert view.left() is None


def test_the_test_split_takes_the_place_of_the_selection_split(view: RunView) -> None:
    view.take(Metric("evaluate", "harmful refused, before", 0.5, 100))
    assert view.first["harmful"] == (0.5, 100) and "harmful" not in view.last
    view.take(Metric("evaluate", "harmful refused, after", 0.7, 100))
    assert view.first["harmful"] == (0.5, 100) and view.last["harmful"] == (0.7, 100)


def test_what_a_second_judge_says_stands_among_the_messages(view: RunView) -> None:
    before = (dict(view.first), dict(view.last))
    view.take(Metric("judge", "guard: harmful refused, before", 0.5, 100))
    assert (view.first, view.last) == before
    assert view.messages[-1] == "guard: harmful refused, before 50 % (n = 100)"


def test_the_strengths_that_are_tried_are_shown_as_such(view: RunView) -> None:
    view.take(Metric("distill", "harmful refused at strength 0.5", 0.9, 32, 8))
    assert view.first["harmful"] != (0.9, 32) and view.last["harmful"] == (0.9, 32)
    headings = next(line for line in frame(view, 80, 24) if "refused  " in line)
    assert "base x 0.5" in headings and "now" not in headings
    view.take(Metric("evaluate", "harmful refused, after", 0.7, 100))
    assert any("base   now" in line for line in frame(view, 80, 24))


def test_other_metrics_are_told_as_messages(view: RunView) -> None:
    view.take(Metric("direction", "teacher refusals at strength 2", 0.9, 32))
    assert view.messages[-1] == "teacher refusals at strength 2 90 % (n = 32)"


def test_markup_in_texts_is_shown_as_it_is(view: RunView) -> None:
    view.take(Sample("distill", "[bold]Say[/bold] [/nothing]", "", "[red]no"))
    view.take(Note("distill", "[/oops]"))
    text = "\n".join(frame(view, 120, 40))
    assert "[bold]Say[/bold] [/nothing]" in text and "[red]no" in text and "[/oops]" in text


@pytest.mark.parametrize(
    ("values", "bars"),
    [
        ([], ""),
        ([3.0], "▁"),
        ([1.0, 1.0], "▁▁"),
        ([0.0, 0.5, 1.0], "▁▅█"),
        ([0.0, 0.0, 7.0, 1.0, 1.0, 1.0], "▁█▃"),
        ([1.0, 0.0, 4.0, 2.0], "▃▁█"),
    ],
)
def test_sparklines_show_the_whole_curve(values: list[float], bars: str) -> None:
    assert sparkline(values, 3) == bars


def test_sparklines_without_unicode() -> None:
    assert sparkline([0.0, 1.0], 14, plain=True) == "_@"


def test_warnings_outlive_the_screen(clock: Clock) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80, height=24, force_terminal=True, color_system=None)
    with Screen(console, "demo", [("distill", "Distillation")]) as screen:
        screen(Warned("distill", "Out of memory: rollouts lowered."))
        screen.say("Stopping after this step.")
    shown = stream.getvalue()
    left = shown.rindex("\x1b[?1049l")
    assert "Warning: Out of memory: rollouts lowered." in shown[left:], "told again on the ordinary screen"
    assert "Distillation" in shown[:left]


@pytest.mark.parametrize(
    ("size", "terminal", "shown"),
    [((80, 24), True, True), ((79, 24), True, False), ((80, 23), True, False), ((80, 24), False, False)],
)
def test_where_the_screen_is_not_shown(size: tuple[int, int], terminal: bool, shown: bool) -> None:
    console = Console(
        file=io.StringIO(), width=size[0], height=size[1], force_terminal=terminal, _environ={"TERM": "xterm"}
    )
    assert fits_terminal(console) is shown

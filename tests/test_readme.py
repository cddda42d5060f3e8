"""What the README shows of the program is what the program shows."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from safesteer_lite.events import Metric, Sample, StageStarted
from safesteer_lite.shell.screen import Frame, RunView, StageView
from safesteer_lite.stages.pipeline import STAGES
from tests.readme import block, presets_on_cards, screen, transcript, wording


def test_the_table_of_cards_is_the_programs_own() -> None:
    assert block("fit table") == presets_on_cards()
    assert len(presets_on_cards().splitlines()) == 2 + 4, "the four presets"


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (120, 30)])
def test_the_live_screen_is_shown_as_it_is(columns: int, rows: int) -> None:
    view = RunView("run", {stage.name: StageView(stage.title) for stage in STAGES})
    view.take(StageStarted("distill", "Distillation"))
    view.take(Metric("distill", "loss", 1.0))
    view.take(Sample("distill", "a", "b", "c"))
    console = Console(width=columns, height=rows, record=True, file=io.StringIO())
    console.print(Frame(view, lambda: "RAM"))
    now, kept = console.export_text().splitlines(), screen(columns)
    assert len(kept) == len(now) == rows and max(map(len, kept)) == columns
    # Borders, titles and headings stand where they stand in the README; the rest belongs to the run that was shown.
    for place in (1, 10, 11, 12 + kept[12:].index(next(line for line in kept[12:] if line.startswith("╰")))):
        assert kept[place] == now[place]
    words = ["loss", "KL", "refused     base   now", "harmful", "borderline", "harmless", "asked:", "base:", "now:"]
    for word in [*words, *(stage.title for stage in STAGES), now[-1].partition("RAM")[2].strip()]:
        assert any(word in line for line in kept) and any(word in line for line in now), word


@pytest.mark.parametrize("columns", [80, 120])
def test_a_transcript_is_whole_and_has_its_width(columns: int) -> None:
    lines = transcript(columns)
    asked = [line for line in lines if line.startswith("? ")]
    assert [line.partition("?")[2].strip().partition(" (")[0] for line in asked] == [
        "Which model shall become safer?",
        "Harmful requests to train on?",
        "How thorough?",
        "Start?",
    ]
    assert columns * 0.8 < max(map(len, lines)) <= columns


def test_wording_leaves_out_what_differs_between_machines() -> None:
    assert wording(" » 1) qwen3-4b    fits    ~1 d 13 h    8.0 GB") == wording(
        "   1) qwen3-4b    does not fit    8.0 GB"
    )
    assert wording("memory     20.0 GB free of 25.3 GB") == "memory"
    assert wording(" Safety tokens  50 s  1.5 GB") == wording("  Safety tokens  2 h 5 min  9.0 MB") == "Safetytokens#"
    assert wording(" model  Qwen (fits)") == "model" and wording("models  Qwen (fits)") != "model"
    assert wording("How thorough?") != wording("How quick?")

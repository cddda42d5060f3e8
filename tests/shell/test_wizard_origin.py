"""A model that hardly refuses: the wizard asks for the model that it was made from, and goes on from what was done."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from safesteer_lite import config
from safesteer_lite.evaluation.scorecard import Rate, Scorecard
from safesteer_lite.runs import folder as run_folders
from safesteer_lite.runs.creation import create_run
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.runs.listing import list_runs
from safesteer_lite.shell.arguments import build_parser
from safesteer_lite.shell.commands.shared import open_settings, run_settings
from safesteer_lite.shell.wizard import origin
from safesteer_lite.shell.wizard.ask import Back
from safesteer_lite.shell.wizard.program import Program
from safesteer_lite.stages import pipeline
from tests import planted, planted_weak, tiny
from tests.readme import block, not_shown
from tests.shell.terminal import CLEAR, DOWN, ENTER, ESCAPE
from tests.shell.test_wizard import needs_terminal, start

ASKED = "Do you have the model it was made from?"
WHERE = "folder, GGUF file, or owner/name on the model hub:"
SMALLER = {
    "SAFESTEER_LITE_PROMPTS__TEST": "6",
    "SAFESTEER_LITE_EVALUATE__CONTEXTS": "",
    "SAFESTEER_LITE_DISTILL__ADAPTER_STRENGTHS": "",
    "SAFESTEER_LITE_EVALUATE__ANSWER_TOKENS": "12",
}


@needs_terminal
@pytest.mark.slow
def test_the_wizard_asks_for_the_model_that_a_weak_one_was_made_from(planted_model: Path, tmp_path: Path) -> None:
    weak = planted_weak.build(tmp_path / "weak", planted_model)
    terminal = start(tmp_path, columns=80, **SMALLER)
    terminal.answer("Which model shall become safer?", "6" + ENTER)
    terminal.answer("Folder of the model", str(weak) + ENTER)
    for question in ("Harmful requests to train on?", "Which recipe?", "How thorough?", "Start?"):
        terminal.answer(question, ENTER)
    shown = terminal.expect("This model hardly refuses anything: 0 of 28 harmful requests.", 300)
    assert "--direction-from" not in shown and "safesteer-lite:" not in shown, (
        "what a command would say is said in plain words"
    )
    terminal.answer(ASKED, 2 * DOWN + ENTER)
    terminal.expect("direction.contrast=responses")
    terminal.expect("No refusal direction met all criteria.", 300)
    terminal.answer(ASKED, ENTER)
    terminal.answer(WHERE, str(weak) + ENTER)
    terminal.expect("That is the model itself.")
    terminal.answer(WHERE, CLEAR + str(planted_model) + ENTER)
    assert "compare beginnings" not in terminal.expect("The same without questions:"), "what failed is offered no more"
    terminal.expect("Taken over from weak-", 300)
    terminal.expect("Refusals on the test split", 300)
    terminal.answer("What now?", "8" + ENTER)
    assert terminal.end() == 0 and "Traceback" not in terminal.text
    lines = [line for line in block("weak 80").splitlines() if line and not line.startswith("```")]
    assert not_shown(lines, terminal.text) == []
    first, compared, last = sorted(
        (run_folders.open_run(entry.path) for entry in list_runs(tmp_path / "runs")), key=created
    )
    assert [len(run.manifest.stages) for run in (first, compared, last)] == [1, 1, len(pipeline.STAGES)]
    assert last.manifest.stages["baseline"].artifacts == first.manifest.stages["baseline"].artifacts
    assert last.record("direction").result["source"]["name"] == str(planted_model)
    card = last.record("evaluate").result["scorecard"]
    assert card["after"]["harmful"]["refused"] > card["before"]["harmful"]["refused"] == 0


def created(run: RunFolder) -> str:
    return run.manifest.created


@pytest.fixture
def lines() -> list[list[str]]:
    """The commands that were asked for."""
    return []


@pytest.fixture
def program(tmp_path: Path, lines: list[list[str]]) -> Program:
    """A program whose commands are kept and fail, over the runs of a folder."""

    def execute(line: Sequence[str]) -> int:
        lines.append(list(line))
        return 1

    return Program(
        execute=execute,
        run_settings=lambda line: run_settings(build_parser().parse_args(line)),
        open_settings=lambda path: open_settings(run_folders.open_run(path)),
        exports={},
        runs=tmp_path / "runs",
        console=Console(file=io.StringIO(), width=80, record=True),
    )


def stopped(runs: Path, model: Path, refused: int, **changes: Any) -> RunFolder:
    """A run behind its first stage, in which its model refused so many of 20 harmful prompts."""
    own = {name.replace("__", "."): value for name, value in changes.items()}
    run = create_run(runs, "made", config.to_toml(planted.settings(model, own)), planned=pipeline.STAGE_NAMES)
    with run.publish("baseline", 1, "mark") as publication:
        (publication.path / "answers.json").write_text(json.dumps(refused), encoding="utf-8")
        rate = Rate.of(refused, 20)
        publication.result = {"scorecard": Scorecard(rate, rate, rate).to_record()}
    return run


def test_only_a_run_that_looks_for_the_direction_on_its_own_weak_model_waits_for_another(
    program: Program, tiny_folder: Callable[[str], Path]
) -> None:
    model = tiny_folder("llama")

    def waits(refused: int, **changes: Any) -> bool:
        return origin.waits_for_origin(program, stopped(program.runs, model, refused, **changes).path)

    assert waits(2) and not waits(3)
    assert not waits(0, direction__source=str(model)) and not waits(0, direction__contrast="responses")
    assert not waits(0, direction__teacher="prompted")
    done = stopped(program.runs, model, 0)
    with done.publish("direction", 2, "mark") as publication:
        (publication.path / "direction.safetensors").write_bytes(b"x")
    assert not origin.waits_for_origin(program, done.path)


def test_where_it_goes_on_is_asked_until_a_run_succeeds_or_the_user_stops(
    program: Program, lines: list[list[str]], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    run = stopped(program.runs, tiny_folder("llama"), 0)
    other, small = (
        tiny.save_model(tmp_path / "other", "llama", seed=1),
        tiny.save_model(tmp_path / "small", "llama", layers=3),
    )
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        typed = [ENTER, "gone" + ENTER, CLEAR + str(small) + ENTER, CLEAR + str(other) + ENTER]
        keys.send_text("1" + ENTER + "".join(typed) + "3" + ENTER + "2" + ENTER + "1" + ENTER)
        keys.send_text(ESCAPE)
        keys.send_text("2" + ENTER)
        with pytest.raises(Back):
            origin.go_on(program, run.path)
    begin, end = (
        ["run", "--config", str(run.config_path)],
        ["--reuse", str(run.path), "--runs", str(program.runs), "--yes"],
    )
    assert lines == [
        [*begin, "--direction-from", str(other), *end],
        [*begin, "--set", "direction.contrast=responses", *end],
        [*begin, "--set", "direction.teacher=prompted", *end],
    ]
    shown = " ".join(program.console.export_text().split())
    told = (
        "This model hardly refuses anything: 0 of 20",
        "That was empty.",
        "gone is neither a folder",
        "3 blocks of width 64",
    )
    assert all(words in shown for words in told) and shown.endswith(
        f"The run is kept in {run.path}; `safesteer-lite` offers it again."
    )


def test_a_model_that_refuses_some_but_too_few_clearly_is_not_said_to_refuse_nothing(
    program: Program, tiny_folder: Callable[[str], Path]
) -> None:
    run = stopped(program.runs, tiny_folder("llama"), 6)
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("4" + ENTER)
        with pytest.raises(Back):
            origin.go_on(program, run.path)
    shown = " ".join(program.console.export_text().split())
    assert "This model refuses 6 of 20 harmful requests, and too few of them clearly" in shown
    assert "hardly refuses anything" not in shown


def test_a_run_that_another_one_has_gone_on_from_is_offered_no_more(
    program: Program, tiny_folder: Callable[[str], Path]
) -> None:
    model = tiny_folder("llama")
    first, other = (stopped(program.runs, model, refused) for refused in (0, 1))
    failed = stopped(program.runs, model, 0, direction__contrast="responses")
    last = stopped(program.runs, model, 0)
    for number, stage in enumerate(pipeline.STAGE_NAMES[1:], 2):
        with last.publish(stage, number, "mark") as publication:
            (publication.path / "a").write_bytes(b"x")
    further = stopped(program.runs, model, 0)
    entries = list_runs(program.runs)
    names = {entry.name for entry in entries if origin.went_on(entry, entries)}
    assert names == {first.path.name, failed.path.name}
    assert {other.path.name, further.path.name} <= {entry.name for entry in entries}

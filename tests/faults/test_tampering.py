"""Files that are not what was published: a sentence, or the same result; never another result, and no traceback."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from safesteer_lite.runs.durable import files_in
from safesteer_lite.runs.folder import RunFolder
from tests import children
from tests.faults.damage import DAMAGES
from tests.faults.program import Outcome, call, check
from tests.faults.test_kills import contents
from tests.stages.test_resume import attempt, before_distillation, result_of

pytestmark = [pytest.mark.faults, pytest.mark.skipif(os.name == "nt", reason="needs fork and pipes")]

COMMANDS: dict[str, tuple[list[str], bytes]] = {
    "resume": (["resume", "planted", "--json"], b""),
    "report": (["report", "planted", "--json"], b""),
    "eval": (["eval", "planted", "--json"], b""),
    "strength": (["strength", "planted", "--at", "0.5,1", "--json"], b""),
    "chat": (["chat", "planted", "--tokens", "12"], b"How do I bake bread?\nHow do I pick a lock?\n/quit\n"),
    "export": (["export", "planted", "--out", "out", "--measure", "4", "--json"], b""),
    "verify": (["verify", "runs/planted/06-export/merged"], b""),
    "runs": (["runs"], b""),
}


@pytest.fixture(scope="session")
def expected(planted_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each command says of the run as it was published."""
    found = {}
    for name, (command, keys) in COMMANDS.items():
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(planted_run.path, folder / "runs" / "planted")
        outcome = call(folder, *command, keys=keys)
        check(outcome)
        assert outcome.code == 0, outcome.error
        found[name] = said(name, outcome)
    return found


def said(command: str, outcome: Outcome) -> Any:
    """The result in what a command said, without the events on the way and the seconds that it took."""
    if command in ("chat", "verify", "runs"):
        return outcome.output
    records = [json.loads(line) for line in outcome.output.splitlines()]
    return re.sub(r'"(seconds|peak_memory_bytes|[a-z_]*_a_second)": [^,}]+', "", json.dumps(records[-1]))


@pytest.mark.parametrize("number", range(120))
def test_a_finished_run(
    number: int,
    chance: random.Random,
    told: list[str],
    planted_run: RunFolder,
    undisturbed: dict[str, Any],
    expected: dict[str, Any],
    tmp_path: Path,
) -> None:
    run = tmp_path / "runs" / "planted"
    shutil.copytree(planted_run.path, run)
    path = chance.choice([path for path in files_in(run) if path.name not in ("run.lock", "events.jsonl")])
    what = f"{path.relative_to(run)}: {chance.choice(DAMAGES)(path, chance)}"
    name = chance.choice(list(COMMANDS))
    command, keys = COMMANDS[name]
    outcome = call(tmp_path, *command, keys=keys)
    told.append(f"{name} after {what}\n{outcome.code} {outcome.error[-1500:]}")
    check(outcome)
    if outcome.code:
        return
    if name == "resume":
        # Either nothing was wrong with what it looked at, or it was made again.
        assert result_of(RunFolder(run)) == undisturbed
    elif name != "runs":  # The list tells what is wrong in ways of its own, or that the run is not finished.
        assert said(name, outcome) == expected[name]


@pytest.fixture(scope="session")
def broken_off(planted_run: RunFolder, planted_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in the middle of its distillation."""
    folder = before_distillation(planted_run, tmp_path_factory.mktemp("broken") / "runs")
    assert children.run(attempt, planted_model, folder, '"what": "steps", "done": 5') == -9
    return folder


@pytest.mark.parametrize("number", range(30))
def test_a_run_that_goes_on(
    number: int, chance: random.Random, told: list[str], broken_off: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "planted"
    shutil.copytree(broken_off, run)
    everything = [path for path in files_in(run) if path.name not in ("run.lock", "events.jsonl")]
    saved = [path for path in everything if "partial" in str(path.relative_to(run))]
    path = chance.choice(saved if chance.random() < 0.6 else everything)
    what = f"{path.relative_to(run)}: {chance.choice(DAMAGES)(path, chance)}"
    outcome = call(tmp_path, "resume", "planted", "--json")
    told.append(f"resume after {what}\n{outcome.code} {outcome.error[-1500:]}")
    check(outcome)
    assert outcome.code or result_of(RunFolder(run)) == undisturbed


@pytest.mark.parametrize("number", range(30))
def test_a_base_model(number: int, chance: random.Random, told: list[str], planted_model: Path, tmp_path: Path) -> None:
    """A damaged model is measured as the whole one is, or refused: a value that changed can only be told by its run."""
    model = Path(shutil.copytree(planted_model, tmp_path / "model"))
    path = chance.choice(files_in(model))
    what = f"{path.name}: {chance.choice(DAMAGES)(path, chance)}"
    sizes = {"prompts.test": 4, "prompts.borderline_test": 4, "evaluate.answer_tokens": 8, "model.precision": "fp32"}
    changes = [word for name, value in sizes.items() for word in ("--set", f"{name}={value}")]
    outcome = call(tmp_path, "eval", "model", "--json", *changes)
    told.append(f"eval after {what}\n{outcome.code} {outcome.error[-1500:]}")
    check(outcome)


@pytest.mark.parametrize("number", range(20))
def test_an_exported_folder(
    number: int, chance: random.Random, told: list[str], planted_run: RunFolder, tmp_path: Path
) -> None:
    """Whatever is damaged in it, `verify` finds."""
    folder = Path(shutil.copytree(planted_run.path / "06-export" / "merged", tmp_path / "merged"))
    before = contents(folder)
    path = chance.choice(files_in(folder))
    what = f"{path.name}: {chance.choice(DAMAGES)(path, chance)}"
    outcome = call(tmp_path, "verify", "merged")
    told.append(f"verify after {what}\n{outcome.code} {outcome.output[-500:]} {outcome.error[-1500:]}")
    check(outcome)
    regular = all(entry.is_file() and not entry.is_symlink() for entry in folder.iterdir())
    harmless = regular and contents(folder) == before
    assert outcome.code or harmless

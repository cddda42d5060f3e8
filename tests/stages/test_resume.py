"""Runs that are killed at many points, and interrupted, end bit for bit as if nothing had happened.

Each attempt is a child process, which starts at once (`tests.children`).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from safesteer_lite.errors import RunFolderError
from safesteer_lite.events import Event, to_record
from safesteer_lite.runs.creation import create_run
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages import pipeline
from tests import REPOSITORY, children, planted
from tests.runs.run_files import report_of, rewind

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs fork and SIGKILL")

TENSORS = (
    "02-direction/direction.safetensors",
    "02-direction/candidates.safetensors",
    "03-tokens/tokens.safetensors",
    "04-distill/adapter/adapter_model.safetensors",
    "06-export/adapter/adapter_model.safetensors",
    "06-export/merged/model.safetensors",
    "04-distill/history.json",
    "05-evaluate/answers-after.json",
)


def attempt(model: Path, run: Path, deadly: str = "") -> None:
    """What `resume` does, without the shell; it kills itself at the first event that holds the text `deadly`."""

    def emit(event: Event) -> None:
        if deadly and deadly in json.dumps(to_record(event)):
            os.kill(os.getpid(), signal.SIGKILL)

    pipeline.run(planted.settings_of(RunFolder(run)), RunFolder(run), open_base(model), emit)


@pytest.fixture
def run(planted_model: Path, tmp_path: Path) -> RunFolder:
    """A run that has not begun."""
    return planted.new_run(tmp_path / "runs", planted.settings(planted_model))


@pytest.fixture(scope="module")
def undisturbed(planted_run: RunFolder) -> dict[str, Any]:
    """What a run ends with that nothing disturbed."""
    return result_of(planted_run)


def result_of(run: RunFolder) -> dict[str, Any]:
    """Everything of a finished run that must not depend on when it was killed."""
    told = report_of(run.path)
    sums = {name: hashlib.sha256((run.path / name).read_bytes()).hexdigest() for name in TENSORS}
    return {
        "sums": sums,
        "finished": told["finished"],
        "scorecard": told["scorecard"],
        "selection": told["selection"],
        "verdict": told["verdict"],
        "files": sorted(path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()),
    }


CHOSEN = {
    "baseline": "Self-check",
    "direction": "candidates ablated",
    "tokens": "prompts continued",
    "distill": '"what": "steps", "done": 3',
    "evaluate": '"stage": "evaluate", "what": "answers"',
    "export": "bytes merged",
}
"""What is told in the middle of each stage; of the distillation, between two saved steps."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "stages"), [("planted_run", pipeline.STAGE_NAMES), ("paper_run", ("tokens", "distill"))]
)
def test_kills_in_the_middle_of_stages_change_nothing(
    recipe: str, stages: tuple[str, ...], planted_model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    undisturbed: RunFolder = request.getfixturevalue(recipe)
    run = planted.new_run(tmp_path, planted.settings_of(undisturbed))
    for stage in stages:
        assert children.run(attempt, planted_model, run.path, CHOSEN[stage]) == -signal.SIGKILL, stage
    started = [event["stage"] for event in planted.events_of(run.path) if event["event"] == "StageStarted"]
    # Each kill fell into the stage it was meant for: that stage began again, and the ones before it did not.
    begun = pipeline.STAGE_NAMES[: pipeline.STAGE_NAMES.index(stages[-1]) + 1]
    assert started == [name for name in begun for _ in range(1 + (name in stages))][:-1]
    assert children.run(attempt, planted_model, run.path) == 0
    events = planted.events_of(run.path)
    assert any(event.get("message") == "Resumed after step 2 of 8." for event in events)
    assert result_of(run) == result_of(undisturbed)


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(
    planted_model: Path, planted_run: RunFolder, run: RunFolder, undisturbed: dict[str, Any]
) -> None:
    """Moments as they come, whatever the run does just then; `tests.faults` has many more of them."""
    chance = random.Random(20240607)
    whole = sum(stage["seconds"] for stage in report_of(planted_run.path)["stages"].values())
    killed = 0
    for _ in range(3):
        child = children.start(attempt, planted_model, run.path)
        time.sleep(whole * chance.uniform(0.1, 0.4))
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
    assert killed, "every attempt ended before it was killed, so this test says nothing"
    assert children.run(attempt, planted_model, run.path) == 0
    assert result_of(run) == undisturbed


def test_a_second_process_is_refused(run: RunFolder, planted_model: Path) -> None:
    child = children.start(attempt, planted_model, run.path)
    while not (run.path / "01-baseline.tmp").exists():
        time.sleep(0.01)
    try:
        with pytest.raises(RunFolderError, match=rf"is in use by process {child.pid}\.") as caught:
            attempt(planted_model, run.path)
        assert "Wait until it is done" in caught.value.hint
    finally:
        child.kill()
        child.join()


def command(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, "-m", "safesteer_lite", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=REPOSITORY,
    )


def before_distillation(run: RunFolder, parent: Path) -> Path:
    """A copy of a finished run as it was when its distillation began."""
    copied = parent / run.path.name
    shutil.copytree(run.path, copied)
    for name in ("report.json", "report.html"):
        (copied / name).unlink()
    rewind(copied, ("distill", "evaluate", "export"))
    return copied


@pytest.mark.slow
def test_one_interrupt_saves_the_step_and_the_run_ends_the_same(
    planted_model: Path, planted_run: RunFolder, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    folder = before_distillation(planted_run, tmp_path / "runs")
    process = command("resume", str(folder), "--json")
    assert process.stdout
    for line in process.stdout:
        if '"what": "steps", "done": 3' in line:
            process.send_signal(signal.SIGINT)
            break
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Ctrl-C again stops now" in complaint
    stopped = re.search(r"Stopped after step (\d); everything up to there is saved\.", complaint)
    assert stopped and "Traceback" not in complaint
    assert "safesteer-lite resume" in complaint
    saved = sorted(path.name for path in (folder / "04-distill.partial").glob("step-*"))
    assert len(saved) == 2 and saved[-1] == f"step-{int(stopped[1]):06d}"
    assert children.run(attempt, planted_model, folder) == 0
    told = [event.get("message") for event in planted.events_of(folder)]
    assert f"Resumed after step {stopped[1]} of 8." in told
    assert result_of(RunFolder(folder)) == undisturbed


def test_two_runs_in_the_same_second_get_two_folders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: create_run(tmp_path, "same", planned=pipeline.STAGE_NAMES), range(16)))
    assert len({run.path for run in runs}) == 16
    assert {path.name for path in tmp_path.iterdir()} == {run.path.name for run in runs}

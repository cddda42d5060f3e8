"""Runs that are killed at twelve points, and interrupted, end bit for bit as if nothing had happened.

Each attempt is a child process, forked once torch is imported and before a model is loaded, so that it starts at once.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from safesteer_lite import config, pipeline, report, rundir
from safesteer_lite.errors import RunFolderError
from safesteer_lite.events import Event, to_record
from safesteer_lite.rundir import RunFolder
from tests import planted

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs fork and SIGKILL")
REPOSITORY = Path(__file__).parents[1]

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

DRIVER = """
import multiprocessing, sys
from pathlib import Path
import torch, peft, transformers
from tests import test_resume
torch.set_num_threads(1)
test_resume.serve(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def serve(model: Path, run: Path) -> None:
    """For each line of standard input, fork a child that goes on with the run; say its process id, then how it ended."""
    context = multiprocessing.get_context("fork")
    for line in sys.stdin:
        child = context.Process(target=attempt, args=(model, run, line.strip()))
        child.start()
        sys.stdout.write(f"{child.pid}\n")
        sys.stdout.flush()
        child.join()
        sys.stdout.write(f"{child.exitcode}\n")
        sys.stdout.flush()


def attempt(model: Path, run: Path, deadly: str = "") -> None:
    """What `resume` does, without the shell; it kills itself at the first event that holds the text `deadly`."""

    def emit(event: Event) -> None:
        if deadly and deadly in json.dumps(to_record(event)):
            os.kill(os.getpid(), signal.SIGKILL)

    pipeline.run(planted.settings(model), RunFolder(run), model, emit)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.build(tmp_path_factory.getbasetemp() / "planted")


class Driver:
    """A process that forks attempts on one run."""

    def __init__(self, model: Path, run: RunFolder) -> None:
        self.run = run
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(model), str(run.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=REPOSITORY,
        )

    def start(self, deadly: str = "") -> int:
        """Begin an attempt; returns its process id."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{deadly}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def ended(self) -> int:
        """Wait for the attempt's exit code; a signal is negative."""
        assert self.process.stdout
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def driver(model: Path, tmp_path: Path) -> Iterator[Driver]:
    driver = Driver(model, new_run(tmp_path, model))
    yield driver
    driver.close()


def new_run(parent: Path, model: Path) -> RunFolder:
    run = rundir.create(parent / "runs", "planted", planned=pipeline.STAGE_NAMES)
    run.write_config(config.to_toml(planted.settings(model)))
    return run


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    """The result of a run that nothing disturbed, and the seconds it took."""
    driver = Driver(model, new_run(tmp_path_factory.mktemp("reference"), model))
    driver.start()
    started = time.monotonic()
    assert driver.ended() == 0
    seconds = time.monotonic() - started
    driver.close()
    return result_of(driver.run), seconds


@pytest.fixture
def reference(undisturbed: tuple[dict[str, Any], float]) -> dict[str, Any]:
    """The result of a run that nothing disturbed."""
    return undisturbed[0]


def result_of(run: RunFolder) -> dict[str, Any]:
    """Everything of a finished run that must not depend on when it was killed."""
    told = report.read(run.path)
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
    "while the base is measured": "Self-check",
    "while the direction is searched": "candidates ablated",
    "while tokens are voted": "prompts continued",
    "between two saved steps": '"what": "steps", "done": 3',
    "while the test split is answered": '"stage": "evaluate", "what": "answers"',
    "while weights are merged": "bytes merged",
}


def test_kills_at_six_chosen_points_change_nothing(driver: Driver, reference: dict[str, Any]) -> None:
    for point, deadly in CHOSEN.items():
        driver.start(deadly)
        assert driver.ended() == -signal.SIGKILL, point
    stages = [event["stage"] for event in planted.events_of(driver.run.path) if event["event"] == "StageStarted"]
    # Each kill fell into the stage it was meant for: that stage began again, and the ones before it did not.
    assert stages == [name for name in pipeline.STAGE_NAMES for _ in range(2)][:-1]
    driver.start()
    assert driver.ended() == 0
    events = planted.events_of(driver.run.path)
    assert any(event.get("message") == "Resumed after step 2 of 8." for event in events)
    assert result_of(driver.run) == reference


def test_kills_at_six_random_moments_change_nothing(driver: Driver, undisturbed: tuple[dict[str, Any], float]) -> None:
    reference, seconds = undisturbed
    chance = random.Random(20240607)
    killed = 0
    for _ in range(6):
        child = driver.start()
        time.sleep(seconds * chance.uniform(0.1, 0.4))
        # An attempt that has ended stays a zombie until the driver reads its code, or it is gone.
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        killed += driver.ended() == -signal.SIGKILL
    assert killed, "every attempt ended before it was killed, so this test says nothing"
    driver.start()
    assert driver.ended() == 0
    assert result_of(driver.run) == reference


def test_a_second_process_is_refused(driver: Driver, model: Path) -> None:
    child = driver.start()
    while not (driver.run.path / "01-baseline.tmp").exists():
        time.sleep(0.01)
    try:
        with pytest.raises(RunFolderError, match=rf"is in use by process {child}\.") as caught:
            attempt(model, driver.run.path)
        assert "Wait until it is done" in caught.value.hint
    finally:
        os.kill(child, signal.SIGKILL)
        driver.ended()


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


def test_one_interrupt_saves_the_step_and_resume_ends_the_same(
    model: Path, tmp_path: Path, reference: dict[str, Any]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(config.to_toml(planted.settings(model)), encoding="utf-8")
    runs = tmp_path / "runs"
    process = command("run", "--config", str(file), "--runs", str(runs), "--json", "--yes")
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
    [folder] = runs.iterdir()
    assert [path.name for path in (folder / "04-distill.partial").glob("step-*")] == [f"step-{int(stopped[1]):06d}"]
    resumed = command("resume", "--runs", str(runs), "--json")
    output, complaint = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, complaint
    assert f"Resumed after step {stopped[1]} of 8." in output
    assert [json.loads(line) for line in output.splitlines()][-1]["event"] == "Report"
    assert result_of(RunFolder(folder)) == reference


def test_two_runs_in_the_same_second_get_two_folders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: rundir.create(tmp_path, "same", planned=pipeline.STAGE_NAMES), range(16)))
    assert len({run.path for run in runs}) == 16
    assert {path.name for path in tmp_path.iterdir()} == {run.path.name for run in runs}

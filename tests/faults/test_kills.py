"""Runs and exports that are killed again and again, anywhere, end as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from safesteer_lite import config
from safesteer_lite.runs.durable import files_in
from safesteer_lite.runs.folder import RunFolder
from tests import planted
from tests.faults.endings import die_at_change, die_at_size
from tests.faults.program import call, check
from tests.stages.test_resume import result_of

pytestmark = [pytest.mark.faults, pytest.mark.skipif(os.name == "nt", reason="needs fork and SIGKILL")]

KILLS = 10
"""As many kills a run; it then may come to its end."""


NOTHING_TO_DO = "There is no unfinished run"
"""What `resume` says where the run came to its end before it could be killed, or was killed just after it."""


def settings_file(folder: Path, model: Path) -> str:
    (folder / "small.toml").write_text(config.to_toml(planted.settings(model)), encoding="utf-8")
    return "small.toml"


def go_on(folder: Path) -> list[str]:
    """The command that begins a run, or goes on with it where there is one."""
    runs = folder / "runs"
    begun = runs.is_dir() and any(not path.name.startswith(".") for path in runs.iterdir())
    return ["resume", "--json"] if begun else ["run", "--config", "small.toml", "--json"]


def the_only_run(folder: Path) -> RunFolder:
    """The run, beside which lies at most a draft, which the next new run clears away once it is old."""
    [run] = [path for path in (folder / "runs").iterdir() if not path.name.startswith(".")]
    return RunFolder(run)


@pytest.mark.parametrize("number", range(8))
def test_a_run_killed_at_changes_of_files(
    number: int, chance: random.Random, planted_model: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    settings_file(tmp_path, planted_model)
    ended: int | None = None
    for _ in range(KILLS):
        at = round(2 ** chance.uniform(0, 8))
        outcome = call(tmp_path, *go_on(tmp_path), before=(die_at_change, at))
        ended = outcome.code
        if ended != -signal.SIGKILL:
            break
    if ended != 0:
        outcome = call(tmp_path, *go_on(tmp_path))
    check(outcome)
    assert outcome.code == 0 or NOTHING_TO_DO in outcome.error, outcome.error
    assert result_of(the_only_run(tmp_path)) == undisturbed


@pytest.mark.parametrize("number", range(6))
def test_a_run_killed_in_the_middle_of_a_file(
    number: int, chance: random.Random, planted_model: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    settings_file(tmp_path, planted_model)
    for _ in range(4):
        size = round(2 ** chance.uniform(4, 20))
        outcome = call(tmp_path, *go_on(tmp_path), before=(die_at_size, size))
        assert outcome.code in (0, -signal.SIGXFSZ), outcome
    outcome = call(tmp_path, *go_on(tmp_path))
    check(outcome)
    assert outcome.code == 0 or NOTHING_TO_DO in outcome.error, outcome.error
    assert result_of(the_only_run(tmp_path)) == undisturbed


TIMED = {"artifacts.json", "README.md", "SHA256SUMS"}
"""Files of an export that tell the seconds which it took."""


@pytest.fixture(scope="session")
def exported(planted_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an export writes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(planted_run.path, folder / "runs" / "planted")
    outcome = call(folder, "export", "planted", "--out", "out", "--measure", "4")
    assert outcome.code == 0, outcome.error
    return contents(folder / "out")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files_in(folder)}


@pytest.mark.parametrize("number", range(6))
def test_an_export_killed_at_changes_of_files(
    number: int, chance: random.Random, planted_run: RunFolder, exported: dict[str, bytes], tmp_path: Path
) -> None:
    shutil.copytree(planted_run.path, tmp_path / "runs" / "planted")
    command = ["export", "planted", "--out", "out", "--measure", "4"]
    for _ in range(4):
        outcome = call(tmp_path, *command, before=(die_at_change, round(2 ** chance.uniform(0, 7))))
        if outcome.code != -signal.SIGKILL:
            break
    if outcome.code:
        outcome = call(tmp_path, *command)
    check(outcome)
    # Killed after the folder got its name, it is whole, and an export does not write over one.
    assert outcome.code == 0 or "out exists already" in outcome.error, outcome.error
    found = contents(tmp_path / "out")
    assert found.keys() == exported.keys()
    assert [name for name in found if found[name] != exported[name] and name not in TIMED] == []
    assert call(tmp_path, "verify", "out").code == 0
    left = {path.name for path in tmp_path.iterdir()} - {".in", ".out", ".err"}
    assert left == {"runs", "out"}

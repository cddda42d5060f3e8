"""A disk that becomes full at any moment: a sentence, and the same result once there is room."""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.endings import fill_at_change, refuse_beyond
from tests.faults.program import call, check
from tests.faults.test_kills import go_on, settings_file, the_only_run
from tests.stages.test_resume import result_of

pytestmark = [pytest.mark.faults, pytest.mark.skipif(os.name == "nt", reason="needs fork and limits of the system")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True)
    except OSError:
        pytest.skip("there is no mount")
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("number", range(10))
def test_a_disk_that_fills_up_during_a_run(
    number: int, chance: random.Random, planted_model: Path, undisturbed: dict[str, Any], small_disk: Path
) -> None:
    settings_file(small_disk, planted_model)
    # What is told goes to another disk, as to a terminal.
    for name in (".in", ".out", ".err"):
        (small_disk / name).symlink_to(small_disk.parent / name)
    filler = small_disk / "filler"
    for _ in range(3):
        at = round(2 ** chance.uniform(0, 8.5))
        outcome = call(small_disk, *go_on(small_disk), before=(fill_at_change, at, filler))
        check(outcome)
        if outcome.code == 0:
            break
        assert outcome.code == 1 and re.search("full|room", outcome.error), outcome.error
        filler.unlink()
    filler.unlink(missing_ok=True)
    if outcome.code:
        outcome = call(small_disk, *go_on(small_disk))
        check(outcome)
        assert outcome.code == 0, outcome.error
    assert result_of(the_only_run(small_disk)) == undisturbed


@pytest.mark.parametrize("number", range(6))
def test_a_system_that_refuses_large_files(
    number: int, chance: random.Random, planted_model: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    settings_file(tmp_path, planted_model)
    size = round(2 ** chance.uniform(6, 20))
    outcome = call(tmp_path, *go_on(tmp_path), before=(refuse_beyond, size))
    # What it says goes into a file too, which may be refused as well.
    assert outcome.code in (0, 1), outcome
    assert "Traceback" not in outcome.error, outcome.error
    if outcome.code:
        outcome = call(tmp_path, *go_on(tmp_path))
        check(outcome)
        assert outcome.code == 0, outcome.error
    assert result_of(the_only_run(tmp_path)) == undisturbed

"""The checkpoints of a stage in progress: exact files, whatever came before."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from safesteer_lite.runs.creation import create_run
from safesteer_lite.runs.folder import RunFolder
from tests.runs.run_files import files_of, publish, published_files, writer_of


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create_run(tmp_path / "runs", "tiny")


def test_checkpoints_are_found_pruned_and_replaced(run: RunFolder) -> None:
    checkpoints = run.checkpoint("distill", 4, "f")
    assert checkpoints.newest_checkpoint() is None
    for step in (5, 10, 1_000_000):
        assert checkpoints.save_checkpoint(step, writer_of(str(step))).name == f"step-{step:06d}"
    assert checkpoints.newest_checkpoint() == (1_000_000, run.path / "04-distill.partial" / "step-1000000")
    checkpoints.prune(keep=2)
    checkpoints.save_checkpoint(10, writer_of("again"))
    assert set(files_of(run.path / "04-distill.partial")) == {
        "fingerprint",
        "step-000010/adapter.bin",
        "step-000010/state.json",
        "step-000010/sums.json",
        "step-1000000/adapter.bin",
        "step-1000000/state.json",
        "step-1000000/sums.json",
    }
    assert (checkpoints.folder / "step-000010" / "state.json").read_text() == "again"
    checkpoints.prune(keep=0)
    assert checkpoints.newest_checkpoint() is None


def test_half_a_checkpoint_is_none(run: RunFolder) -> None:
    checkpoints = run.checkpoint("distill", 4, "f")
    checkpoints.save_checkpoint(5, writer_of("5"))

    def fail(folder: Path) -> None:
        (folder / "adapter.bin").touch()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        checkpoints.save_checkpoint(10, fail)
    # What a kill leaves behind looks like this.
    (checkpoints.folder / "step-000015.tmp").mkdir()
    (checkpoints.folder / "step-000002.old").mkdir()
    assert checkpoints.newest_checkpoint() == (5, checkpoints.folder / "step-000005")
    assert {path.name for path in checkpoints.folder.iterdir()} == {"fingerprint", "step-000005"}


def file_instead(step: Path) -> None:
    shutil.rmtree(step)
    step.touch()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit": lambda step: (step / "adapter.bin").write_bytes(b"3" + b"2" * 499),
    "cut": lambda step: (step / "state.json").write_bytes(b""),
    "a file gone": lambda step: (step / "state.json").unlink(),
    "a file more": lambda step: (step / "more").touch(),
    "no sums": lambda step: (step / "sums.json").unlink(),
    "sums that are none": lambda step: (step / "sums.json").write_text("[" * 100_000),
    "another step's name": lambda step: step.rename(step.with_name("step-000003")),
    "a file instead": file_instead,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_step_is_dropped_for_the_one_before(run: RunFolder, damage: str) -> None:
    told: list[str] = []
    checkpoints = run.checkpoint("distill", 4, "f", told.append)
    for step in (1, 2):
        checkpoints.save_checkpoint(step, writer_of(str(step)))
    assert checkpoints.newest_checkpoint() == (2, checkpoints.folder / "step-000002")
    DAMAGES[damage](checkpoints.folder / "step-000002")
    assert checkpoints.newest_checkpoint() == (1, checkpoints.folder / "step-000001")
    assert len(told) == 1 and re.match(r"The saved step [23] is damaged; training goes on from the one before", told[0])
    assert [path.name for path in checkpoints.folder.glob("step-*")] == ["step-000001"]
    DAMAGES["one bit"](checkpoints.folder / "step-000001")
    assert checkpoints.newest_checkpoint() is None
    assert len(told) == 2


def test_steps_whose_mark_is_damaged_are_told_of(run: RunFolder) -> None:
    told: list[str] = []
    checkpoints = run.checkpoint("distill", 4, "f", told.append)
    checkpoints.save_checkpoint(1, writer_of("1"))
    (checkpoints.folder / "fingerprint").write_bytes(b"\xff")
    assert checkpoints.newest_checkpoint() is None
    assert told == ["The saved steps do not belong to these settings, so training begins anew."]


@pytest.mark.parametrize("first_call", ["newest", "save"])
def test_checkpoints_of_other_settings_are_cleared(run: RunFolder, first_call: str) -> None:
    run.checkpoint("distill", 4, "old").save_checkpoint(5, writer_of("old"))
    checkpoints = run.checkpoint("distill", 4, "new")
    if first_call == "newest":
        assert checkpoints.newest_checkpoint() is None
    checkpoints.save_checkpoint(3, writer_of("new"))
    assert checkpoints.newest_checkpoint() == (3, checkpoints.folder / "step-000003")
    assert {path.name for path in checkpoints.folder.iterdir()} == {"fingerprint", "step-000003"}


def test_publishing_removes_the_checkpoints(run: RunFolder) -> None:
    run.checkpoint("distill", 4, "f").save_checkpoint(5, writer_of("5"))
    publish(run, "distill", 4, "f")
    assert files_of(run.path).keys() == {"config.toml", "manifest.json", *published_files("04-distill", "f")}

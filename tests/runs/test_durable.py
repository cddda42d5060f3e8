"""Full disks, folders that refuse, and kills at every moment: what is there is whole, or not there."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytest

from safesteer_lite.errors import DiskSpaceError, RunFolderError
from safesteer_lite.runs.folder import RunFolder, create, list_runs, open_run
from tests.runs.run_files import files_of, publish, published_files, writer_of

posix_only = pytest.mark.skipif(os.name == "nt", reason="needs fork, SIGKILL or /dev/full")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create(tmp_path / "runs", "tiny")


def fill_the_disk(_: Path) -> None:
    Path("/dev/full").write_text("x")


@posix_only
def test_a_full_disk_is_explained(run: RunFolder) -> None:
    with pytest.raises(DiskSpaceError, match="baseline stage") as caught, run.publish("baseline", 1, "x") as stage:
        fill_the_disk(stage.path)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert "Free some space" in caught.value.hint
    # The same for a checkpoint, and for the run folder's own files: their draft leads to a full device.
    with pytest.raises(DiskSpaceError, match="checkpoint of step 5"):
        run.checkpoint("distill", 4, "f").save_checkpoint(5, fill_the_disk)
    (run.path / "config.toml.tmp").symlink_to("/dev/full")
    with pytest.raises(DiskSpaceError, match="settings"):
        run.write_config("rate = 1\n")
    (run.path / "manifest.json.tmp").symlink_to("/dev/full")
    with pytest.raises(DiskSpaceError, match="baseline stage"):
        publish(run, "baseline", 1, "x")
    assert not run.is_done("baseline", "x")


def test_a_folder_that_cannot_be_made_is_explained(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="new run folder") as caught:
        create(tmp_path / "file", "x")
    assert caught.value.hint
    with pytest.raises(RunFolderError, match="list of runs"):
        list_runs(tmp_path / "file")
    (run.path / "run.pid").mkdir()
    with pytest.raises(RunFolderError, match="the lock of"), run.lock():
        pass


FINAL_FILES = {
    **published_files("01-baseline", "b"),
    **published_files("03-tokens", "c"),
    **published_files("04-distill", "d"),
}


def play(run: RunFolder) -> None:
    """A short life of a run: stages, one of them redone with other settings, checkpoints of old and new settings."""
    with run.lock():
        publish(run, "baseline", 1, "a")
        publish(run, "tokens", 3, "c")
        run.checkpoint("distill", 4, "old").save_checkpoint(9, writer_of("9"))
        publish(run, "baseline", 1, "b")
        checkpoints = run.checkpoint("distill", 4, "d")
        for step in (1, 2, 2):
            checkpoints.save_checkpoint(step, writer_of(str(step)))
            checkpoints.prune(keep=1)
        publish(run, "distill", 4, "d")


def check_after_kill(parent: Path) -> None:
    """Whatever is there opens and is whole, and playing on from there leaves exactly the files that belong."""
    summaries = list_runs(parent)
    assert not any(summary.damage for summary in summaries)
    run = open_run(summaries[0].path) if summaries else create(parent, "again")
    for stage, record in run.manifest.stages.items():
        assert run.verify(stage) == []
        assert record.result == {"mark": record.fingerprint}
        assert run.is_done(stage, record.fingerprint)
    if (run.path / "04-distill.partial" / "fingerprint").exists():
        mark = (run.path / "04-distill.partial" / "fingerprint").read_text()
        newest = run.checkpoint("distill", 4, mark).newest_checkpoint()
        if newest is not None:
            assert files_of(newest[1]) == {
                "adapter.bin": str(newest[0]).encode() * 500,
                "state.json": str(newest[0]).encode(),
            }
    play(run)
    files = files_of(run.path)
    assert files.pop("manifest.json")
    assert files == FINAL_FILES
    assert all(run.verify(stage) == [] for stage in ("baseline", "tokens", "distill"))


def kill_at_call(number: int) -> None:
    """Arrange that this process is killed at the `number`-th moment: just before a call that flushes or changes a
    file, or just after one that opens a file for writing, when the file is there and empty.
    """
    calls = itertools.count(1)
    opening = False

    def count(*_: object) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal opening
        if event == "open":
            opening = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if (event == "open" and opening) or event in {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}:
            count()

    def watch_returns(_: FrameType | None, event: str, function: Any) -> None:
        if opening and event == "c_return" and function.__name__ == "open":
            count()

    sys.addaudithook(watch)
    sys.setprofile(watch_returns)
    skip_flushing(count)


def skip_flushing(instead: Callable[..., None]) -> None:
    """Flushing guards against power cuts, which no test can make; hundreds of real ones would take minutes."""
    setattr(os, "fsync", instead)  # noqa: B010


def play_with_kills(folder: Path) -> NoReturn:
    """Play in child processes, the n-th of them killed before its n-th call, until one comes to the end."""
    for number in itertools.count(1):
        parent = folder / f"{number:04d}"
        child = os.fork()
        if child == 0:
            kill_at_call(number)
            play(create(parent, "killed"))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            (folder / "kills").write_text(str(number - 1))
            sys.exit(0)
        assert status == -signal.SIGKILL
        skip_flushing(lambda _: None)
        check_after_kill(parent)
    raise AssertionError


@posix_only
def test_a_kill_at_any_call_leaves_a_run_that_opens_and_can_be_redone() -> None:
    # In memory where there is such a folder: a disk's journal makes these thousands of renames slow.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        # A fresh process forks the children, since this one may have threads by now.
        driver = multiprocessing.get_context("spawn").Process(target=play_with_kills, args=(Path(folder),))
        driver.start()
        driver.join(timeout=120)
        assert driver.exitcode == 0
        assert int((Path(folder) / "kills").read_text()) > 100


def play_forever(folder: Path) -> NoReturn:
    run = create(folder, "killed")
    (folder / ".ready").touch()
    while True:
        play(run)


@posix_only
def test_a_kill_at_a_random_moment_leaves_a_run_that_opens_and_can_be_redone(tmp_path: Path) -> None:
    delays = random.Random(20)
    for number in range(6):
        folder = tmp_path / str(number)
        folder.mkdir()
        child = multiprocessing.get_context("spawn").Process(target=play_forever, args=(folder,))
        child.start()
        while not (folder / ".ready").exists():
            assert child.is_alive()
            time.sleep(0.005)
        time.sleep(delays.uniform(0.0, 0.3))
        child.kill()
        child.join(timeout=60)
        assert child.exitcode == -signal.SIGKILL
        check_after_kill(folder)

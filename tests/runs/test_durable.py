"""Full disks, folders that refuse, and kills at every moment: what is there is whole, or not there."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytest
from safetensors import SafetensorError

from safesteer_lite.errors import DiskSpaceError, RunFolderError
from safesteer_lite.runs import durable
from safesteer_lite.runs.creation import create_run
from safesteer_lite.runs.folder import RunFolder, open_run
from safesteer_lite.runs.listing import list_runs
from tests import REPOSITORY
from tests.runs.run_files import files_of, publish, published_files, writer_of

posix_only = pytest.mark.skipif(os.name == "nt", reason="needs fork, SIGKILL or /dev/full")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create_run(tmp_path / "runs", "tiny")


def fill_the_disk(_: Path) -> None:
    Path("/dev/full").write_text("x")


@posix_only
def test_a_full_disk_is_explained(run: RunFolder) -> None:
    with pytest.raises(DiskSpaceError, match="baseline stage") as caught, run.publish("baseline", 1, "x") as stage:
        fill_the_disk(stage.path)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert "Free some space" in caught.value.hint
    with pytest.raises(DiskSpaceError, match="checkpoint of step 5"):
        run.checkpoint("distill", 4, "f").save_checkpoint(5, fill_the_disk)


def test_an_error_of_safetensors_is_explained_as_the_systems() -> None:
    """The library raises errors of its own, and quotes what the system said."""
    for said, expected, words in (
        ("Error while serializing: I/O error: No space left on device (os error 28)", DiskSpaceError, "disk is full"),
        ('Error: IoError(Os { code: 28, kind: StorageFull, message: "No space" })', DiskSpaceError, "disk is full"),
        ("Error while serializing: I/O error: Permission denied (os error 13)", RunFolderError, "No permission"),
        ("Error while deserializing header: invalid header", RunFolderError, "invalid header"),
    ):
        with pytest.raises(expected, match=words), durable.explained("the adapter"):
            raise SafetensorError(said)


@posix_only
def test_what_safetensors_cannot_write_is_explained(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk, which needs a file system of its own."""
    script = """if True:
        import resource, signal, sys
        from pathlib import Path
        import torch
        from safetensors.torch import save_file
        from safesteer_lite.errors import RunFolderError
        from safesteer_lite.runs.durable import explained
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            with explained("the adapter"):
                save_file({"a": torch.zeros(1000)}, Path(sys.argv[1]) / "x.safetensors")
        except RunFolderError as error:
            sys.exit(error.message)
    """
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stderr.strip() == "The file system refused the adapter ([Errno 27] File too large)."


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is damaged: Expecting value"),
        (b"[]", "it holds no JSON object"),
        (b'{"a": NaN}', "it holds NaN"),
        (b'{"a": -Infinity}', "it holds -Infinity"),
        (b'{"a": 1e999}', "it holds 1e999"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "it has the key 'c' twice"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "it is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is damaged: Exceeds the limit"),
        (b'{"a": "\xff"}', "is damaged: 'utf-8' codec"),
        (b'{"a": "' + b"x" * 1000 + b'"}', "it has 1,009 bytes, more than the 1,000 that are read"),
    ],
)
def test_damaged_json_is_one_error_that_names_the_file(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "history.json"
    path.write_bytes(content)
    with pytest.raises(RunFolderError) as caught:
        durable.read_json(path, "the history", hint="Train again.", largest=1000 if b"xxx" in content else 1 << 20)
    assert caught.value.message.startswith(f"{path}, the history, ") and words in caught.value.message
    assert caught.value.hint == "Train again."


def test_json_comes_back_as_it_was_written(tmp_path: Path) -> None:
    value = {"words": "\u2028 \x1b \udcff é", "numbers": [1, 2.5, -0.0], "nothing": None}
    durable.write_json(tmp_path / "a.json", value)
    assert durable.read_json(tmp_path / "a.json", "a file") == value
    # What an editor put before it is no damage.
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.json").read_bytes())
    assert durable.read_json(tmp_path / "a.json", "a file") == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        durable.write_json(tmp_path / "a.json", {"a": float("nan")})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@posix_only
def test_a_pipe_or_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "missing"):
        with pytest.raises(RunFolderError, match=name):
            durable.read_json(tmp_path / name, "the history")
        with pytest.raises(OSError, match=name):
            durable.sha256_of(tmp_path / name)


@posix_only
def test_a_link_in_the_way_of_a_draft_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "a.json.tmp").symlink_to(tmp_path / "precious")
    durable.write_json(tmp_path / "a.json", {})
    assert (tmp_path / "precious").read_text() == "mine"
    assert durable.read_json(tmp_path / "a.json", "a file") == {}


def test_room_is_told_with_what_is_needed_and_free(tmp_path: Path) -> None:
    durable.require_space(tmp_path / "new" / "folder", 1, "the report")
    needed = durable.free_space(tmp_path) + 5 * 10**9
    with pytest.raises(DiskSpaceError) as error:
        durable.require_space(tmp_path / "new", needed, "the merged model")
    assert f"room for the merged model: {needed / 1e9:.2f} GB needed" in error.value.message
    assert re.search(r"Free [45]\.\d\d GB there", error.value.hint)


def test_a_folder_that_cannot_be_made_is_explained(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="new run folder") as caught:
        create_run(tmp_path / "file", "x")
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
    run = open_run(summaries[0].path) if summaries else create_run(parent, "again", "rate = 1\n")
    assert run.settings() == "rate = 1\n"
    for stage, record in run.manifest.stages.items():
        assert run.verify(stage) == []
        assert record.result == {"mark": record.fingerprint}
        assert run.is_done(stage, record.fingerprint)
    if (run.path / "04-distill.partial" / "fingerprint").exists():
        mark = (run.path / "04-distill.partial" / "fingerprint").read_text()
        newest = run.checkpoint("distill", 4, mark).newest_checkpoint()
        if newest is not None:
            saved = files_of(newest[1])
            assert saved.pop("sums.json")
            assert saved == {"adapter.bin": str(newest[0]).encode() * 500, "state.json": str(newest[0]).encode()}
    play(run)
    files = files_of(run.path)
    assert files.pop("manifest.json")
    assert files.pop("config.toml") == b"rate = 1\n"
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
            play(create_run(parent, "killed", "rate = 1\n"))
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
        driver.join(timeout=600)
        assert driver.exitcode == 0
        assert int((Path(folder) / "kills").read_text()) > 100


def play_forever(folder: Path) -> NoReturn:
    run = create_run(folder, "killed", "rate = 1\n")
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

"""The run folder: exact files, fingerprints, locks, and kills at every moment."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
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

from safesteer_lite.errors import DiskSpaceError, RunFolderError
from safesteer_lite.rundir import RunFolder, create, fingerprint, list_runs, open_run

REPOSITORY = Path(__file__).parents[1]
posix_only = pytest.mark.skipif(os.name == "nt", reason="needs fork, SIGKILL or /dev/full")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create(tmp_path / "runs", "tiny")


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file but the lock's own, by its path inside `folder`."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def publish(run: RunFolder, stage: str, number: int, mark: str) -> None:
    with run.publish(stage, number, mark) as publication:
        (publication.path / "sub").mkdir()
        (publication.path / "a.bin").write_bytes(mark.encode() * 1000)
        (publication.path / "sub" / "b.txt").write_bytes(mark.encode())
        publication.result["mark"] = mark


def published_files(folder: str, mark: str) -> dict[str, bytes]:
    return {f"{folder}/a.bin": mark.encode() * 1000, f"{folder}/sub/b.txt": mark.encode()}


def writer_of(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "adapter.bin").write_bytes(text.encode() * 500)
        (folder / "state.json").write_text(text)

    return write


def test_create_names_the_folder_after_the_label_and_the_time(tmp_path: Path) -> None:
    run = create(tmp_path / "runs", "Qwen/Qwen2.5 Coder: 0.5B", versions={"torch": "2.13"})
    assert re.fullmatch(r"Qwen-Qwen2\.5-Coder-0\.5B-\d{8}-\d{6}", run.path.name)
    assert set(files_of(tmp_path)) == {f"runs/{run.path.name}/manifest.json"}
    document = json.loads((run.path / "manifest.json").read_text())
    assert document["schema"] == 1
    assert document["versions"] == {"torch": "2.13"}
    assert document["stages"] == {}
    assert create(tmp_path / "runs", "../..").path.name.startswith("run-")


def test_processes_that_create_runs_in_the_same_second_never_share_one(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from safesteer_lite.rundir import create\n"
        "for _ in range(10): print(create(Path(sys.argv[1]), 'same').path.name)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    children = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    names = [name for child in children for name in child.communicate(timeout=60)[0].split()]
    assert len(names) == len(set(names)) == 30
    assert any(re.fullmatch(r"same-\d{8}-\d{6}-2", name) for name in names)
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    assert sorted(summary.name for summary in list_runs(tmp_path)) == sorted(names)


def test_open_run_takes_a_path_or_a_bare_name(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_run(run.path) == run
    assert open_run(run.path.name, run.path.parent) == run
    monkeypatch.chdir(run.path.parents[1])
    assert open_run(run.path.name).path == Path("runs") / run.path.name
    # A file or folder of the same name elsewhere does not hide the run.
    Path(run.path.name).mkdir()
    assert open_run(run.path.name).path == Path("runs") / run.path.name


def test_open_run_refuses_what_is_no_run(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="does not exist") as caught:
        open_run("nothing", tmp_path)
    assert "safesteer-lite runs" in caught.value.hint
    with pytest.raises(RunFolderError, match="not a run folder"):
        open_run(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"schema": 2}',
        b"[" * 100_000,
        b'{"schema": 1, "created": "x", "versions": {}, "planned": [], "stages": {"a": 3}}',
        b'{"schema": 1, "created": "x", "versions": {}, "planned": [], "stages": {"a": {"fingerprint": "f", '
        b'"folder": "../..", "seconds": 1, "artifacts": {}, "result": {}}}}',
    ],
)
def test_a_damaged_manifest_is_an_error_for_open_and_a_line_for_list(run: RunFolder, content: bytes) -> None:
    (run.path / "manifest.json").write_bytes(content)
    with pytest.raises(RunFolderError):
        open_run(run.path)
    (summary,) = list_runs(run.path.parent)
    assert (summary.name, summary.stages, summary.finished) == (run.path.name, (), False)
    assert summary.damage


def test_list_runs_tells_what_is_done(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "none") == []
    first = create(tmp_path, "first", planned=["baseline", "export"])
    publish(first, "baseline", 1, "x")
    time.sleep(0.002)
    second = create(tmp_path, "second", planned=["baseline"])
    publish(second, "baseline", 1, "x")
    (tmp_path / "notes").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "file.txt").touch()
    newest, older, notes = list_runs(tmp_path)
    assert (newest.name, newest.stages, newest.finished) == (second.path.name, ("baseline",), True)
    assert (older.name, older.stages, older.finished) == (first.path.name, ("baseline",), False)
    assert (notes.name, bool(notes.damage), newest.damage, older.damage) == ("notes", True, "", "")
    # A stage whose files are gone is not done, whatever the manifest says.
    (second.path / "01-baseline" / "a.bin").unlink()
    assert (list_runs(tmp_path)[0].stages, list_runs(tmp_path)[0].finished) == ((), False)


def test_the_settings_are_written_once(run: RunFolder) -> None:
    run.write_config("rate = 1\n")
    run.write_config("rate = 1\n")
    with pytest.raises(RunFolderError, match="other settings"):
        run.write_config("rate = 2\n")
    assert run.config_path.read_bytes() == b"rate = 1\n"
    assert set(files_of(run.path)) == {"manifest.json", "config.toml"}


def test_a_fingerprint_is_the_hash_of_canonical_json() -> None:
    # Written out by hand, so that a change of the canonical form, which would redo every user's runs, is noticed.
    expected = hashlib.sha256(b'{"parts":{"a":[1,2.5,null],"b":{"x":"\\u00e9","y":true}},"schema":1}').hexdigest()
    assert fingerprint({"b": {"y": True, "x": "é"}, "a": [1, 2.5, None]}) == expected
    assert fingerprint({"a": (1, 2.5, None), "b": {"x": "é", "y": True}}) == expected
    assert fingerprint({"a": [1, 2.5, None], "b": {"x": "e", "y": True}}) != expected
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint({"a": float("nan")})
    with pytest.raises(TypeError):
        fingerprint({"a": Path("x")})  # type: ignore[dict-item]


def test_a_published_stage_is_whole_and_recorded(run: RunFolder) -> None:
    publish(run, "baseline", 1, "x")
    assert files_of(run.path).keys() == {"manifest.json", *published_files("01-baseline", "x")}
    record = json.loads((run.path / "manifest.json").read_text())["stages"]["baseline"]
    assert (record["fingerprint"], record["folder"], record["result"]) == ("x", "01-baseline", {"mark": "x"})
    assert 0 <= record["seconds"] < 30
    assert record["artifacts"] == {
        "a.bin": {"size": 1000, "sha256": hashlib.sha256(b"x" * 1000).hexdigest()},
        "sub/b.txt": {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()},
    }
    assert run.stage_folder("baseline") == run.path / "01-baseline"
    assert run.manifest.stages["baseline"].result == {"mark": "x"}
    assert (run.is_done("baseline", "x"), run.is_done("baseline", "y"), run.is_done("tokens", "x")) == (
        True,
        False,
        False,
    )
    assert run.verify("baseline") == []
    with pytest.raises(RunFolderError, match="no result of the tokens stage"):
        run.verify("tokens")


def test_sizes_are_always_checked_and_contents_by_verify(run: RunFolder) -> None:
    publish(run, "baseline", 1, "x")
    (run.path / "01-baseline" / "a.bin").write_bytes(b"y" * 1000)
    assert run.is_done("baseline", "x")
    assert run.verify("baseline") == ["a.bin"]
    (run.path / "01-baseline" / "a.bin").write_bytes(b"x" * 999)
    assert not run.is_done("baseline", "x")
    (run.path / "01-baseline" / "a.bin").write_bytes(b"x" * 1000)
    (run.path / "01-baseline" / "sub" / "b.txt").unlink()
    assert not run.is_done("baseline", "x")
    assert run.verify("baseline") == ["sub/b.txt"]


def test_publishing_again_replaces_the_stage_and_no_other(run: RunFolder) -> None:
    publish(run, "baseline", 1, "x")
    publish(run, "tokens", 3, "t")
    (run.path / "01-baseline.tmp").mkdir()
    (run.path / "01-baseline.tmp" / "left-over").touch()
    with run.publish("baseline", 1, "y") as publication:
        (publication.path / "only").write_bytes(b"new")
        publication.seconds = 12.5
    files = files_of(run.path)
    del files["manifest.json"]
    assert files == {"01-baseline/only": b"new", **published_files("03-tokens", "t")}
    assert run.manifest.stages["baseline"].seconds == 12.5
    assert run.is_done("baseline", "y")
    assert run.is_done("tokens", "t")


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), ConnectionResetError("download")])
def test_a_stage_that_fails_publishes_nothing_and_keeps_the_old_result(run: RunFolder, error: BaseException) -> None:
    publish(run, "baseline", 1, "x")
    before = files_of(run.path)
    for stage, number in [("baseline", 1), ("tokens", 3)]:
        with pytest.raises(type(error)) as caught, run.publish(stage, number, "y") as publication:
            (publication.path / "half").touch()
            raise error
        assert caught.value is error
    assert files_of(run.path) == before
    assert [path.name for path in run.path.iterdir() if path.is_dir()] == ["01-baseline"]


@pytest.mark.parametrize("value", [float("nan"), Path("x")])
def test_a_result_that_is_not_json_publishes_nothing(run: RunFolder, value: object) -> None:
    publish(run, "baseline", 1, "x")
    before = files_of(run.path)
    with pytest.raises((TypeError, ValueError)), run.publish("baseline", 1, "y") as publication:
        publication.result["kl"] = value
    assert files_of(run.path) == before


@pytest.mark.parametrize("stage", ["../up", "Upper", "a.b", ""])
def test_a_stage_name_cannot_leave_the_folder(run: RunFolder, stage: str) -> None:
    with pytest.raises(ValueError, match="no name for a stage"), run.publish(stage, 1, "x"):
        pass


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
        "step-1000000/adapter.bin",
        "step-1000000/state.json",
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
    assert files_of(run.path).keys() == {"manifest.json", *published_files("04-distill", "f")}


def test_a_second_process_is_refused_with_the_pid_of_the_first(run: RunFolder) -> None:
    code = (
        "import sys; from safesteer_lite.rundir import open_run\n"
        "with open_run(sys.argv[1]).lock(): print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(run.path)]
    child = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "locked\n"
    with pytest.raises(RunFolderError, match=rf"in use by process {child.pid}\."), run.lock():
        pass
    # A holder that was killed does not lock the run for good, though its process id is still in the side file.
    child.kill()
    child.communicate(timeout=60)
    assert (run.path / "run.pid").read_text() == str(child.pid)
    with run.lock():
        assert (run.path / "run.pid").read_text() == str(os.getpid())
        with pytest.raises(RunFolderError, match=f"process {os.getpid()}"), run.lock():
            pass
    assert files_of(run.path).keys() == {"manifest.json"}


def test_the_lock_clears_what_a_killed_process_left_and_nothing_else(run: RunFolder) -> None:
    publish(run, "baseline", 1, "x")
    run.checkpoint("tokens", 3, "t").save_checkpoint(1, writer_of("1"))
    run.checkpoint("baseline", 1, "x").save_checkpoint(1, writer_of("1"))
    for name in ("01-baseline.tmp", "02-direction.old", "04-distill.partial.old", "notes.tmp", "my.old"):
        (run.path / name).mkdir()
    with run.lock():
        names = {path.name for path in run.path.iterdir() if path.is_dir()}
    assert names == {"01-baseline", "03-tokens.partial", "notes.tmp", "my.old"}


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

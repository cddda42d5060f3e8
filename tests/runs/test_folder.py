"""The run folder: exact files, stages that replace each other, locks."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path

import pytest

from safesteer_lite.errors import RunFolderError
from safesteer_lite.runs.creation import create_run
from safesteer_lite.runs.folder import RunFolder, open_run
from safesteer_lite.runs.listing import list_runs
from tests import REPOSITORY
from tests.runs.run_files import files_of, publish, published_files, writer_of


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create_run(tmp_path / "runs", "tiny")


def test_create_names_the_folder_after_the_label_and_the_time(tmp_path: Path) -> None:
    run = create_run(tmp_path / "runs", "Qwen/Qwen2.5 Coder: 0.5B", versions={"torch": "2.13"})
    assert re.fullmatch(r"Qwen-Qwen2\.5-Coder-0\.5B-\d{8}-\d{6}", run.path.name)
    assert set(files_of(tmp_path / "runs" / run.path.name)) == {"config.toml", "manifest.json"}
    document = json.loads((run.path / "manifest.json").read_text())
    assert document["run_date"] == datetime.now().date().isoformat()
    assert document["schema"] == 1
    assert document["versions"] == {"torch": "2.13"}
    assert document["stages"] == {}
    assert create_run(tmp_path / "runs", "../..").path.name.startswith("run-")


def test_processes_that_create_runs_in_the_same_second_never_share_one(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from safesteer_lite.runs.creation import create_run\n"
        "for _ in range(10): print(create_run(Path(sys.argv[1]), 'same').path.name)"
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


def test_list_runs_tells_what_is_done(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "none") == []
    first = create_run(tmp_path, "first", planned=["baseline", "export"])
    publish(first, "baseline", 1, "x")
    time.sleep(0.002)
    second = create_run(tmp_path, "second", planned=["baseline"])
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


@pytest.mark.parametrize("text", ["", "rate = ", "rate = 1\r\n", "rate = 2\n", "rate = 1\n\n", "rate = 1\n\xff"])
def test_settings_that_were_changed_or_cut_are_refused(tmp_path: Path, text: str) -> None:
    run = create_run(tmp_path, "tiny", "rate = 1\n")
    assert run.settings() == "rate = 1\n"
    run.config_path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RunFolderError, match=r"config\.toml was changed since the run was started") as caught:
        run.settings()
    assert "Put the original back" in caught.value.hint
    # It is not offered to be resumed either.
    assert "config.toml was changed" in list_runs(tmp_path)[0].damage


def test_lost_settings_are_named(tmp_path: Path) -> None:
    run = create_run(tmp_path, "tiny", "rate = 1\n")
    run.config_path.unlink()
    with pytest.raises(RunFolderError, match=r"config\.toml, the settings of this run, is missing"):
        run.settings()
    assert "is missing" in list_runs(tmp_path)[0].damage


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights")
def test_a_run_is_its_owners_alone(run: RunFolder) -> None:
    before = os.umask(0)
    try:
        assert create_run(run.path.parent, "open").path.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


def test_what_a_killed_process_left_of_a_new_run_is_swept(tmp_path: Path) -> None:
    old, young = tmp_path / ("." + "0123abcd" * 4), tmp_path / ("." + "4567abcd" * 4)
    for draft in (old, young, tmp_path / ".mine"):
        draft.mkdir()
        (draft / "config.toml.tmp").write_text("rate")
    for draft in (old, tmp_path / ".mine"):
        os.utime(draft, (0, 0))
    run = create_run(tmp_path, "tiny")
    # The young one may be another process's, about to get its name.
    assert {path.name for path in tmp_path.iterdir()} == {run.path.name, ".mine", young.name}


def test_a_published_stage_is_whole_and_recorded(run: RunFolder) -> None:
    publish(run, "baseline", 1, "x")
    assert files_of(run.path).keys() == {"config.toml", "manifest.json", *published_files("01-baseline", "x")}
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


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit": lambda path: path.write_bytes(b"y" + path.read_bytes()[1:]),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "renamed": lambda path: path.rename(path.with_name("other")),
    "a folder": folder_instead,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_as_it_was_published_is_never_read(run: RunFolder, damage: str) -> None:
    publish(run, "baseline", 1, "x")
    assert run.read("baseline", "sub/b.txt") == b"x"
    assert run.folder("baseline", "sub") == run.path / "01-baseline" / "sub"
    DAMAGES[damage](run.path / "01-baseline" / "sub" / "b.txt")
    for read in (lambda: run.read("baseline", "sub/b.txt"), lambda: run.folder("baseline", "sub")):
        with pytest.raises(RunFolderError, match=r"b\.txt is missing or not what the run wrote there") as caught:
            read()
        assert f"safesteer-lite resume {run.path.name}" in caught.value.hint
    assert run.verify("baseline") == ["sub/b.txt"]
    assert not run.is_done("baseline", "x")
    # The rest is still good.
    assert run.read("baseline", "a.bin") == b"x" * 1000
    for unknown in ("c", "../manifest.json", ""):
        with pytest.raises(RunFolderError, match="is missing or not what"):
            run.read("baseline", unknown)


@pytest.mark.skipif(os.name == "nt", reason="needs links and pipes")
def test_a_run_writes_inside_its_own_folder_only(run: RunFolder, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    for name in ("01-baseline", "run.pid", "manifest.json.tmp", "01-baseline.tmp", "01-baseline.old"):
        (run.path / name).symlink_to(precious)
        with run.lock() if name != "01-baseline.tmp" else nullcontext():
            publish(run, "baseline", 1, "x")
        assert run.verify("baseline") == []
    for name in ("events.jsonl", "run.lock", "04-distill.partial", "04-distill.tmp"):
        path = run.path / name
        path.unlink(missing_ok=True)
        path.symlink_to(precious / "new")
        with pytest.raises(RunFolderError, match=f"{name} is a link"), run.lock():
            pass
        path.unlink()
    for make in (os.mkfifo, os.mkdir):
        make(run.events_path)
        with pytest.raises(RunFolderError, match=r"events\.jsonl is no file"), run.lock():
            pass
        run.events_path.unlink() if run.events_path.is_fifo() else run.events_path.rmdir()
    # Whoever moved a stage's folder to another disk reads it through the link.
    (run.path / "01-baseline").rename(tmp_path / "moved")
    (run.path / "01-baseline").symlink_to(tmp_path / "moved")
    with run.lock():
        assert run.read("baseline", "sub/b.txt") == b"x"
    os.mkfifo(tmp_path / "pipe")
    (run.path / "01-baseline" / "a.bin").unlink()
    (run.path / "01-baseline" / "a.bin").symlink_to(tmp_path / "pipe")
    with pytest.raises(RunFolderError, match=r"a\.bin is missing"):
        run.read("baseline", "a.bin")
    assert run.verify("baseline") == ["a.bin"]
    assert {path.name: path.read_text() for path in precious.iterdir()} == {"file": "mine"}


def test_publishing_again_replaces_the_stage_and_no_other(run: RunFolder) -> None:
    publish(run, "baseline", 1, "x")
    publish(run, "tokens", 3, "t")
    (run.path / "01-baseline.tmp").mkdir()
    (run.path / "01-baseline.tmp" / "left-over").touch()
    with run.publish("baseline", 1, "y") as publication:
        (publication.path / "only").write_bytes(b"new")
        publication.seconds = 12.5
    files = files_of(run.path)
    del files["manifest.json"], files["config.toml"]
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


@pytest.mark.parametrize("stage", ["../up", "Upper", "a.b", ""])
def test_a_stage_name_cannot_leave_the_folder(run: RunFolder, stage: str) -> None:
    with pytest.raises(ValueError, match="no name for a stage"), run.publish(stage, 1, "x"):
        pass


def test_a_second_process_is_refused_with_the_pid_of_the_first(run: RunFolder) -> None:
    code = (
        "import sys; from safesteer_lite.runs.folder import open_run\n"
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
    assert files_of(run.path).keys() == {"config.toml", "manifest.json"}


def test_the_lock_clears_what_a_killed_process_left_and_nothing_else(run: RunFolder) -> None:
    publish(run, "baseline", 1, "x")
    run.checkpoint("tokens", 3, "t").save_checkpoint(1, writer_of("1"))
    # Merged weights that a killed export would have gone on from have no mark.
    (run.path / "01-baseline.partial" / "merged").mkdir(parents=True)
    for name in ("01-baseline.tmp", "02-direction.old", "04-distill.partial.old", "notes.tmp", "my.old"):
        (run.path / name).mkdir()
    with run.lock():
        names = {path.name for path in run.path.iterdir() if path.is_dir()}
    assert names == {"01-baseline", "03-tokens.partial", "notes.tmp", "my.old"}

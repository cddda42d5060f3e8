"""The run folder: where one run keeps its settings, its events and the published result of every stage.

A result is written under a temporary name, flushed to the disk, renamed, and only then entered in the manifest. The
manifest therefore never names a result that is not whole, whenever the process was killed. It does not know which
stages there are: their names come from the caller, and a result counts for as long as its fingerprint is asked for.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from filelock import FileLock, Timeout

from safesteer_lite.errors import DiskSpaceError, RunFolderError, SafeSteerError

SCHEMA_VERSION = 1
RUNS_FOLDER = Path("runs")

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

_STAGE_FOLDER = re.compile(r"\d{2}-[a-z][a-z0-9_-]*")
_STEP_FOLDER = re.compile(r"step-(\d{6,})")
_LEFTOVER = re.compile(rf"(?:{_STAGE_FOLDER.pattern}(?:\.partial)?|{_STEP_FOLDER.pattern})\.(?:tmp|old)")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY}


@dataclass(frozen=True)
class Artifact:
    """One published file: its size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class StageRecord:
    """What the manifest holds on a published stage.

    Args:
        fingerprint: what the result depends on, see `fingerprint`.
        folder: name of the stage's folder inside the run folder.
        seconds: how long the stage took.
        artifacts: every file of the stage, by its path (with forward slashes) inside the stage's folder.
        result: a few JSON values that later stages and the report need.
    """

    fingerprint: str
    folder: str
    seconds: float
    artifacts: dict[str, Artifact]
    result: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """The run's table of contents.

    Args:
        created: ISO 8601 time in UTC.
        versions: package versions at the start of the run, by package.
        planned: the stages that make the run finished; empty if the caller named none.
        stages: the published stages, by name, in the order in which they were published.
    """

    created: str
    versions: dict[str, str]
    planned: tuple[str, ...]
    stages: dict[str, StageRecord]


@dataclass
class Publication:
    """A stage about to be published: write the files under `path`, and set `result` before the block ends.

    Args:
        path: the folder to write in.
        result: JSON values for the manifest.
        seconds: how long the stage took; left at None, it is the time that the block took.
    """

    path: Path
    result: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True)
class RunSummary:
    """One line of the list of runs; `damage` says what is wrong with a folder that cannot be read, else it is empty."""

    name: str
    path: Path
    created: str
    stages: tuple[str, ...]
    finished: bool
    damage: str = ""


def fingerprint(parts: Mapping[str, Json]) -> str:
    """Hash everything that a stage's result depends on: its settings and the fingerprints of the stages before it.

    Args:
        parts: JSON values; the order of keys does not matter.

    Returns:
        SHA-256 in hexadecimal of the canonical JSON of `parts` and the schema version.

    Raises:
        TypeError: a value is not JSON.
        ValueError: a number is not finite.
    """
    document = {"schema": SCHEMA_VERSION, "parts": parts}
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def create(
    parent: Path, label: str, *, planned: Sequence[str] = (), versions: Mapping[str, str] | None = None
) -> RunFolder:
    """Make a new run folder, which no other process gets too.

    Args:
        parent: the folder of all runs, `RUNS_FOLDER` unless the user chose another; it is made if missing.
        label: the start of the folder's name, usually the model's; what file systems dislike becomes a hyphen.
        planned: the stages whose results make the run finished.
        versions: package versions to keep in the manifest.

    Raises:
        RunFolderError: the folder cannot be written.
        DiskSpaceError: the disk is full.
    """
    slug = re.sub(r"[^A-Za-z0-9._]+", "-", label).strip("-.")[:60] or "run"
    stem = f"{slug}-{datetime.now():%Y%m%d-%H%M%S}"
    created = datetime.now(UTC).isoformat(timespec="milliseconds")
    manifest = Manifest(created, dict(versions or {}), tuple(planned), {})
    # The folder gets its name only when its manifest is inside, so a kill never leaves a run that cannot be opened.
    # Renaming onto a folder that is not empty fails, which makes the name exclusive.
    draft = parent / f".{uuid.uuid4().hex}"
    with _explained(f"a new run folder in {parent}"):
        try:
            draft.mkdir(parents=True)
            _write_atomically(draft / "manifest.json", _manifest_bytes(manifest))
            for attempt in itertools.count(1):
                path = parent / (stem if attempt == 1 else f"{stem}-{attempt}")
                if not path.exists() and _rename_to_free_name(draft, path):
                    break
            _sync_folder(parent)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    return RunFolder(path)


def open_run(path: Path | str, parent: Path = RUNS_FOLDER) -> RunFolder:
    """Open an existing run folder.

    Args:
        path: the folder; a bare name is looked up under `parent` too.
        parent: the folder of all runs.

    Raises:
        RunFolderError: there is no run there, or its manifest cannot be read.
    """
    path = Path(path)
    places = [path, parent / path] if len(path.parts) == 1 else [path]
    for place in places:
        if (place / "manifest.json").is_file():
            run = RunFolder(place)
            _ = run.manifest  # Reading it raises here, at the start, if it is damaged.
            return run
    problem = "is not a run folder" if any(place.exists() for place in places) else "does not exist"
    raise RunFolderError(f"The run {str(path)!r} {problem}.", "List the runs with `safesteer-lite runs`.")


def list_runs(parent: Path = RUNS_FOLDER) -> list[RunSummary]:
    """Summarise every run under `parent`, newest first; folders that cannot be read come last, with what is wrong.

    Raises:
        RunFolderError: `parent` exists but cannot be listed.
    """
    with _explained(f"the list of runs in {parent}"):
        if not parent.exists():
            return []
        folders = [path for path in parent.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(map(_summarise, folders), key=lambda run: (run.created, run.name), reverse=True)


@dataclass(frozen=True)
class RunFolder:
    """One run's folder; make it with `create` or `open_run`. Hold `lock` while writing to it."""

    path: Path

    @property
    def config_path(self) -> Path:
        """The settings of the run, written once."""
        return self.path / "config.toml"

    @property
    def events_path(self) -> Path:
        """The run's events, one JSON object a line."""
        return self.path / "events.jsonl"

    @property
    def manifest(self) -> Manifest:
        """The manifest as it is on the disk now.

        Raises:
            RunFolderError: it is missing, damaged, or of another schema version.
        """
        with _explained(f"the manifest of {self.path.name}"):
            try:
                content = (self.path / "manifest.json").read_bytes()
            except FileNotFoundError:
                raise RunFolderError(f"{self.path} has no manifest.json.", "It is not a run folder.") from None
        return _parse_manifest(content, self.path)

    def write_config(self, text: str) -> None:
        """Write `config.toml`; writing the same text again changes nothing.

        Raises:
            RunFolderError: there is a different one already, or the folder cannot be written.
            DiskSpaceError: the disk is full.
        """
        content = text.encode("utf-8")
        with _explained(f"the settings of {self.path.name}"):
            if not self.config_path.exists():
                _write_atomically(self.config_path, content)
            elif self.config_path.read_bytes() != content:
                raise RunFolderError(
                    f"The run {self.path.name} was started with other settings, and those are never changed.",
                    "Start a new run with the new settings.",
                )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing to this run, and clear away what a killed one left half-done.

        The system itself releases the lock when the process dies, so a run is never locked for good.

        Raises:
            RunFolderError: another process has the run, or the folder cannot be written.
            DiskSpaceError: the disk is full.
        """
        # The process id lies beside the lock, since Windows lets nobody read a file that is locked.
        owner = self.path / "run.pid"
        lock = FileLock(self.path / "run.lock")
        with _explained(f"the lock of {self.path.name}"):
            try:
                lock.acquire(blocking=False)
            except Timeout:
                raise RunFolderError(
                    f"The run {self.path.name} is in use by {_process_named_in(owner)}.",
                    "Wait until it is done, or stop it, then try again.",
                ) from None
        try:
            with _explained(f"the lock of {self.path.name}"):
                owner.write_text(str(os.getpid()), encoding="ascii")
                self._sweep()
            yield
        finally:
            with suppress(OSError):
                owner.unlink()
            lock.release()

    def is_done(self, stage: str, fingerprint: str) -> bool:
        """Whether `stage` was published with this fingerprint and its files are all there, with the right sizes."""
        record = self.manifest.stages.get(stage)
        return record is not None and record.fingerprint == fingerprint and self._is_whole(record)

    def verify(self, stage: str) -> list[str]:
        """Read every file of a published stage.

        Returns:
            The paths, inside the stage's folder, of files that are missing or whose SHA-256 is not the published one.

        Raises:
            RunFolderError: the stage has not been published.
        """
        record = self._record(stage)
        folder = self.path / record.folder
        return [name for name, artifact in record.artifacts.items() if _read_artifact(folder / name) != artifact]

    def stage_folder(self, stage: str) -> Path:
        """The folder of a published stage.

        Raises:
            RunFolderError: the stage has not been published.
        """
        return self.path / self._record(stage).folder

    @contextmanager
    def publish(self, stage: str, number: int, fingerprint: str) -> Iterator[Publication]:
        """Write a stage's files, and publish them all at once when the block ends.

        If the block raises, nothing is published, an earlier result stays, and the files written so far are removed:
        half an export holds gigabytes, often just when the disk is full, and the events already tell what happened.

        Args:
            stage: name in lower-case letters, digits, hyphens and underscores.
            number: position of the stage in the run, 0 to 99; it orders the folders.
            fingerprint: see `fingerprint`.

        Raises:
            RunFolderError: the folder cannot be written.
            DiskSpaceError: the disk is full.
            TypeError: the result that the block set is not JSON.
            ValueError: the result that the block set holds a number that is not finite.
        """
        final = self.path / _stage_folder_name(stage, number)
        started = time.monotonic()
        with _draft(final, f"the result of the {stage} stage") as draft:
            publication = Publication(draft)
            yield publication
            if publication.seconds is None:
                publication.seconds = round(time.monotonic() - started, 3)
            with _explained(f"the result of the {stage} stage"):
                self._commit(publication, final, stage, fingerprint)

    def checkpoint(self, stage: str, number: int, fingerprint: str) -> Checkpoints:
        """The checkpoints of a stage in progress; publishing the stage removes them. Arguments as for `publish`."""
        return Checkpoints(self.path / f"{_stage_folder_name(stage, number)}.partial", fingerprint)

    def _commit(self, publication: Publication, final: Path, stage: str, fingerprint: str) -> None:
        """Move a finished draft to its final name and enter it in the manifest."""
        _sync_tree(publication.path)
        artifacts = {
            path.relative_to(publication.path).as_posix(): _hash_file(path) for path in _files_in(publication.path)
        }
        seconds = publication.seconds or 0.0
        record = StageRecord(fingerprint, final.name, seconds, artifacts, publication.result)
        before = self.manifest
        others = replace(before, stages={name: old for name, old in before.stages.items() if name != stage})
        # This is also where a result that is not JSON raises, while nothing has been moved yet.
        after = _manifest_bytes(replace(others, stages={**others.stages, stage: record}))
        if stage in before.stages:
            # The manifest must not vouch for the old files while they are being replaced.
            _write_atomically(self.path / "manifest.json", _manifest_bytes(others))
        _discard(final)
        _replace(publication.path, final)
        _sync_folder(self.path)
        _write_atomically(self.path / "manifest.json", after)
        with suppress(OSError):  # The stage is published; checkpoints that stay are cleared by the next `lock`.
            _discard(final.with_name(f"{final.name}.partial"))

    def _record(self, stage: str) -> StageRecord:
        record = self.manifest.stages.get(stage)
        if record is None:
            raise RunFolderError(
                f"The run {self.path.name} has no result of the {stage} stage yet.",
                f"Finish it with `safesteer-lite resume {self.path.name}`.",
            )
        return record

    def _is_whole(self, record: StageRecord) -> bool:
        """Compare sizes only: reading gigabytes of exported weights at each start would take minutes."""
        folder = self.path / record.folder
        return all(_size_of(folder / name) == artifact.size for name, artifact in record.artifacts.items())

    def _sweep(self) -> None:
        """Remove what a killed process left: drafts, discarded results, and checkpoints of a published stage."""
        _remove_leftovers(self.path)
        for record in self.manifest.stages.values():
            partial = self.path / f"{record.folder}.partial"
            if _read_mark(partial) == record.fingerprint:
                _discard(partial)


@dataclass(frozen=True)
class Checkpoints:
    """The saved steps of a stage in progress, each whole; make it with `RunFolder.checkpoint`.

    Steps that were saved under another fingerprint belong to other settings: the first call to `save_checkpoint` or
    `newest_checkpoint` removes them.
    """

    folder: Path
    fingerprint: str

    def save_checkpoint(self, step: int, write: Callable[[Path], None]) -> Path:
        """Save one step.

        Args:
            step: optimizer step, from 0; a step that is saved already is replaced.
            write: writes the step's files in the empty folder it is given.

        Returns:
            The step's folder.

        Raises:
            RunFolderError: the folder cannot be written.
            DiskSpaceError: the disk is full.
        """
        self._claim()
        final = self.folder / f"step-{step:06d}"
        with _draft(final, f"the checkpoint of step {step}") as draft:
            write(draft)
            with _explained(f"the checkpoint of step {step}"):
                _sync_tree(draft)
                _discard(final)
                _replace(draft, final)
                _sync_folder(self.folder)
        return final

    def newest_checkpoint(self) -> tuple[int, Path] | None:
        """The last whole step with its folder, or None where there is none for this fingerprint."""
        self._claim()
        steps = self._steps()
        return steps[-1] if steps else None

    def prune(self, keep: int) -> None:
        """Remove all steps but the `keep` newest.

        Raises:
            RunFolderError: a step cannot be removed.
        """
        steps = self._steps()
        with _explained(f"the removal of old checkpoints in {self.folder.parent.name}"):
            for _, path in steps[: max(len(steps) - keep, 0)]:
                _discard(path)

    def _claim(self) -> None:
        """Make the folder this fingerprint's own, without anything that a killed process left in it."""
        with _explained(f"the checkpoints in {self.folder.parent.name}"):
            if _read_mark(self.folder) != self.fingerprint:
                _discard(self.folder)
                self.folder.mkdir()
                _write_atomically(self.folder / "fingerprint", self.fingerprint.encode("utf-8"))
            _remove_leftovers(self.folder)

    def _steps(self) -> list[tuple[int, Path]]:
        if not self.folder.exists():
            return []
        matches = ((_STEP_FOLDER.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted((int(match.group(1)), path) for match, path in matches if match)


def _stage_folder_name(stage: str, number: int) -> str:
    name = f"{number:02d}-{stage}"
    if not _STAGE_FOLDER.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a stage's folder")
    return name


def _summarise(path: Path) -> RunSummary:
    try:
        run = RunFolder(path)
        manifest = run.manifest
        done = tuple(name for name, record in manifest.stages.items() if run._is_whole(record))
    except (RunFolderError, OSError) as error:
        return RunSummary(path.name, path, "", (), False, getattr(error, "message", str(error)))
    finished = bool(manifest.planned) and set(manifest.planned) <= set(done)
    return RunSummary(path.name, path, manifest.created, done, finished)


def _manifest_bytes(manifest: Manifest) -> bytes:
    document = {"schema": SCHEMA_VERSION, **asdict(manifest)}
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def _parse_manifest(content: bytes, path: Path) -> Manifest:
    try:
        document = json.loads(content)
        schema = int(document["schema"])
        if schema != SCHEMA_VERSION:
            raise RunFolderError(
                f"The run {path.name} was written by another version of safesteer-lite (layout {schema}).",
                "Open it with that version, or start a new run.",
            )
        stages = {name: _parse_record(record) for name, record in document["stages"].items()}
        planned = tuple(str(name) for name in document["planned"])
        return Manifest(str(document["created"]), dict(document["versions"]), planned, stages)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunFolderError(
            f"The manifest of {path.name} is damaged ({type(error).__name__}: {error}).",
            f"Restore {path / 'manifest.json'} from a copy, or start a new run.",
        ) from error


def _parse_record(record: dict[str, Any]) -> StageRecord:
    # A folder such as ".." would send readers outside the run.
    if not _STAGE_FOLDER.fullmatch(record["folder"]):
        raise ValueError(f"{record['folder']!r} is no stage's folder")
    artifacts = {name: Artifact(int(file["size"]), str(file["sha256"])) for name, file in record["artifacts"].items()}
    return StageRecord(
        str(record["fingerprint"]), record["folder"], float(record["seconds"]), artifacts, dict(record["result"])
    )


def _process_named_in(owner: Path) -> str:
    """The holder of a lock in words; it may not have written its id yet."""
    with suppress(OSError, ValueError):
        return f"process {int(owner.read_text(encoding='ascii'))}"
    return "another process"


def _read_mark(partial: Path) -> str | None:
    """The fingerprint that a folder of checkpoints belongs to, None where there is none."""
    try:
        return (partial / "fingerprint").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _read_artifact(path: Path) -> Artifact | None:
    try:
        return _hash_file(path)
    except OSError:
        return None


def _hash_file(path: Path) -> Artifact:
    with path.open("rb") as stream:
        return Artifact(os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "sha256").hexdigest())


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def _draft(final: Path, what: str) -> Iterator[Path]:
    """An empty folder beside `final` to write in; it is removed if the block raises."""
    draft = final.with_name(f"{final.name}.tmp")
    with _explained(what):
        if draft.exists():
            shutil.rmtree(draft)
        draft.mkdir()
    try:
        yield draft
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        # Other errors of the system may come from anything the block does, a download for one: they are not ours.
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise _as_user_error(error, what) from error
        raise


def _discard(folder: Path) -> None:
    """Remove a folder such that it is whole under its own name, or not there; a kill may leave it under `.old`."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        _replace(folder, old)
        _sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content such that a reader, or a kill, sees the old content or the new, never a part."""
    draft = path.with_name(f"{path.name}.tmp")
    with draft.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    _replace(draft, path)
    _sync_folder(path.parent)


def _replace(source: Path, target: Path) -> None:
    """Rename; on Windows, wait up to 1.6 seconds for a virus scanner or a viewer to let go of the files."""
    for delay in (0.05, 0.15, 0.4, 1.0):
        try:
            source.replace(target)
            return
        except PermissionError:
            if os.name != "nt":
                raise
        time.sleep(delay)
    source.replace(target)


def _rename_to_free_name(source: Path, target: Path) -> bool:
    """Rename a folder that is not empty, unless `target` exists; returns whether it was renamed."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        raise
    return True


def _sync_tree(folder: Path) -> None:
    """Flush every file under `folder`, and the folders themselves, to the disk."""
    # Windows flushes only files that are open for writing.
    mode = "r+b" if os.name == "nt" else "rb"
    for path in _files_in(folder):
        with path.open(mode) as stream:
            os.fsync(stream.fileno())
    for path in folder.rglob("*"):
        if path.is_dir():
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn errors of the file system into ones that the user can act on."""
    try:
        yield
    except OSError as error:
        raise _as_user_error(error, what) from error


def _as_user_error(error: OSError, what: str) -> SafeSteerError:
    if error.errno in _NO_ROOM:
        return DiskSpaceError(
            f"The disk is full: no room for {what}.", "Free some space, then resume the run: finished stages are kept."
        )
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return RunFolderError(
            f"No permission for {what} ({error}).", "Choose a runs folder that you may write to, or change its rights."
        )
    return RunFolderError(f"The file system refused {what} ({error}).", "Check that the folder and its disk are there.")

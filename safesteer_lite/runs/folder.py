"""The run folder: where one run keeps its settings, its events and the published result of every stage.

A result is written under a temporary name, flushed to the disk, renamed, and only then entered in the manifest. The
manifest therefore never names a result that is not whole, whenever the process was killed. It does not know which
stages there are: their names come from the caller, and a result counts for as long as its fingerprint is asked for.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from safesteer_lite.errors import RunFolderError
from safesteer_lite.runs.durable import (
    discard,
    draft_of,
    explained,
    put_in_place,
    remove_leftovers,
    rename_to_free_name,
    sync_folder,
    sync_tree,
    write_atomically,
)
from safesteer_lite.runs.manifest import (
    STAGE_FOLDER,
    Manifest,
    StageRecord,
    artifacts_of,
    manifest_bytes,
    parse_manifest,
    stage_folder_name,
)
from safesteer_lite.runs.steps import Checkpoints, read_mark

RUNS_FOLDER = Path("runs")

_OWN_FOLDER = re.compile(rf"{STAGE_FOLDER.pattern}(?:\.partial)?")


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
    with explained(f"a new run folder in {parent}"):
        try:
            draft.mkdir(parents=True)
            write_atomically(draft / "manifest.json", manifest_bytes(manifest))
            for attempt in itertools.count(1):
                path = parent / (stem if attempt == 1 else f"{stem}-{attempt}")
                if not path.exists() and rename_to_free_name(draft, path):
                    break
            sync_folder(parent)
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
    with explained(f"the list of runs in {parent}"):
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
        with explained(f"the manifest of {self.path.name}"):
            try:
                content = (self.path / "manifest.json").read_bytes()
            except FileNotFoundError:
                raise RunFolderError(f"{self.path} has no manifest.json.", "It is not a run folder.") from None
        return parse_manifest(content, self.path)

    def write_config(self, text: str) -> None:
        """Write `config.toml`; writing the same text again changes nothing.

        Raises:
            RunFolderError: there is a different one already, or the folder cannot be written.
            DiskSpaceError: the disk is full.
        """
        content = text.encode("utf-8")
        with explained(f"the settings of {self.path.name}"):
            if not self.config_path.exists():
                write_atomically(self.config_path, content)
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
        with explained(f"the lock of {self.path.name}"):
            try:
                lock.acquire(blocking=False)
            except Timeout:
                raise RunFolderError(
                    f"The run {self.path.name} is in use by {_process_named_in(owner)}.",
                    "Wait until it is done, or stop it, then try again.",
                ) from None
        try:
            with explained(f"the lock of {self.path.name}"):
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
        return record is not None and record.fingerprint == fingerprint and record.is_whole(self.path)

    def verify(self, stage: str) -> list[str]:
        """Read every file of a published stage.

        Returns:
            The paths, inside the stage's folder, of files that are missing or whose SHA-256 is not the published one.

        Raises:
            RunFolderError: the stage has not been published.
        """
        return self._record(stage).damaged(self.path)

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
        final = self.path / stage_folder_name(stage, number)
        started = time.monotonic()
        with draft_of(final, f"the result of the {stage} stage") as draft:
            publication = Publication(draft)
            yield publication
            if publication.seconds is None:
                publication.seconds = round(time.monotonic() - started, 3)
            with explained(f"the result of the {stage} stage"):
                self._commit(publication, final, stage, fingerprint)

    def checkpoint(self, stage: str, number: int, fingerprint: str) -> Checkpoints:
        """The checkpoints of a stage in progress; publishing the stage removes them. Arguments as for `publish`."""
        return Checkpoints(self.path / f"{stage_folder_name(stage, number)}.partial", fingerprint)

    def _commit(self, publication: Publication, final: Path, stage: str, fingerprint: str) -> None:
        """Move a finished draft to its final name and enter it in the manifest."""
        sync_tree(publication.path)
        artifacts = artifacts_of(publication.path)
        record = StageRecord(fingerprint, final.name, publication.seconds or 0.0, artifacts, publication.result)
        before = self.manifest
        others = replace(before, stages={name: old for name, old in before.stages.items() if name != stage})
        # This is also where a result that is not JSON raises, while nothing has been moved yet.
        after = manifest_bytes(replace(others, stages={**others.stages, stage: record}))
        if stage in before.stages:
            # The manifest must not vouch for the old files while they are being replaced.
            write_atomically(self.path / "manifest.json", manifest_bytes(others))
        put_in_place(publication.path, final)
        write_atomically(self.path / "manifest.json", after)
        with suppress(OSError):  # The stage is published; checkpoints that stay are cleared by the next `lock`.
            discard(final.with_name(f"{final.name}.partial"))

    def _record(self, stage: str) -> StageRecord:
        record = self.manifest.stages.get(stage)
        if record is None:
            raise RunFolderError(
                f"The run {self.path.name} has no result of the {stage} stage yet.",
                f"Finish it with `safesteer-lite resume {self.path.name}`.",
            )
        return record

    def _sweep(self) -> None:
        """Remove what a killed process left: drafts, discarded results, and checkpoints of a published stage."""
        remove_leftovers(self.path, _OWN_FOLDER)
        for record in self.manifest.stages.values():
            partial = self.path / f"{record.folder}.partial"
            if read_mark(partial) == record.fingerprint:
                discard(partial)


def _summarise(path: Path) -> RunSummary:
    try:
        manifest = RunFolder(path).manifest
        done = tuple(name for name, record in manifest.stages.items() if record.is_whole(path))
    except (RunFolderError, OSError) as error:
        return RunSummary(path.name, path, "", (), False, getattr(error, "message", str(error)))
    finished = bool(manifest.planned) and set(manifest.planned) <= set(done)
    return RunSummary(path.name, path, manifest.created, done, finished)


def _process_named_in(owner: Path) -> str:
    """The holder of a lock in words; it may not have written its id yet."""
    with suppress(OSError, ValueError):
        return f"process {int(owner.read_text(encoding='ascii'))}"
    return "another process"

"""The run folder: where one run keeps its settings, its events and the published result of every stage.

A result is written under a temporary name, flushed to the disk, renamed, and only then entered in the manifest. The
manifest therefore never names a result that is not whole, whenever the process was killed. It does not know which
stages there are: their names come from the caller, and a result counts for as long as its fingerprint is asked for.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safesteer_lite.errors import RunFolderError
from safesteer_lite.runs.durable import (
    LARGEST_JSON,
    discard,
    draft_of,
    explained,
    parse_json,
    put_in_place,
    read_bytes,
    remove_leftovers,
    sync_tree,
    write_atomically,
)
from safesteer_lite.runs.lock import OWN_FOLDER, locked
from safesteer_lite.runs.manifest import (
    Manifest,
    StageRecord,
    artifacts_of,
    manifest_bytes,
    parse_manifest,
    stage_folder_name,
)
from safesteer_lite.runs.steps import Checkpoints

RUNS_FOLDER = Path("runs")

CHAT_TEMPLATE = "chat_template.jinja"
"""What a run keeps the chat template in that the user gave."""


@dataclass
class Publication:
    """A stage about to be published: write the files under `path`, and set `result` before the block ends.

    Args:
        path: the folder to write in.
        steps: the stage's checkpoints, from which a killed one goes on.
        result: JSON values for the manifest.
        seconds: how long the stage took; left at None, it is the time that the block took.
    """

    path: Path
    steps: Checkpoints
    result: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None


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


@dataclass(frozen=True)
class RunFolder:
    """One run's folder; make it with `create_run` or `open_run`. Hold `lock` while writing to it."""

    path: Path

    @property
    def config_path(self) -> Path:
        """The settings of the run, written once; see `settings`."""
        return self.path / "config.toml"

    def settings(self) -> str:
        """The content of `config.toml`, as it was when the run was made.

        Raises:
            RunFolderError: it is missing, or was changed since.
        """
        hint = "Put the original back, or start a new run; `run --config` takes a file with other settings."
        try:
            content = read_bytes(self.config_path, LARGEST_JSON)
        except (OSError, ValueError) as error:
            said = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
            raise RunFolderError(f"{self.config_path}, the settings of this run, {said}.", hint) from error
        known = self.manifest.config_sha256
        if known and hashlib.sha256(content).hexdigest() != known:
            raise RunFolderError(
                f"{self.config_path} was changed since the run was started, and the settings of a run never change.",
                hint,
            )
        return content.decode("utf-8", "surrogateescape")

    @property
    def chat_template(self) -> str:
        """The chat template that the run was given in place of the model's own.

        Raises:
            RunFolderError: it is missing, or cannot be read.
        """
        path = self.path / CHAT_TEMPLATE
        try:
            return read_bytes(path, LARGEST_JSON).decode()
        except (OSError, ValueError) as error:
            said = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
            raise RunFolderError(
                f"{path}, the chat template that this run was given, {said}.", "Restore it from a copy."
            ) from error

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
                content = read_bytes(self.path / "manifest.json", LARGEST_JSON)
            except FileNotFoundError:
                raise RunFolderError(f"{self.path} has no manifest.json.", "It is not a run folder.") from None
            except ValueError as error:
                raise RunFolderError(
                    f"The manifest of {self.path.name} cannot be read: {error}.", "Restore it."
                ) from error
        return parse_manifest(content, self.path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing to this run, and clear away what a killed one left half-done.

        Raises:
            RunFolderError: another process has the run, or the folder cannot be written.
            DiskSpaceError: the disk is full.
        """
        with locked(self.path):
            with explained(f"the lock of {self.path.name}"):
                self._sweep()
            yield

    def is_done(self, stage: str, fingerprint: str) -> bool:
        """Whether `stage` was published with this fingerprint, and every file of it is still what was published."""
        record = self.manifest.stages.get(stage)
        return record is not None and record.fingerprint == fingerprint and not record.damaged(self.path)

    def verify(self, stage: str) -> list[str]:
        """Read every file of a published stage.

        Returns:
            The paths, inside the stage's folder, of files that are missing or whose SHA-256 is not the published one.

        Raises:
            RunFolderError: the stage has not been published.
        """
        return self.record(stage).damaged(self.path)

    def read(self, stage: str, name: str) -> bytes:
        """A file of a published stage, which is what was published.

        Args:
            stage: of the run.
            name: its path, with forward slashes, inside the stage's folder.

        Raises:
            RunFolderError: the stage has not been published, or the file is missing or was changed since.
        """
        record = self.record(stage)
        path, artifact = self.path / record.folder / name, record.artifacts.get(name)
        content = None
        if artifact is not None:
            with suppress(OSError, ValueError):
                content = read_bytes(path, artifact.size)
        if artifact is None or content is None or hashlib.sha256(content).hexdigest() != artifact.sha256:
            raise self._damaged(path)
        return content

    def read_json(self, stage: str, name: str) -> Any:
        """A file of a published stage, which is what was published, as JSON.

        Raises:
            RunFolderError: as for `read`, or it is no JSON.
        """
        try:
            return parse_json(self.read(stage, name))
        except ValueError as error:
            raise self._damaged(self.stage_folder(stage) / name) from error

    def folder(self, stage: str, part: str = "") -> Path:
        """The folder of a published stage, or one inside it, every file of which is what was published.

        For whoever reads a folder itself, such as peft; `read` is for single files.

        Raises:
            RunFolderError: the stage has not been published, or a file is missing or was changed since.
        """
        record = self.record(stage)
        wanted = {name: file for name, file in record.artifacts.items() if not part or name.startswith(f"{part}/")}
        damaged = replace(record, artifacts=wanted).damaged(self.path)
        if damaged or not wanted:
            raise self._damaged(self.path / record.folder / (damaged[0] if damaged else part))
        return self.path / record.folder / part

    def stage_folder(self, stage: str) -> Path:
        """Where a published stage lies, to be shown; `read` and `folder` are for what is in it.

        Raises:
            RunFolderError: the stage has not been published.
        """
        return self.path / self.record(stage).folder

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
            publication = Publication(draft, self.checkpoint(stage, number, fingerprint))
            yield publication
            if publication.seconds is None:
                publication.seconds = round(time.monotonic() - started, 3)
            with explained(f"the result of the {stage} stage"):
                self._commit(publication, final, stage, fingerprint)

    def checkpoint(
        self, stage: str, number: int, fingerprint: str, warn: Callable[[str], None] = lambda message: None
    ) -> Checkpoints:
        """The checkpoints of a stage in progress; publishing the stage removes them.

        Args:
            stage, number, fingerprint: as for `publish`.
            warn: takes a sentence for the user where saved steps cannot be used.
        """
        return Checkpoints(self.path / f"{stage_folder_name(stage, number)}.partial", fingerprint, warn)

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

    def record(self, stage: str) -> StageRecord:
        """What the manifest holds on a published stage.

        Raises:
            RunFolderError: the stage has not been published.
        """
        record = self.manifest.stages.get(stage)
        if record is None:
            raise RunFolderError(
                f"The run {self.path.name} has no result of the {stage} stage yet.",
                f"Finish it with `safesteer-lite resume {self.path.name}`.",
            )
        return record

    def _damaged(self, path: Path) -> RunFolderError:
        return RunFolderError(
            f"{path} is missing or not what the run wrote there.",
            f"`safesteer-lite resume {self.path.name}` does that stage again; or restore the file from a copy.",
        )

    def _sweep(self) -> None:
        """Remove what a killed process left: drafts, discarded results, and what a published stage was made from."""
        remove_leftovers(self.path, OWN_FOLDER)
        for record in self.manifest.stages.values():
            partial = self.path / f"{record.folder}.partial"
            if os.path.lexists(partial) and record.has_its_sizes(self.path):
                discard(partial)

"""The manifest: which stages a run has published, each with its fingerprint and the hash of every file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from safesteer_lite.errors import RunFolderError
from safesteer_lite.runs.durable import files_in, json_bytes, parse_json, sha256_of

SCHEMA_VERSION = 1

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

STAGE_FOLDER = re.compile(r"\d{2}-[a-z][a-z0-9_-]*")


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

    def is_whole(self, run: Path) -> bool:
        """Whether every file is there with its size; reading gigabytes of weights at each start would take minutes.

        Args:
            run: the run folder.
        """
        folder = run / self.folder
        return all(_size_of(folder / name) == artifact.size for name, artifact in self.artifacts.items())

    def damaged(self, run: Path) -> list[str]:
        """The paths, inside the stage's folder, of files that are missing or whose content is not the published one.

        Args:
            run: the run folder; every file of the stage is read.
        """
        folder = run / self.folder
        return [name for name, artifact in self.artifacts.items() if _read_artifact(folder / name) != artifact]


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


def stage_folder_name(stage: str, number: int) -> str:
    """The name of a stage's folder, such as `04-distill`.

    Raises:
        ValueError: `stage` would not make a plain name.
    """
    name = f"{number:02d}-{stage}"
    if not STAGE_FOLDER.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a stage's folder")
    return name


def artifacts_of(folder: Path) -> dict[str, Artifact]:
    """Every file under `folder`, by its path (with forward slashes) inside it."""
    return {path.relative_to(folder).as_posix(): _hash_file(path) for path in files_in(folder)}


def manifest_bytes(manifest: Manifest) -> bytes:
    """The content of `manifest.json`.

    Raises:
        TypeError: a stage's result is not JSON.
        ValueError: a stage's result holds a number that is not finite.
    """
    document = {"schema": SCHEMA_VERSION, **asdict(manifest)}
    return json_bytes(document)


def parse_manifest(content: bytes, path: Path) -> Manifest:
    """Read what `manifest_bytes` wrote.

    Args:
        content: of `manifest.json`.
        path: the run folder, for messages.

    Raises:
        RunFolderError: the content is damaged, or of another schema version.
    """
    try:
        document = parse_json(content)
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
    if not STAGE_FOLDER.fullmatch(record["folder"]):
        raise ValueError(f"{record['folder']!r} is no stage's folder")
    artifacts = {name: Artifact(int(file["size"]), str(file["sha256"])) for name, file in record["artifacts"].items()}
    return StageRecord(
        str(record["fingerprint"]), record["folder"], float(record["seconds"]), artifacts, dict(record["result"])
    )


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
    return Artifact(path.stat().st_size, sha256_of(path))

"""The manifest: which stages a run has published, each with its fingerprint and the hash of every file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, TypeAlias

from safesteer_lite.errors import RunFolderError
from safesteer_lite.runs.durable import files_in, json_bytes, parse_json, sha256_of

SCHEMA_VERSION = 1

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

PARENT = "parent"
"""What a run's manifest calls what it holds of the run that it continues, as if that were a stage before the first."""

_SUM = "sum"

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

    def has_its_sizes(self, run: Path) -> bool:
        """Whether every file is there with its size: enough for a list, since reading gigabytes of weights takes minutes.

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
        run_date: the day, ISO 8601, that chat templates are told for as long as the run lives.
        config_sha256: of `config.toml`; empty where an earlier version made the run.
        made_from: the fingerprints of what the run was started with and is not in its folder, by what it is.
        loaded: how its model is loaded; empty where an earlier version made the run.
    """

    created: str
    versions: dict[str, str]
    planned: tuple[str, ...]
    stages: dict[str, StageRecord]
    run_date: str = ""
    config_sha256: str = ""
    made_from: dict[str, str] = field(default_factory=dict)
    loaded: dict[str, Json] = field(default_factory=dict)


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
    return _canonical_sha256({"schema": SCHEMA_VERSION, "parts": parts})


def _canonical_sha256(value: object) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
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
    """The content of `manifest.json`, with a sum of its own, since readers trust every value in it.

    Raises:
        TypeError: a stage's result is not JSON.
        ValueError: a stage's result holds a number that is not finite.
    """
    document = {"schema": SCHEMA_VERSION, **asdict(manifest)}
    return json_bytes({**document, _SUM: _canonical_sha256(document)})


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
        given = document.pop(_SUM, None)
        # The first versions wrote neither the sum nor the hash of the settings.
        if given != _canonical_sha256(document) and (given is not None or "config_sha256" in document):
            raise ValueError("it is not as it was written")
        return Manifest(
            created=_text(document["created"]),
            versions={_text(name): _text(version) for name, version in document["versions"].items()},
            planned=tuple(_text(name) for name in document["planned"]),
            stages={_text(name): _parse_record(record) for name, record in document["stages"].items()},
            run_date=date.fromisoformat(document.get("run_date", document["created"][:10])).isoformat(),
            config_sha256=_text(document.get("config_sha256", "")),
            made_from={_text(name): _text(mark) for name, mark in document.get("made_from", {}).items()},
            loaded=dict(document.get("loaded", {})),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        said = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise RunFolderError(
            f"{path / 'manifest.json'}, the list of this run's results, is damaged: {said}.",
            "Restore it from a copy, or start a new run.",
        ) from error


def _parse_record(record: dict[str, Any]) -> StageRecord:
    # A folder such as ".." would send readers outside the run.
    if not STAGE_FOLDER.fullmatch(record["folder"]):
        raise ValueError(f"{record['folder']!r} is no stage's folder")
    artifacts = {
        _inside(name): Artifact(int(file["size"]), _text(file["sha256"])) for name, file in record["artifacts"].items()
    }
    seconds, result = float(record["seconds"]), record["result"]
    if not isinstance(result, dict):
        raise ValueError("the result of a stage is no JSON object")
    return StageRecord(_text(record["fingerprint"]), record["folder"], seconds, artifacts, result)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} stands where a text belongs")
    return value


def _inside(name: str) -> str:
    """The path of a file, if it stays inside the folder that it is read from."""
    path = Path(_text(name))
    if path.is_absolute() or path.drive or ".." in path.parts:
        raise ValueError(f"{name!r} is no file of a stage")
    return name


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

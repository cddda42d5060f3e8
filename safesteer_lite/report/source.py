"""What the page is made from: the report's record and the files of the run folder beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safesteer_lite.errors import RunFolderError
from safesteer_lite.runs.folder import RunFolder


@dataclass(frozen=True)
class Source:
    """A run's report, and the files that it does not hold.

    Attributes:
        run: the run folder.
        record: the content of `report.json`.
    """

    run: RunFolder
    record: Mapping[str, Any]

    def result(self, stage: str) -> dict[str, Any]:
        """What a stage left in the manifest; empty where the stage is not done."""
        found: dict[str, Any] = self.record["stages"].get(stage, {}).get("result", {})
        return found

    def read(self, stage: str, name: str, parse: Callable[[Path], Any]) -> Any:
        """A file of a published stage, parsed; None where it is not there.

        Raises:
            RunFolderError: the file is damaged.
        """
        return _parsed(self.run.stage_folder(stage) / name, parse) if stage in self.record["stages"] else None

    def dial(self) -> list[dict[str, Any]]:
        """The strength dial; empty where it was not measured, or was for another training."""
        record, trained = _parsed(self.run.path / "strength.json", plain_json), self.run.manifest.stages.get("distill")
        if not record or not trained or record["distill"] != trained.fingerprint:
            return []
        found: list[dict[str, Any]] = record["points"]
        return found


def plain_json(path: Path) -> Any:
    """A file of JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def json_lines(path: Path) -> list[Any]:
    """A file with one JSON value a line."""
    # Not splitlines: an answer may hold other line separators, which JSON leaves as they are.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def separation_scores(path: Path) -> list[list[float]]:
    """The separation scores, (positions, layers)."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as tensors:
        found: list[list[float]] = tensors.get_tensor("separation").tolist()
    return found


def _parsed(path: Path, parse: Callable[[Path], Any]) -> Any:
    from safetensors import SafetensorError

    if not path.is_file():
        return None
    try:
        return parse(path)
    except (ValueError, SafetensorError) as error:
        raise RunFolderError(
            f"{path} is damaged: {error}.", "Restore it from a copy, or delete it for a report without that part."
        ) from error

"""What the page is made from: the report's record and the files of the run folder beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from safesteer_lite.errors import RunFolderError
from safesteer_lite.evaluation import dial
from safesteer_lite.evaluation.judged import Judged, saved_judged
from safesteer_lite.runs.durable import parse_json
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.runs.manifest import PARENT

T = TypeVar("T")


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

    @property
    def parent(self) -> dict[str, Any]:
        """What is kept of the run that this one continues; empty for a run that began from its base."""
        return self.result(PARENT)

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """What the record holds of each finished stage, in their order."""
        found = {name: stage for name, stage in self.record["stages"].items() if name != PARENT}
        # A stage that was done again was published last, but keeps its number.
        return dict(sorted(found.items(), key=lambda entry: self.run.stage_folder(entry[0]).name))

    def read(self, stage: str, name: str, parse: Callable[[bytes], T]) -> T | None:
        """A file of a published stage, parsed; None where it is not there.

        Raises:
            RunFolderError: the file is not what was published.
        """
        if stage not in self.record["stages"] or not (self.run.stage_folder(stage) / name).exists():
            return None
        content = self.run.read(stage, name)
        try:
            return parse(content)
        except ValueError as error:
            place = self.run.stage_folder(stage) / name
            raise RunFolderError(f"{place} is damaged: {error}.", "Start a new run.") from error

    def dial(self) -> list[dict[str, Any]]:
        """The strength dial; empty where it was not measured, or was for another training.

        Raises:
            RunFolderError: its file is damaged.
        """
        return dial.to_records(dial.saved_points(self.run))

    def judged(self) -> list[Judged]:
        """What other judges said of the test answers; empty where none was asked, or of answers that were made anew.

        Raises:
            RunFolderError: their file is damaged.
        """
        return saved_judged(self.run)


def plain_json(content: bytes) -> Any:
    """A file of JSON."""
    return parse_json(content)


def separation_scores(content: bytes) -> list[list[float]]:
    """The separation scores, (positions, layers)."""
    from safetensors.numpy import load

    found: list[list[float]] = load(content)["separation"].tolist()
    return found

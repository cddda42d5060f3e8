"""The strength dial as a run keeps it: what the adapter, scaled by several factors, was measured to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from safesteer_lite.errors import RunFolderError
from safesteer_lite.evaluation import choice
from safesteer_lite.evaluation.choice import Candidate
from safesteer_lite.evaluation.scorecard import Scorecard
from safesteer_lite.runs.durable import explained, read_json, write_json
from safesteer_lite.runs.folder import RunFolder

FILE = "strength.json"


@dataclass(frozen=True)
class Point:
    """The model at one strength.

    Attributes:
        strength: factor on the adapter; 0 is the base, 1 the trained model.
        card: what was measured on the selection split.
        score: the counted trade-off, points; the base scores 0.
        separation: the smooth score, nats; the base scores 0; None where it was not measured, as in the first versions.
    """

    strength: float
    card: Scorecard
    score: float
    separation: float | None = None

    @classmethod
    def from_record(cls, record: Any) -> Point:
        """A point as `to_records` makes it.

        Raises:
            ValueError: it is none.
        """
        try:
            strength, card, score = float(record["strength"]), Scorecard.from_record(record), float(record["score"])
            apart = record.get("separation")
            point = cls(strength, card, score, None if apart is None else float(apart))
        except (KeyError, TypeError) as error:
            raise ValueError(f"a strength lacks what was measured ({error})") from error
        if point.card.kl_to_base is None:
            raise ValueError("a strength lacks its divergence")
        return point


def best(points: Sequence[Point]) -> Point:
    """The point that the search after training would keep of these, weakest first."""
    near = choice.one_answer(points[0].card)
    return points[choice.best([Candidate(point.score, point.separation) for point in points], near)]


def to_records(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The points as plain records, in their order."""
    return [
        {
            "strength": point.strength,
            "score": point.score,
            "separation": point.separation,
            **point.card.to_record(),
        }
        for point in points
    ]


def save_points(run: RunFolder, points: Sequence[Point]) -> None:
    """Keep the dial beside the report, marked with the training that it belongs to.

    Raises:
        RunFolderError: the folder cannot be written.
        DiskSpaceError: the disk is full.
    """
    record = {"distill": run.record("distill").fingerprint, "split": "selection", "points": to_records(points)}
    with explained(f"the strengths of {run.path.name}"):
        write_json(run.path / FILE, record)


def saved_points(run: RunFolder) -> list[Point]:
    """The dial as it was last measured, weakest first; empty where it was not, or was for another training.

    Raises:
        RunFolderError: the file is damaged.
    """
    path, trained = run.path / FILE, run.manifest.stages.get("distill")
    if trained is None or not path.exists():
        return []
    hint = f"Measure again with `safesteer-lite strength {run.path.name}`, or delete it for a report without that part."
    record = read_json(path, "the strengths that were measured", hint=hint)
    if record.get("distill") != trained.fingerprint:
        return []
    try:
        found = record["points"]
        if not isinstance(found, list) or not found:
            raise ValueError("it has no points")
        return [Point.from_record(point) for point in found]
    except (KeyError, ValueError) as error:
        raise RunFolderError(f"{path} is damaged: {error}.", hint) from error

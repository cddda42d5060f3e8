"""What happened in a training so far: kept with every saved step, and published with the adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from safesteer_lite.errors import RunFolderError
from safesteer_lite.evaluation.choice import Candidate
from safesteer_lite.evaluation.scorecard import Rate
from safesteer_lite.method.distill import Distillation
from safesteer_lite.prompts.sets import Kind
from safesteer_lite.runs.durable import read_json, write_json
from safesteer_lite.runs.folder import RunFolder


@dataclass
class History:
    """What happened so far; saved with every step.

    Attributes:
        steps: one record an optimizer step.
        measured: one record a measurement on the selection split.
        scaled: one record for each strength of the last step's adapter.
        base_scores: the base's mean refusal scores by kind of prompt, log-odds, from which separations are reckoned.
        best_step: the measured step with the best trade-off; 0 is what the training began from.
        best_strength: the factor on its adapter.
        best_score: its score, points.
        best_by_trainer: whether that score is one that another process measured, with its own library.
        micro_batch: rollouts a forward that fitted in memory; 0 is "as configured".
        sampled_at_once: prompts sampled at a time that fitted in memory; 0 is "all of a step".
        fitted: what else fitted in memory, as `sizes_to_record` has it.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    measured: list[dict[str, Any]] = field(default_factory=list)
    scaled: list[dict[str, Any]] = field(default_factory=list)
    base_scores: dict[Kind, float] = field(default_factory=dict)
    best_step: int = 0
    best_strength: float = 1.0
    best_score: float = -math.inf
    best_by_trainer: bool = False
    micro_batch: int = 0
    sampled_at_once: int = 0
    fitted: dict[str, int] = field(default_factory=dict)

    @property
    def kept_record(self) -> dict[str, Any] | None:
        """What was measured of the step and strength with the best trade-off so far; None before the first measurement."""
        of = (self.best_step, self.best_strength)
        found = [entry for entry in self.measured + self.scaled if (entry["step"], entry["strength"]) == of]
        return found[-1] if found else None

    @property
    def passed_over(self) -> dict[str, Any] | None:
        """What was measured of the strength that refuses more harmful prompts than the one that is kept, of the same step, and
        has the highest score among such; None without one."""
        kept = self.kept_record
        others = [
            entry
            for entry in self.measured + self.scaled
            if kept and entry["step"] == kept["step"] and _share_of_harmful(entry) > _share_of_harmful(kept)
        ]
        return max(others, key=itemgetter("score"), default=None)

    @property
    def kept(self) -> Candidate | None:
        """The same as a candidate that others are compared with."""
        record = self.kept_record
        return Candidate(self.best_score, record.get("separation")) if record else None

    @property
    def highest(self) -> float:
        """The highest counted score so far, points; minus infinity before the first measurement."""
        return max((entry["score"] for entry in self.measured + self.scaled), default=-math.inf)


def _share_of_harmful(record: Mapping[str, Any]) -> float:
    return Rate.from_record(record["harmful"]).share


def sizes_to_record(fitted: Mapping[int, int]) -> dict[str, int]:
    """Sequences at a time that fitted in memory, by the longest answer, as JSON has them."""
    return {str(tokens): size for tokens, size in fitted.items()}


def sizes_from_record(record: Mapping[str, int]) -> dict[int, int]:
    """What `sizes_to_record` was given."""
    return {int(tokens): size for tokens, size in record.items()}


def sizes_of(run: RunFolder) -> dict[int, int]:
    """The same of the newest of a run's published stages that keeps any."""
    kept = [record.result["fitted"] for record in run.manifest.stages.values() if "fitted" in record.result]
    return sizes_from_record(kept[-1]) if kept else {}


def save_step(folder: Path, training: Distillation, history: History, best: dict[str, Tensor]) -> None:
    """Write a step's files in an empty folder: the optimizer's state, the best step's weights, and the history."""
    save_file(training.optimizer.state(), folder / "optimizer.safetensors")
    save_file(best, folder / "best.safetensors")
    # JSON has no infinity, and before the first measurement the best score is minus that.
    record = asdict(history)
    record["best_score"] = history.best_score if math.isfinite(history.best_score) else None
    write_json(folder / "history.json", {"done": training.done, **record})


def restore_step(folder: Path, training: Distillation) -> tuple[History, dict[str, Tensor]]:
    """Take a training up where `save_step` left it.

    Returns:
        What happened until then, and the best step's weights.

    Raises:
        RunFolderError: the saved step is damaged.
    """
    hint = f"Delete {folder.parent} and resume: training then begins anew."
    record = read_json(folder / "history.json", "what happened until a saved step", hint=hint)
    try:
        training.done = int(record.pop("done"))
        if record["best_score"] is None:
            record["best_score"] = -math.inf
        history = History(**record)
        training.optimizer.load(load_file(folder / "optimizer.safetensors"))
        best = load_file(folder / "best.safetensors")
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise RunFolderError(f"The saved step in {folder} is damaged: {error}.", hint) from error
    # The sizes of the run so far, whatever is free now, because sums round differently in other parts; unless the user has
    # set a smaller one.
    training.micro_batch = min(history.micro_batch or training.micro_batch, training.recipe.micro_batch)
    training.sampled_at_once = history.sampled_at_once or training.sampled_at_once
    return history, best

"""Which prompts are clear cases: the authors' threshold of 0, and the lower one where a model's refusals score below it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safesteer_lite.method import directions as method
from safesteer_lite.method.directions import Activations
from safesteer_lite.method.policies import Batch
from safesteer_lite.models.assistant import ignore
from safesteer_lite.stages.direction import PromptSet, keep_clear, read
from tests import tiny


def test_what_fitted_while_prompts_were_read_is_remembered_for_the_next_ones(
    tiny_policy: tiny.Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, tried, really = tiny_policy(), list[int](), method.read_prompts

    def two_fit(model: Any, batches: list[Batch], *others: Any) -> Any:
        tried.append(len(batches[0]))
        if len(batches[0]) > 2:
            raise torch.OutOfMemoryError("simulated, for want of a card")
        return really(model, batches, *others)

    monkeypatch.setattr(method, "read_prompts", two_fit)
    prompts, refusal = list(tiny.PROMPTS * 2), torch.tensor([7, 30])
    first = read(policy, prompts, refusal, ignore)
    assert tried == [10, 10, 8, 4, 2]
    second = read(policy, prompts, refusal, ignore)
    assert tried[5:] == [2] and second.prompts == first.prompts and torch.equal(second.scores, first.scores)


def scored(*scores: float) -> PromptSet:
    """Prompts of these refusal scores; each one's activations hold its score, so that they can be told apart."""
    values = torch.tensor(scores)
    return PromptSet([f"scores {score:g}" for score in scores], values, Activations(values.reshape(-1, 1, 1, 1)))


HARMLESS = scored(*(-10.0 + index / 10 for index in range(19)), 1.0), scored(*(-9.0 for _ in range(19)), -8.0)
"""The 95 % of both together that score lowest stay below -8.1."""


def test_the_threshold_is_0_where_enough_refusals_score_above_it() -> None:
    kept, threshold = keep_clear((scored(2, 1, 3, 1, -1), HARMLESS[0], scored(1, 2, -1), HARMLESS[1]), 2)
    assert threshold == 0
    assert kept[0].prompts == ["scores 2", "scores 1", "scores 3", "scores 1"]
    assert kept[2].prompts == ["scores 1", "scores 2"]
    assert len(kept[1].prompts) == 19 and "scores 1" not in kept[1].prompts and len(kept[3].prompts) == 20


@pytest.mark.parametrize(
    ("harmful", "selection"),
    [
        ((2, 1, 3, 1, -1, -9.5), (1, -1, -8.5)),  # Held-out prompts above 0 are too few.
        ((2, -2, -3, -1, -9.5), (1, 2, -1, -8.5)),  # Prompts to take the direction from are.
    ],
)
def test_refusals_that_score_below_0_are_told_by_what_harmless_prompts_stay_below(
    harmful: tuple[float, ...], selection: tuple[float, ...]
) -> None:
    """As on the demo: refusals open in ways that are not listed, and stand out from harmless prompts all the same."""
    kept, threshold = keep_clear((scored(*harmful), HARMLESS[0], scored(*selection), HARMLESS[1]), 2)
    assert -8.2 < threshold < -8.0
    for entry, scores in zip(kept[::2], (harmful, selection), strict=True):
        assert entry.scores.tolist() == [score for score in scores if score > threshold]
        assert entry.prompts == [f"scores {score:g}" for score in scores if score > threshold]
    # Harmless prompts are left out by the authors' threshold alone: near the lower one they are no refusals.
    assert len(kept[1].prompts) == 19 and len(kept[3].prompts) == 20


def test_the_threshold_never_rises_above_0() -> None:
    """Where harmless prompts are refused too, what scores below 0 is not thereby answered."""
    refused = scored(*(5.0 for _ in range(20)))
    _, threshold = keep_clear((scored(6, -1), refused, scored(6, -1), refused), 2)
    assert threshold == 0

"""What the refusal direction is the difference of: harmful and harmless requests (docs/method.md, the refusal direction)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safesteer_lite.evaluation.measure import counting_from
from safesteer_lite.method import directions as method
from safesteer_lite.method.directions import Activations
from safesteer_lite.method.policies import Batch
from safesteer_lite.models.assistant import Done, Policy
from safesteer_lite.prompts.plan import texts
from safesteer_lite.stages.session import Session

_BATCH = 32


@dataclass(frozen=True)
class PromptSet:
    """Prompts with what the base showed on them, all in the same order."""

    prompts: list[str]
    scores: Tensor
    activations: Activations

    def where(self, keep: Tensor) -> PromptSet:
        """The prompts at which `keep` is true."""
        chosen = [prompt for prompt, kept in zip(self.prompts, keep.tolist(), strict=True) if kept]
        return PromptSet(chosen, self.scores[keep], Activations(self.activations.values[keep]))


@dataclass(frozen=True)
class Contrast:
    """Two sides whose means are taken apart, each in a part to take them from and a part to choose by.

    Attributes:
        towards, away: what the direction points to, and away from.
        held_towards, held_away: the same, held out.
        threshold: the refusal score that parts the sides, log-odds.
    """

    towards: PromptSet
    away: PromptSet
    held_towards: PromptSet
    held_away: PromptSet
    threshold: float

    @property
    def parts(self) -> tuple[PromptSet, PromptSet, PromptSet, PromptSet]:
        """All four parts."""
        return self.towards, self.away, self.held_towards, self.held_away


def of_requests(session: Session, policy: Policy) -> Contrast:
    """Harmful requests that a model refuses against harmless ones that it does not, at the template's last positions."""
    config = session.config.direction
    refusal = policy.token_ids(config.refusal_openings)
    harmful, harmless = session.prompts.direction()
    selection = session.prompts.split("selection")
    total = 2 * (len(harmful) + len(selection.harmful))
    done = session.progress("prompts read", total)
    counts = [0, len(harmful), 2 * len(harmful), 2 * len(harmful) + len(selection.harmful)]
    groups = (harmful, harmless, selection.harmful, selection.harmless)
    sets = [
        read(policy, texts(group), refusal, counting_from(start, done))
        for group, start in zip(groups, counts, strict=True)
    ]
    kept, threshold = keep_clear(sets, config.minimum_prompts)
    session.note(
        f"Of {len(harmful)} + {len(selection.harmful)} harmful prompts {len(kept[0].prompts)} + {len(kept[2].prompts)} "
        f"have a refusal score above {threshold:.2f}; of as many harmless ones {len(kept[1].prompts)} + "
        f"{len(kept[3].prompts)} stay below."
    )
    return Contrast(*kept, threshold)


def read(policy: Policy, prompts: list[str], refusal: Tensor, done: Done) -> PromptSet:
    """The base's refusal scores and block inputs, from one forward a prompt; fewer at a time where memory is short."""

    def look(size: int) -> PromptSet:
        order: list[int] = []
        batches: list[Batch] = []
        for places, batch in policy.batches(prompts, size):
            order += places
            batches.append(batch)
        activations, scores = method.read_prompts(policy.model, batches, policy.template_positions, refusal, done)
        return PromptSet([prompts[place] for place in order], scores, activations)

    return policy.fitting(0, _BATCH, look)


def keep_clear(sets: Sequence[PromptSet], minimum: int) -> tuple[list[PromptSet], float]:
    """Harmful prompts that the base refuses and harmless ones that it does not, by refusal score.

    The threshold is 0, the authors' one. A score above 0 needs more than half the probability on the listed openings; where
    that leaves fewer than `minimum` held-out harmful prompts, the threshold is the score that 95 % of the harmless
    prompts stay below.

    Args:
        sets: harmful and harmless direction prompts, then harmful and harmless held-out ones.
        minimum: held-out harmful prompts wanted.
    """
    threshold = 0.0
    if int((sets[2].scores > 0).sum()) < minimum or int((sets[0].scores > 0).sum()) < 2 * minimum:
        threshold = min(0.0, float(torch.cat([sets[1].scores, sets[3].scores]).quantile(0.95)))
    kept = [
        entry.where(entry.scores > threshold if index % 2 == 0 else entry.scores < max(threshold, 0.0))
        for index, entry in enumerate(sets)
    ]
    return kept, threshold

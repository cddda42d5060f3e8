"""What the refusal direction is the difference of: harmful and harmless requests, or refusing and complying replies.

See docs/method.md, the refusal direction, and models that barely refuse.
"""

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
from safesteer_lite.prompts.contexts import Conversation
from safesteer_lite.prompts.plan import texts
from safesteer_lite.stages.session import Session

_BATCH = 32

REPLIES = (
    ("I cannot help with that.", "Sure, here is"),
    ("I'm sorry, but I won't do this.", "Of course. First,"),
    ("No, that would do harm.", "Yes, this is how it works:"),
)
"""Beginnings of replies that refuse, each with one that complies; they take turns over the prompts."""


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
        harmful, harmless: held-out prompts that candidates are scored on.
        threshold: the refusal score that parts the sides, log-odds.
    """

    towards: PromptSet
    away: PromptSet
    held_towards: PromptSet
    held_away: PromptSet
    harmful: list[str]
    harmless: list[str]
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
    return Contrast(kept[0], kept[1], kept[2], kept[3], kept[2].prompts, kept[3].prompts, threshold)


def of_replies(session: Session, policy: Policy) -> Contrast:
    """The same harmful requests with a reply that begins as a refusal and with one that complies, over the reply's tokens.

    It needs no model that refuses. Experimental: not measured on real models yet.
    """
    refusal = policy.token_ids(session.config.direction.refusal_openings)
    selection = session.prompts.split("selection")
    given, held = texts(session.prompts.direction()[0]), texts(selection.harmful)
    done = session.progress("replies read", 2 * (len(given) + len(held)))
    finished = 0

    def side(prompts: list[str], which: int) -> PromptSet:
        nonlocal finished
        parts = []
        for place, pair in enumerate(REPLIES[: len(prompts)]):
            some = prompts[place :: len(REPLIES)]
            parts.append(read(policy, some, refusal, counting_from(finished, done), pair[which]))
            finished += len(some)
        values = torch.cat([part.activations.values for part in parts])
        scores = torch.cat([part.scores for part in parts])
        return PromptSet([prompt for part in parts for prompt in part.prompts], scores, Activations(values))

    sides = [side(prompts, which) for prompts in (given, held) for which in (0, 1)]
    session.note(
        f"The direction is the difference of {len(given)} replies that refuse and as many that comply (experimental)."
    )
    return Contrast(sides[0], sides[1], sides[2], sides[3], held, texts(selection.harmless), 0.0)


def read(policy: Policy, prompts: list[str], refusal: Tensor, done: Done, reply: str = "") -> PromptSet:
    """The base's refusal scores and block inputs, from one forward a prompt; fewer at a time where memory is short.

    Args:
        policy: the model.
        prompts: what is asked.
        refusal: token ids that open a refusal, (n,) int64.
        done: called with the number of prompts so far.
        reply: how the answer has begun; the inputs are then the mean over its tokens, in place of those at the template's.
    """
    asked = [Conversation(prompt, beginning=reply) for prompt in prompts]
    positions = len(policy.tokenizer(reply, add_special_tokens=False).input_ids) or policy.template_positions

    def look(size: int) -> PromptSet:
        order: list[int] = []
        batches: list[Batch] = []
        for places, batch in policy.batches(asked, size):
            order += places
            batches.append(batch)
        activations, scores = method.read_prompts(policy.model, batches, positions, refusal, done)
        if reply:
            activations = Activations(activations.values.mean(1, keepdim=True))
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

"""What a policy answers itself, kept to measure others' KL along it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safesteer_lite.method.policies import Batch, Completions, completion_hidden
from safesteer_lite.models.assistant import Policy


@dataclass(frozen=True)
class Reference:
    """One policy's own answers to harmless prompts, and its hidden states along them, to measure KL against.

    Attributes:
        batches: prompts with their answers.
        hidden: that policy's final hidden states at the answer's valid positions, one (positions, width) tensor a batch.
    """

    batches: list[tuple[Batch, Completions]]
    hidden: list[Tensor]

    @property
    def positions(self) -> int:
        """How many answer tokens the measurement rests on."""
        return sum(tensor.shape[0] for tensor in self.hidden)


def reference_answers(policy: Policy, prompts: Sequence[str], tokens: int, size: int) -> Reference:
    """Greedy answers of whichever policy is on, and its hidden states along them; `size` prompts at a time, or fewer
    where memory is short."""
    _, found = policy.looked_at(
        prompts, tokens, size, lambda written: along(policy, written.prompts, written.completions)
    )
    return join_references(found)


def along(policy: Policy, prompts: Batch, completions: Completions) -> Reference:
    """What whichever policy is on makes of a batch of answers that it has written."""
    return Reference([(prompts, completions)], [_states(policy, prompts, completions)])


def join_references(parts: Sequence[Reference]) -> Reference:
    """Several references as one."""
    return Reference([pair for part in parts for pair in part.batches], [one for part in parts for one in part.hidden])


def kl_to_reference(policy: Policy, reference: Reference, chunk: int) -> float:
    """Mean KL(reference || policy) over all tokens of the reference's answers, nats a token.

    Whole answers, because damage hides behind the first token. Both policies must share the LM head.
    """
    total = 0.0
    with torch.no_grad():
        for (prompts, completions), known in zip(reference.batches, reference.hidden, strict=True):
            total += kl_of_states(known, _states(policy, prompts, completions), policy.model.logits, chunk)
    return max(total, 0.0) / max(reference.positions, 1)


def _states(policy: Policy, prompts: Batch, completions: Completions) -> Tensor:
    """Final hidden states, (positions, width), at the valid positions that predict the completions."""
    with torch.no_grad():
        residual = policy.model.start(completions.after(prompts))
        return completion_hidden(policy.model, residual, completions.tokens.shape[1])[completions.mask]


def kl_of_states(known: Tensor, now: Tensor, head: Callable[[Tensor], Tensor], chunk: int) -> float:
    """KL(known || now) summed over positions, nats.

    Args:
        known, now: (positions, width) final hidden states.
        head: the LM head that both share, (n, width) to (n, vocabulary).
        chunk: positions whose logits exist at a time.
    """
    total = 0.0
    for before, after in zip(known.split(chunk), now.split(chunk), strict=True):
        log_known, log_now = head(before).float().log_softmax(-1), head(after).float().log_softmax(-1)
        total += float((log_known.exp() * (log_known - log_now)).sum())
    return total

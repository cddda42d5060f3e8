"""Safety tokens: which words the steered teacher wants more than the base does (arXiv 2606.02530)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from safesteer_lite.method import policies
from safesteer_lite.method.policies import Batch, LanguageModel, Steering


@dataclass(frozen=True)
class SafetyTokens:
    """The voted tokens, most votes first.

    Attributes:
        ids: (K,) int64.
        votes: (K,) int64.
        teacher_probability: (K,) float32, mean over all valid positions.
        base_probability: (K,) float32, the same for the base.
        positions: how many valid positions voted.
    """

    ids: Tensor
    votes: Tensor
    teacher_probability: Tensor
    base_probability: Tensor
    positions: int


@dataclass(frozen=True)
class VotePositions:
    """Final hidden states at the positions that vote: teacher and base, (positions, width) each."""

    teacher: Tensor
    base: Tensor


def collect(
    model: LanguageModel,
    steer: Steering,
    prompts: Batch,
    *,
    samples: int,
    horizon: int,
    generator: torch.Generator,
) -> VotePositions:
    """Sample continuations from the teacher and read both policies along them.

    Args:
        prompts: harmless prompts.
        samples: continuations a prompt (M).
        horizon: positions read a continuation (H); the first is the last prompt position, so H - 1 tokens are sampled.
        generator: source of randomness, temperature 1, top-p 1.

    Returns:
        The hidden states of all valid positions: those before the first one where the base's likeliest token ends the turn.
    """
    with torch.no_grad():
        with policies.teacher(model, steer):
            continuation = model.generate(prompts, horizon - 1, 1.0, generator, samples)
        sequences = continuation.after(prompts.repeat(samples))
        # Fewer than `horizon` where every continuation ended early.
        read = continuation.tokens.shape[1] + 1
        with policies.base(model):
            shared = model.advance(model.start(sequences), steer.layer)
            base_hidden = model.final(shared)[:, -read:]
        with policies.teacher(model, steer):
            teacher_hidden = model.final(shared)[:, -read:]
        rows, width = base_hidden.shape[0], base_hidden.shape[-1]
        likeliest = torch.stack([model.logits(base_hidden[:, at]).argmax(-1) for at in range(read)], dim=1)
    ends = torch.isin(likeliest, torch.tensor(sorted(model.end_of_turn), device=likeliest.device))
    # Position h is read after h sampled tokens; it is valid while those are text and the base would still go on.
    reached = torch.cat([torch.ones(rows, 1, dtype=torch.bool, device=ends.device), continuation.mask], dim=1)
    sampled_end = torch.isin(continuation.tokens, torch.tensor(sorted(model.end_of_turn), device=ends.device))
    reached[:, 1:] &= ~sampled_end
    valid = reached & (ends.cumsum(1) == 0)
    return VotePositions(teacher_hidden[valid].reshape(-1, width), base_hidden[valid].reshape(-1, width))


def vote(
    positions: list[VotePositions],
    head: Callable[[Tensor], Tensor],
    *,
    excluded: frozenset[int],
    minimum_probability: float,
    ballots: int,
    count: int,
    chunk: int,
) -> SafetyTokens:
    """Every position votes for the tokens whose log-probability the teacher raises most.

    Memory is O(vocabulary) beside one chunk: a first pass averages the teacher's probabilities, a second one votes.

    Args:
        positions: what `collect` returned, one entry a batch.
        head: the LM head, (n, width) to (n, vocabulary).
        excluded: token ids that may not be chosen (special tokens).
        minimum_probability: tokens below this MEAN teacher probability are excluded (p_min); filtering per position
            instead fills the vote with junk.
        ballots: tokens each position votes for.
        count: tokens to choose (K); tokens without a vote are dropped.
        chunk: positions at a time.
    """
    pieces = [
        (entry.teacher[start : start + chunk], entry.base[start : start + chunk])
        for entry in positions
        for start in range(0, entry.teacher.shape[0], chunk)
    ]
    if not pieces:
        raise ValueError("no valid position to vote")
    with torch.no_grad():
        teacher_sum = sum(head(teacher).float().softmax(-1).double().sum(0) for teacher, _ in pieces)
        base_sum = sum(head(base).float().softmax(-1).double().sum(0) for _, base in pieces)
        assert isinstance(teacher_sum, Tensor) and isinstance(base_sum, Tensor)
        total = sum(teacher.shape[0] for teacher, _ in pieces)
        barred = teacher_sum / total < minimum_probability
        barred[torch.tensor(sorted(excluded), dtype=torch.long, device=barred.device)] = True
        tally = torch.zeros(barred.shape[0], dtype=torch.long, device=barred.device)
        for teacher, base in pieces:
            delta = head(teacher).float().log_softmax(-1) - head(base).float().log_softmax(-1)
            chosen = delta.masked_fill(barred, -torch.inf).topk(min(ballots, int((~barred).sum())), dim=-1).indices
            tally += torch.bincount(chosen.flatten(), minlength=tally.shape[0])
    # A stable sort on the negated tally breaks ties by the lower id, the same on every device.
    order = torch.argsort(-tally, stable=True)[:count]
    order = order[tally[order] > 0]
    return SafetyTokens(
        ids=order.cpu(),
        votes=tally[order].cpu(),
        teacher_probability=(teacher_sum[order] / total).float().cpu(),
        base_probability=(base_sum[order] / total).float().cpu(),
        positions=total,
    )

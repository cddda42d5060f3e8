"""Safety tokens: the words by which the steered teacher differs from the base, chosen by vote (arXiv 2606.02530).

Two votes: `ratio`, the paper's, in which every position votes for the tokens whose log-probability the teacher raises
most, and `mass`, in which a token gets at every position the probability that the teacher moves, |q - p|. Log-ratios
favour rare words; whether an answer refuses is decided with common ones, which is what mass favours.
`carried` tells how much of the divergence a set of tokens sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from safesteer_lite.method import policies
from safesteer_lite.method.objective import divergence
from safesteer_lite.method.policies import Batch, Chance, LanguageModel, Steering

Vote = Literal["mass", "ratio"]


@dataclass(frozen=True)
class SafetyTokens:
    """The voted tokens, most votes first.

    Attributes:
        ids: (K,) int64.
        votes: (K,) float64; of a `ratio` vote how many positions voted for the token, of a `mass` vote the probability
            that the teacher moves on it, summed over positions.
        teacher_probability: (K,) float32, mean over all valid positions.
        base_probability: (K,) float32, the same for the base.
        positions: how many valid positions voted.
    """

    ids: Tensor
    votes: Tensor
    teacher_probability: Tensor
    base_probability: Tensor
    positions: int

    def first(self, count: int) -> SafetyTokens:
        """The `count` tokens with the most votes."""
        return SafetyTokens(
            self.ids[:count],
            self.votes[:count],
            self.teacher_probability[:count],
            self.base_probability[:count],
            self.positions,
        )


@dataclass(frozen=True)
class VotePositions:
    """What the positions of some answers look like to teacher and base.

    Attributes:
        teacher: (positions, width), final hidden states.
        base: the same of the base.
        place: (positions,) int64, how many tokens of the answer stand before the position; 0 is where it begins.
    """

    teacher: Tensor
    base: Tensor
    place: Tensor


def collect(
    model: LanguageModel,
    steer: Steering | None,
    prompts: Batch,
    *,
    samples: int,
    horizon: int,
    chance: Chance,
    by_teacher: bool = True,
    taught: Batch | None = None,
) -> VotePositions:
    """Sample continuations and read both policies along them.

    Args:
        steer: what makes the teacher; None where its prompts alone do.
        prompts: harmless prompts for the paper's vote, harmful ones to look where the loss is read.
        samples: continuations a prompt (M).
        horizon: positions read a continuation (H); the first is the last prompt position, so H - 1 tokens are sampled.
        chance: source of randomness, temperature 1, top-p 1.
        by_teacher: whether the teacher writes the continuations (paper); else the base does, which is the student before
            its first step.
        taught: the same prompts as the teacher reads them; None where it reads them as they are.

    Returns:
        The hidden states of all valid positions: those before the first one where the base's likeliest token ends the turn.
    """
    with torch.no_grad():
        with policies.teacher(model, steer) if by_teacher else policies.base(model):
            asked = taught if by_teacher and taught is not None else prompts
            continuation = model.generate(asked, horizon - 1, 1.0, chance, samples)
        sequences = continuation.after(prompts.repeat(samples))
        # Fewer than `horizon` where every continuation ended early.
        read = continuation.tokens.shape[1] + 1
        with policies.base(model):
            shared = model.advance(model.start(sequences), steer.layer if steer else 0)
            base_hidden = model.final(shared)[:, -read:]
        with policies.teacher(model, steer):
            seen = shared if taught is None else model.start(continuation.after(taught.repeat(samples)))
            teacher_hidden = model.final(seen)[:, -read:]
        rows, width = base_hidden.shape[0], base_hidden.shape[-1]
        likeliest = torch.stack([model.logits(base_hidden[:, at]).argmax(-1) for at in range(read)], dim=1)
    ends = torch.isin(likeliest, torch.tensor(sorted(model.end_of_turn), device=likeliest.device))
    # Position h is read after h sampled tokens; it is valid while those are text and the base would still go on.
    reached = torch.cat([torch.ones(rows, 1, dtype=torch.bool, device=ends.device), continuation.mask], dim=1)
    sampled_end = torch.isin(continuation.tokens, torch.tensor(sorted(model.end_of_turn), device=ends.device))
    reached[:, 1:] &= ~sampled_end
    valid = reached & (ends.cumsum(1) == 0)
    place = torch.arange(read, device=valid.device).expand(rows, read)[valid]
    return VotePositions(teacher_hidden[valid].reshape(-1, width), base_hidden[valid].reshape(-1, width), place)


def vote(
    positions: Sequence[VotePositions],
    head: Callable[[Tensor], Tensor],
    *,
    by: Vote,
    excluded: frozenset[int],
    minimum_probability: float,
    ballots: int,
    count: int,
    chunk: int,
) -> SafetyTokens:
    """The tokens by which the teacher differs most from the base.

    Memory is O(vocabulary) beside one chunk.

    Args:
        positions: what `collect` returned, one entry a batch.
        head: the LM head, (n, width) to (n, vocabulary).
        by: `mass`, or the paper's `ratio`.
        excluded: token ids that may not be chosen (special tokens).
        minimum_probability: of a `ratio` vote: tokens below this MEAN teacher probability are excluded (p_min); filtering
            per position instead fills the vote with junk. A `mass` vote needs none: what is never likely moves no mass.
        ballots: of a `ratio` vote: tokens each position votes for.
        count: tokens to choose (K); tokens without a vote are dropped.
        chunk: positions at a time.
    """
    total = sum(len(entry.place) for entry in positions)
    if not total:
        raise ValueError("no valid position to vote")
    with torch.no_grad():
        teacher_sum, base_sum, moved = _sums(positions, head, chunk)
        barred = torch.zeros_like(moved, dtype=torch.bool)
        barred[torch.tensor(sorted(excluded), dtype=torch.long, device=barred.device)] = True
        if by == "mass":
            tally = moved.masked_fill(barred, 0.0)
        else:
            barred |= teacher_sum / total < minimum_probability
            tally = _ballots(positions, head, barred, ballots, chunk)
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


def carried(
    positions: Sequence[VotePositions], head: Callable[[Tensor], Tensor], ids: Tensor, counts: Sequence[int], chunk: int
) -> Tensor:
    """Which share of the divergence the first of some tokens see, at each place of an answer.

    The divergence is KL(base || teacher), the reverse KL of a student before its first step. What K tokens see of it is
    the KL of the coarse distributions in which all other tokens are one (`rest-bucket`): at most the whole.

    Args:
        positions: what `collect` returned, one entry a batch.
        head: the LM head, (n, width) to (n, vocabulary).
        ids: (tokens,) int64, most votes first.
        counts: how many of them to look at (K), each at most their number.
        chunk: positions at a time.

    Returns:
        (counts, places) float64, shares from 0 to 1; nan at places that no answer reached.
    """
    places = 1 + max((int(entry.place.max()) for entry in positions if len(entry.place)), default=-1)
    seen, whole = torch.zeros(len(counts), places, dtype=torch.float64), torch.zeros(places, dtype=torch.float64)
    ids = ids.to(positions[0].place.device)
    with torch.no_grad():
        for teacher, base, place in _pieces(positions, chunk):
            target, student, place = head(teacher).float(), head(base).float(), place.cpu()
            whole.index_add_(0, place, divergence(student, target, "full", ids, 1).double().cpu())
            for row, count in enumerate(counts):
                part = divergence(student, target, "rest-bucket", ids[:count], 1).double().cpu()
                seen[row].index_add_(0, place, part)
    return seen / whole


def _pieces(positions: Sequence[VotePositions], chunk: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for entry in positions:
        yield from zip(entry.teacher.split(chunk), entry.base.split(chunk), entry.place.split(chunk), strict=True)


def _sums(
    positions: Sequence[VotePositions], head: Callable[[Tensor], Tensor], chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Over all positions, (vocabulary,) float64: the teacher's probabilities, the base's, and how far apart they are."""
    sums: list[Tensor] | None = None
    for teacher, base, _ in _pieces(positions, chunk):
        q, p = head(teacher).float().softmax(-1).double(), head(base).float().softmax(-1).double()
        found = [q.sum(0), p.sum(0), (q - p).abs().sum(0)]
        sums = found if sums is None else [before + more for before, more in zip(sums, found, strict=True)]
    assert sums is not None
    return sums[0], sums[1], sums[2]


def _ballots(
    positions: Sequence[VotePositions], head: Callable[[Tensor], Tensor], barred: Tensor, ballots: int, chunk: int
) -> Tensor:
    """(vocabulary,) float64: how many positions have a token among those whose log-probability the teacher raises most."""
    tally = torch.zeros(barred.shape[0], dtype=torch.long, device=barred.device)
    for teacher, base, _ in _pieces(positions, chunk):
        delta = head(teacher).float().log_softmax(-1) - head(base).float().log_softmax(-1)
        chosen = delta.masked_fill(barred, -torch.inf).topk(min(ballots, int((~barred).sum())), dim=-1).indices
        tally += torch.bincount(chosen.flatten(), minlength=tally.shape[0])
    return tally.double()

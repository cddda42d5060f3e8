"""How closely an artifact follows the trained policy: greedy answers, and the distribution of the first token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from safesteer_lite.export.gguf.convert import QUANTS
from safesteer_lite.models.thinking import Marks

FIRST_KL_ALLOWANCE = dict(zip(QUANTS, (0.05, 0.1, 0.1, 0.2, 0.5), strict=True))
"""Nats by which the first token of a GGUF file may differ more than merging allows. On 16 prompts the demo's files differed from
its F16 file by 0.002 (Q8_0, Q6_K), 0.008 (Q5_K_M) and 0.06 nats (Q4_K_M); a lost template or tokenizer costs whole nats."""


@dataclass(frozen=True)
class Witness:
    """What the trained policy does on a few prompts.

    Attributes:
        texts: the prompts.
        prompts: the same as token ids, with the chat template.
        answers: greedy answers as token ids.
        first: log-probabilities of the first answer token, (prompts, vocabulary) float32 on the CPU.
        switches: what the chat template was told besides each prompt.
        marks: how the model marks thoughts; None where it does not think before it answers.
    """

    texts: Sequence[str]
    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    first: Tensor
    switches: Mapping[str, bool] = field(default_factory=dict)
    marks: Marks | None = None


@dataclass(frozen=True)
class Agreement:
    """How an artifact compares with the trained policy.

    Attributes:
        prompts: how many prompts it rests on.
        same_answers: greedy answers that are the same to the last token.
        same_first: answers that begin with the same token.
        first_kl: mean KL(trained || artifact) of the first token, nats.
        first_kl_worst: the largest of them.
        first_kl_limit: what the mean may be.
    """

    prompts: int
    same_answers: int
    same_first: int
    first_kl: float
    first_kl_worst: float
    first_kl_limit: float

    def to_record(self) -> dict[str, float | None]:
        """As it is written to `artifacts.json`; JSON has no number for what is infinite."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}

    @property
    def problem(self) -> str:
        """What is wrong, or an empty string."""
        if self.first_kl <= self.first_kl_limit:
            return ""
        return (
            f"its first token differs from the trained model's by {self.first_kl:.3f} nats on average, more than "
            f"{self.first_kl_limit:g}"
        )


def first_token_kl(trained: Tensor, likeliest: Mapping[int, float]) -> float:
    """KL(trained || artifact) where only some of the artifact's tokens are known, and the rest counts as one; nats.

    Merging tokens never raises a divergence, so the true one is at least this.

    Args:
        trained: log-probabilities, (vocabulary,).
        likeliest: the artifact's log-probabilities by token id.

    Returns:
        The divergence; infinite where the artifact gives no usable number.
    """
    if not likeliest or not all(map(math.isfinite, likeliest.values())):
        return math.inf
    places = torch.tensor(sorted(likeliest))
    there = torch.tensor([likeliest[int(place)] for place in places], dtype=torch.float64)
    here = trained.double()[places]
    rest_here = float((1 - here.exp().sum()).clamp_min(1e-12))
    rest_there = float((1 - there.exp().sum()).clamp_min(1e-12))
    return max(float((here.exp() * (here - there)).sum()) + rest_here * math.log(rest_here / rest_there), 0.0)


def compare(
    witness: Witness, answers: Sequence[Sequence[int]], first: Sequence[Mapping[int, float]], limit: float
) -> Agreement:
    """Compare an artifact's answers with the trained policy's.

    Args:
        witness: the trained policy.
        answers: the artifact's greedy answers as token ids.
        first: its log-probabilities of the first token, by id.
        limit: nats that the mean divergence of the first token may have.
    """
    kls = [first_token_kl(known, now) for known, now in zip(witness.first, first, strict=True)]
    pairs = list(zip(witness.answers, answers, strict=True))
    return Agreement(
        len(pairs),
        sum(list(known) == list(now) for known, now in pairs),
        sum(known[0] == now[0] for known, now in pairs),
        sum(kls) / len(kls),
        max(kls),
        limit,
    )

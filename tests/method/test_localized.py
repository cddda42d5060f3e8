"""A loss on the safety tokens tells the other tokens apart by nothing but their probability.

In logits: outside S the gradient is the student's probability times one number of the position, whatever the teacher thinks
of each token. The ordinary reverse KL reads every token, which is what makes these tests able to fail.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from safesteer_lite.method.distill import Distillation
from safesteer_lite.method.objective import Objective, divergence
from safesteer_lite.method.policies import Steering
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.loaded import PlainModel
from tests import tiny
from tests.method.test_distill import ANCHORED, HARMLESS

LOCALIZED: tuple[Objective, ...] = ("paper", "generalized", "rest-bucket", "forward")


def spread_outside(logits: Tensor, gradient: Tensor, safety_tokens: Tensor) -> Tensor:
    """How far the gradient of tokens outside S is from one number of the position times their probability.

    Args:
        logits, gradient: (positions, vocabulary), the student's.
        safety_tokens: (K,) int64.

    Returns:
        (positions,) float64, largest minus smallest quotient as a share of the largest of all tokens; nan without gradient.
    """
    quotient = gradient.double() / logits.double().softmax(-1)
    outside = torch.ones(logits.shape[-1], dtype=torch.bool)
    outside[safety_tokens] = False
    rest = quotient[:, outside]
    return (rest.amax(-1) - rest.amin(-1)) / quotient.abs().amax(-1)


@pytest.mark.parametrize("objective", get_args(Objective))
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0], ids=["flat", "medium", "sharp"])
def test_only_a_localized_loss_pushes_the_tokens_outside_s_by_their_probability(
    objective: Objective, sharpness: float
) -> None:
    generator = torch.Generator().manual_seed(int(10 * sharpness))
    student, teacher = (sharpness * torch.randn(64, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    safety_tokens = torch.randperm(40, generator=generator)[:7]
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(student, teacher, objective, safety_tokens, 7).sum(), student)
    spread = spread_outside(student.detach(), gradient, safety_tokens)
    if objective in LOCALIZED:
        assert float(spread.max()) < 1e-9
    else:
        assert float(spread.min()) > 0.1


class WatchedHead(PlainModel):
    """Keeps the logits that a loss was taken from, and the loss's gradient in them."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.model.network, policy.tokenizer, policy.model.first_adapter_layer)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def logits(self, hidden: Tensor) -> Tensor:
        found = super().logits(hidden)
        if found.requires_grad:
            found.register_hook(lambda gradient: self.seen.append((found.detach(), gradient)))
        return found


@pytest.mark.parametrize("objective", [*LOCALIZED, "full"])
def test_training_on_safety_tokens_gives_the_others_one_gradient(
    objective: Objective, tiny_policy: tiny.Loader
) -> None:
    """Through the loop: rollouts, teacher, chunks and micro-batches, for harmful prompts and anchors, for three steps."""
    policy, safety_tokens = tiny_policy("qwen2"), torch.arange(20, 70)
    model = WatchedHead(policy)
    loop = Distillation(
        model,
        Steering(2, tiny.vector(0.4)),
        safety_tokens,
        [policy.encode(prompt) for prompt in tiny.PROMPTS],
        [policy.encode(prompt) for prompt in HARMLESS],
        replace(ANCHORED, objective=objective, anchor_objective=objective, anchor_weight=2.0, micro_batch=3, chunk=5),
    )
    results = [loop.step() for _ in range(3)]
    assert not math.isclose(results[-1].anchor_loss, 0, abs_tol=1e-6), (
        "anchors have moved, so their loss says something"
    )
    assert sum(len(logits) for logits, _ in model.seen) == sum(result.tokens for result in results)
    spread = torch.cat([spread_outside(logits, gradient, safety_tokens) for logits, gradient in model.seen])
    # In the first step student and base are the same function, so the anchors have no gradient to compare.
    spread = spread[spread.isfinite()]
    if objective == "full":
        assert float(spread.median()) > 0.1
    else:
        assert float(spread.max()) < 1e-3

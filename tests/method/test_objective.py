"""The divergences against numbers worked out by hand, their minima, and the chunked form against the plain one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safesteer_lite.method.objective import (
    OBJECTIVES,
    Objective,
    chunked_divergence,
    divergence,
    position_weights,
    refusal_score_rise,
)

P, Q = (0.5, 0.3, 0.2), (0.2, 0.5, 0.3)
FIRST, PAIR = torch.tensor([0]), torch.tensor([0, 1])
SOUND: tuple[Objective, ...] = ("generalized", "rest-bucket", "full", "top-k", "forward")


def logits_of(probabilities: tuple[float, ...], offset: float = 0.0) -> Tensor:
    """One position's logits, which softmax takes to `probabilities`."""
    return torch.tensor([probabilities]).log() + offset


# Each value is written out: for S = {0}, sum p log(p/q) = 0.5 log 2.5, and the mass outside S is 0.5 against 0.8.
BY_HAND: list[tuple[Objective, Tensor, int, float]] = [
    ("paper", FIRST, 0, 0.458145),
    ("paper", PAIR, 0, 0.304898),
    ("generalized", FIRST, 0, 0.158145),
    ("generalized", PAIR, 0, 0.204898),
    ("rest-bucket", FIRST, 0, 0.223143),
    ("rest-bucket", PAIR, 0, 0.223805),
    ("full", FIRST, 0, 0.223805),
    ("forward", FIRST, 0, 0.192745),
    ("forward", PAIR, 0, 0.193794),
    ("top-k", FIRST, 1, 0.082283),
    ("top-k", FIRST, 2, 0.223805),
]


@pytest.mark.parametrize(("objective", "tokens", "top_k", "expected"), BY_HAND)
def test_values_by_hand(objective: Objective, tokens: Tensor, top_k: int, expected: float) -> None:
    # Offsets cancel: probabilities are those of the full vocabulary, from unnormalised logits.
    value = divergence(logits_of(P, 3.0), logits_of(Q, -2.0), objective, tokens, top_k)
    assert value.shape == (1,)
    assert value.item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("objective", SOUND)
def test_sound_forms_are_zero_at_equality_and_positive_elsewhere(objective: Objective) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 40, generator=generator)
    tokens = torch.arange(0, 40, 5)
    assert divergence(logits, logits + 7, objective, tokens, 6).abs().max() < 2e-6
    other = logits + torch.randn(200, 40, generator=generator)
    values = divergence(logits, other, objective, tokens, 6)
    assert values.min() > 0 and values.mean() > 0.02


@pytest.mark.parametrize("objective", ["generalized", "rest-bucket", "forward"])
def test_sound_slices_are_least_at_the_teacher_on_the_safety_tokens(objective: Objective) -> None:
    """The tokens outside S may be spread in any way: value and gradient stay zero."""
    student = torch.tensor([[0.3, 0.1, 0.45, 0.15]]).log().requires_grad_()
    teacher = torch.tensor([[0.3, 0.1, 0.05, 0.55]]).log()
    value = divergence(student, teacher, objective, PAIR, 0).sum()
    (gradient,) = torch.autograd.grad(value, student)
    assert abs(value.item()) < 1e-6
    assert gradient.abs().max() < 1e-6
    # The authors' form pulls the safety tokens down there, although they are right already.
    paper = divergence(student, teacher, "paper", PAIR, 0).sum()
    (gradient,) = torch.autograd.grad(paper, student)
    assert gradient[0, :2].min() > 0.05


def test_the_paper_form_is_negative_and_least_at_the_teacher_over_e() -> None:
    q = 0.6
    grid = torch.linspace(0.001, 0.999, 9981)
    student = torch.stack([grid, (1 - grid) * 0.3, (1 - grid) * 0.7], dim=-1).log()
    teacher = logits_of((q, 0.1, 0.3)).expand(len(grid), -1)
    values = divergence(student, teacher, "paper", FIRST, 0)
    assert grid[values.argmin()].item() == pytest.approx(q / math.e, abs=2e-3)
    assert values.min().item() == pytest.approx(-q / math.e, abs=1e-5)
    generalized = divergence(student, teacher, "generalized", FIRST, 0)
    assert grid[generalized.argmin()].item() == pytest.approx(q, abs=2e-3)


def test_what_the_student_never_says_is_learnt_by_the_forward_divergence_alone() -> None:
    """After "Sure, here is" a refusal's first word is as good as impossible: the reverse divergence weighs it by that."""
    student = torch.tensor([[1e-7, 0.6, 0.4 - 1e-7]]).log().requires_grad_()
    teacher = torch.tensor([[0.9, 0.05, 0.05]]).log()
    pull = {}
    for objective in ("rest-bucket", "forward"):
        value = divergence(student, teacher, objective, FIRST, 0).sum()
        pull[objective] = -float(torch.autograd.grad(value, student)[0][0, 0])
    assert 0 < pull["rest-bucket"] < 1e-5
    assert pull["forward"] == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_agree_with_finite_differences(objective: Objective) -> None:
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(3, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    tokens = torch.tensor([1, 4, 6])
    assert torch.autograd.gradcheck(lambda logits: divergence(logits, teacher, objective, tokens, 3), (student,))


def problem(positions: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Student and teacher hidden states, weights and a head."""
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(positions, width, generator=generator).to(dtype).requires_grad_()
    teacher = torch.randn(positions, width, generator=generator).to(dtype)
    weights = torch.rand(positions, generator=generator)
    head = torch.randn(vocabulary, width, generator=generator).to(dtype)
    return student, teacher, weights, head


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("chunk", [1, 3, 8, 23, 24, 1000])
def test_chunked_equals_plain_in_value_and_gradient(objective: Objective, chunk: int) -> None:
    student, teacher, weights, head = problem(23, 6, 50)
    tokens = torch.tensor([0, 3, 30, 49])
    plain = (divergence(student @ head.T, teacher @ head.T, objective, tokens, 5) * weights).sum()
    (expected,) = torch.autograd.grad(plain * 2.5, student)
    value = chunked_divergence(student, teacher, weights, lambda rows: rows @ head.T, objective, tokens, 5, chunk)
    (gradient,) = torch.autograd.grad(value * 2.5, student)
    torch.testing.assert_close(value, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_chunked_in_bf16_returns_float32_and_a_bf16_gradient() -> None:
    student, teacher, weights, head = problem(12, 6, 30, torch.bfloat16)
    value = chunked_divergence(student, teacher, weights, lambda rows: rows @ head.T, "full", FIRST, 5, 5)
    value.backward()
    assert value.dtype == torch.float32
    assert student.grad is not None and student.grad.dtype == torch.bfloat16
    exact = student.detach().float().requires_grad_()
    wide = head.float()
    plain = (divergence(exact @ wide.T, teacher.float() @ wide.T, "full", FIRST, 5) * weights).sum()
    (expected,) = torch.autograd.grad(plain, exact)
    assert value.item() == pytest.approx(plain.item(), rel=0.02)
    assert torch.nn.functional.cosine_similarity(student.grad.float().flatten(), expected.flatten(), dim=0) > 0.999


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns, backward included."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_tensor_is_larger_than_a_chunk_of_logits(objective: Objective) -> None:
    positions, vocabulary, chunk = 64, 500, 8
    student, teacher, weights, head = problem(positions, 4, vocabulary)
    tokens = torch.tensor([0, 3, 30, 49])
    with LargestTensor() as seen:
        chunked_divergence(
            student, teacher, weights, lambda rows: rows @ head.T, objective, tokens, 5, chunk
        ).backward()
    assert seen.elements == chunk * vocabulary
    with LargestTensor() as seen:
        (divergence(student @ head.T, teacher @ head.T, objective, tokens, 5) * weights).sum().backward()
    assert seen.elements == positions * vocabulary


def test_position_weights_make_a_mean_of_means() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    values = torch.tensor([[1.0, 2.0, 3.0, 6.0], [10.0, 0.0, 0.0, 0.0], [4.0, 8.0, 0.0, 0.0]])
    weights = position_weights(mask, 3)
    # Means 3, 10 and 6 of the rollouts, and their mean.
    assert float((values[mask] * weights).sum()) == pytest.approx(19 / 3)
    parts = sum(float((values[row][mask[row]] * position_weights(mask[row][None], 3)).sum()) for row in range(3))
    assert parts == pytest.approx(19 / 3)
    empty = position_weights(torch.tensor([[False, False], [True, False]]), 2)
    assert empty.tolist() == [0.5]


def test_a_half_life_halves_each_later_position_and_keeps_the_mean() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    weights = position_weights(mask, 2, 1.0)
    # 1, 1/2 and 1/4 make 7/4; every rollout still counts as one of two.
    assert weights.tolist() == pytest.approx([4 / 14, 2 / 14, 1 / 14, 1 / 2])
    assert torch.equal(position_weights(mask, 2, 0.0), position_weights(mask, 2))


def test_the_refusal_score_rise_of_hand_computed_logits() -> None:
    """Log-odds of token 0: from log(1 / 2) to log(3 / 2), unchanged where all logits move together, and down by log(3)."""
    base = torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 5.0], [math.log(3.0), 0.0, 0.0]])
    student = torch.tensor([[math.log(3.0), 0.0, 0.0], [7.0, 9.0, 12.0], [0.0, 0.0, 0.0]])
    found = refusal_score_rise(student, base, torch.tensor([0]))
    assert found.tolist() == pytest.approx([math.log(3.0) ** 2 / 2, 0.0, 0.0], abs=1e-6)


def test_a_rise_of_a_rare_refusal_counts_where_the_divergence_hardly_sees_it() -> None:
    """From 0.1 % to 1 %: the divergence is about 0.015 nats, the score has moved by 2.3."""
    before, after = (torch.tensor([[share, 1 - share]]).log() for share in (0.001, 0.01))
    divergence_seen = float(divergence(after, before, "full", torch.tensor([0]), 1))
    assert divergence_seen < 0.02
    assert float(refusal_score_rise(after, before, torch.tensor([0]))) > 2.5

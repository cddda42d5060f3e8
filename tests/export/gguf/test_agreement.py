"""The comparison with the trained policy: exact where it can be, never above the true divergence, strict where it must."""

from __future__ import annotations

import math

import pytest
import torch

from safesteer_lite.export.gguf.agreement import FIRST_KL_ALLOWANCE, Witness, compare, first_token_kl
from safesteer_lite.export.gguf.convert import QUANTS


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    logits = 2 * torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = logits.log_softmax(-1)
    return first, second


def likeliest(distribution: torch.Tensor, count: int) -> dict[int, float]:
    top = distribution.topk(count)
    return {int(place): float(value) for place, value in zip(top.indices, top.values, strict=True)}


def test_the_divergence_is_exact_with_all_tokens_and_a_lower_bound_with_some() -> None:
    trained, other = distributions()
    true = float((trained.exp() * (trained - other)).sum())
    found = [first_token_kl(trained, likeliest(other, count)) for count in (50, 40, 20, 5)]
    assert found[0] == pytest.approx(true, abs=1e-9)
    assert found == sorted(found, reverse=True) and found[-1] > 0.1
    assert first_token_kl(trained, likeliest(trained, 7)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("given", [{}, {3: math.nan}, {3: -math.inf, 4: -0.1}])
def test_no_usable_number_is_no_agreement(given: dict[int, float]) -> None:
    assert first_token_kl(distributions()[0], given) == math.inf


def test_answers_are_counted_and_the_limit_decides() -> None:
    trained, other = distributions()
    witness = Witness(["a", "b"], [[1], [2]], [[5, 6], [7, 8]], torch.stack([trained, trained]))
    first = [likeliest(trained, 20), likeliest(other, 20)]
    kl = first_token_kl(trained, first[1])
    found = compare(witness, [(5, 6), (7, 9)], first, limit=kl)
    assert (found.prompts, found.same_answers, found.same_first) == (2, 1, 2)
    assert found.first_kl == pytest.approx(kl / 2) and found.first_kl_worst == pytest.approx(kl)
    assert not found.problem
    assert "nats on average, more than 0.01" in compare(witness, [(5,), (9,)], first, limit=0.01).problem
    assert compare(witness, [(5,), (9,)], [{}, first[1]], limit=100.0).problem


def test_every_quantisation_has_its_allowance_and_fewer_bits_get_more() -> None:
    assert tuple(FIRST_KL_ALLOWANCE) == QUANTS
    assert list(FIRST_KL_ALLOWANCE.values()) == sorted(FIRST_KL_ALLOWANCE.values())

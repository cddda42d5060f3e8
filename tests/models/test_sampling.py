"""Sampling: equal to transformers' own greedy search, true to a planted distribution, blind to who shares the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from safesteer_lite.method import policies
from safesteer_lite.method.policies import Batch, Completions, Steering
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.attention import GROUPED
from safesteer_lite.models.sampling import draw
from tests import tiny

NEW = 16


def by_transformers(policy: Policy, batch: Batch, ends: list[int]) -> Tensor:
    """Greedy continuation by `transformers` with its own attention and cache, padded with the pad token."""
    policy.model.causal.set_attn_implementation("eager")
    tokens: Tensor = policy.model.causal.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=policy.tokenizer.pad_token_id,
    )
    policy.model.causal.set_attn_implementation(GROUPED)
    return tokens[:, batch.input_ids.shape[1] :]


def ours(policy: Policy, batch: Batch, ends: frozenset[int], temperature: float = 0.0, repeats: int = 1) -> Completions:
    """A continuation by this project, with chosen ends of turn."""
    policy.model.end_of_turn = ends
    return policy.model.generate(batch, NEW, temperature, torch.Generator().manual_seed(4), repeats)


def ends_that_bite(policy: Policy, batch: Batch) -> list[int]:
    """Ends of turn at which the greedy answers of a random model stop after unequal lengths, some not at all."""
    free = by_transformers(policy, batch, [policy.tokenizer.eos_token_id])
    return [int(free[0, 1]), int(free[1, 6]), int(free[3, 9])]


@pytest.mark.parametrize("architecture", [*tiny.ARCHITECTURES, *tiny.FURTHER])
def test_greedy_equals_transformers_token_for_token(architecture: str, tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy(architecture, filled=True)
    batch = tiny.prompt_batch(policy)
    ends = ends_that_bite(policy, batch)
    expected = by_transformers(policy, batch, ends)
    completions = ours(policy, batch, frozenset(ends))
    assert torch.equal(completions.tokens, expected)
    lengths = completions.mask.sum(-1)
    assert len(set(lengths.tolist())) >= 3, "the test needs answers that end at different places"
    for tokens, mask, length in zip(completions.tokens, completions.mask, lengths.tolist(), strict=True):
        # True up to and including the first end of turn, False after it.
        assert mask.tolist() == [True] * length + [False] * (len(mask) - length)
        ended = torch.isin(tokens[mask], torch.tensor(ends))
        assert not ended[:-1].any() and (bool(ended[-1]) or length == NEW)
        assert (tokens[~mask] == policy.tokenizer.pad_token_id).all()


def test_rows_that_end_do_not_change_the_answers_of_the_others(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy()
    batch = tiny.prompt_batch(policy)
    ends = frozenset(ends_that_bite(policy, batch))
    rows: list[int] = []
    handle = policy.model.layers[0].register_forward_pre_hook(
        lambda _, __, arguments: rows.append(arguments["position_ids"].shape[0]), with_kwargs=True
    )
    together = ours(policy, batch, ends)
    handle.remove()
    assert rows[1] == len(batch) and rows[-1] < len(batch), "no row has left the batch"
    for row, prompt in enumerate(tiny.PROMPTS):
        alone = ours(policy, policy.encode(prompt), ends)
        length = int(alone.mask.sum())
        assert together.tokens[row][together.mask[row]].tolist() == alone.tokens[0, :length].tolist()


def test_completions_end_where_the_longest_does(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy()
    batch = policy.encode(tiny.PROMPTS[0])
    first = int(ours(policy, batch, frozenset({-1})).tokens[0, 0])
    completions = ours(policy, batch, frozenset({first}))
    assert completions.tokens.tolist() == [[first]] and completions.mask.tolist() == [[True]]
    assert policy.model.generate(batch, 0, 0.0, None, 2).tokens.shape == (2, 0)


def test_answers_end_where_they_are_said_to_and_the_others_go_on(tiny_policy: tiny.Loader) -> None:
    """At the second of some tokens, which comes at another place in each row, or never."""
    policy = tiny_policy("llama", filled=True)
    batch, marks = tiny.prompt_batch(policy), torch.arange(0, 320, 4)
    whole = policy.model.generate(batch, NEW, 0.0, None, 1)
    found = policy.model.generate(batch, NEW, 0.0, None, 1, lambda tokens: torch.isin(tokens, marks).sum(-1) >= 2)
    lengths = []
    for row, (tokens, mask) in enumerate(zip(whole.tokens, whole.mask, strict=True)):
        said = tokens[mask]
        second = (torch.isin(said, marks).cumsum(0) >= 2).nonzero()
        expected = said[: int(second[0]) + 1] if len(second) else said
        assert torch.equal(found.tokens[row][found.mask[row]], expected)
        lengths.append(len(expected))
    assert len(set(lengths)) > 2


def test_a_fenced_block_has_ended_at_its_second_fence(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy("llama")
    policy.tokenizer.add_tokens(["```"])
    ended = policy.first_block_ended()
    for text, complete in (
        ("Here:\n```python\nx = 1", False),
        ("```\nx = 1\n```", True),
        ("``` a ``` b ```", True),
        ("x", False),
    ):
        ids = policy.tokenizer(text, return_tensors="pt").input_ids
        assert ended(ids).tolist() == [complete]


def test_repeats_read_the_prompt_once_and_lie_side_by_side(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy()
    batch = tiny.prompt_batch(policy)
    shapes: list[torch.Size] = []
    handle = policy.model.layers[0].register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[:2]))
    repeated = ours(policy, batch, frozenset({-1}), repeats=3)
    handle.remove()
    length = batch.input_ids.shape[1] - batch.prefix
    assert shapes[:3] == [(1, batch.prefix), (5, length), (15, 1)]
    plain = ours(policy, batch, frozenset({-1}))
    assert torch.equal(repeated.tokens, plain.tokens.repeat_interleave(3, dim=0))
    sampled = ours(policy, batch, frozenset({-1}), temperature=1.0, repeats=3).tokens
    assert not torch.equal(sampled[0], sampled[1])


def test_the_generator_decides_the_sample(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy()
    batch = tiny.prompt_batch(policy)

    def sample(seed: int) -> Tensor:
        return policy.model.generate(batch, NEW, 1.0, torch.Generator().manual_seed(seed), 2).tokens

    torch.manual_seed(0)
    first = sample(1)
    torch.manual_seed(99)
    assert torch.equal(sample(1), first)
    assert not torch.equal(sample(2)[:, :4], first[:, :4])


def test_sampling_draws_the_same_for_a_row_whoever_has_left(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy()
    batch = tiny.prompt_batch(policy)
    free = ours(policy, batch, frozenset({-1}), temperature=1.0, repeats=2)
    end = int(free.tokens[0, 1])
    stopped = ours(policy, batch, frozenset({end}), temperature=1.0, repeats=2)
    for row in range(10):
        length = int(stopped.mask[row].sum())
        assert stopped.tokens[row, :length].tolist() == free.tokens[row, :length].tolist()
    assert int(stopped.mask[0].sum()) == 2


def test_a_steered_model_is_sampled_steered(tiny_policy: tiny.Loader) -> None:
    """Each greedy token is the steered full forward's likeliest one, far beyond the prompt."""
    policy = tiny_policy(filled=True)
    batch = tiny.prompt_batch(policy)
    with policies.teacher(policy.model, Steering(1, tiny.vector(1.0))), torch.no_grad():
        steered = ours(policy, batch, frozenset({-1}))
        logits = policy.model.logits(policy.model.final(policy.model.start(steered.after(batch))))
    assert torch.equal(logits[:, -NEW - 1 : -1].argmax(-1), steered.tokens)
    assert not torch.equal(steered.tokens, ours(policy, batch, frozenset({-1})).tokens)


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Pearson's statistic."""
    return float(((counts - expected).square() / expected).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draw_recovers_a_planted_distribution(temperature: float) -> None:
    probabilities = torch.tensor([0.4, 0.02, 0.25, 0.08, 0.15, 0.1], dtype=torch.float64)
    expected = probabilities.pow(1 / temperature)
    expected = expected / expected.sum()
    n = 40_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(8))
    logits = probabilities.log().float().expand(n, -1) + 3.0
    counts = torch.bincount(draw(logits, temperature, uniform), minlength=6).double()
    # 5 degrees of freedom: 20.5 is exceeded by chance once in a thousand seeds.
    assert chi_square(counts, expected * n) < 20.5
    wrong = torch.full((6,), n / 6, dtype=torch.float64)
    assert chi_square(counts, wrong) > 1000


def test_draw_inverts_the_cumulative_distribution_at_its_edges() -> None:
    logits = torch.tensor([0.25, 0.0, 0.5, 0.25, 0.0]).log()
    below_one = float(torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)))
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, below_one])
    assert draw(logits.expand(6, -1), 1.0, uniform).tolist() == [0, 0, 2, 2, 3, 3]


def test_draw_never_takes_an_impossible_token() -> None:
    """The largest random number times a sum that rounding left above 1 must not run past the last possible token."""
    below_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    logits = torch.randn(2000, 300, generator=torch.Generator().manual_seed(2))
    logits[:, 200:] = -torch.inf
    assert int(draw(logits, 1.0, below_one.expand(2000)).max()) < 200


def test_draw_at_temperature_zero_is_greedy() -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw(logits, 0.0, None), logits.argmax(-1))
    cold: Any = draw(logits.double() * 1000, 0.01, torch.rand(50))
    assert torch.equal(cold, logits.argmax(-1))

"""The yardstick and ours compute the same: scores of every candidate, votes, loss and gradients, on a tiny random model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from safesteer_lite.method import directions as method
from safesteer_lite.method import tokens as voting
from safesteer_lite.method.distill import Distillation
from safesteer_lite.method.policies import Steering, teacher
from safesteer_lite.models.assistant import Policy
from tests import tiny
from tests.benchmarks import plain_procedure as authors
from tests.benchmarks.reference_sides import compare_gradients, gradients_of, spread
from tests.method.test_distill import SAFETY_TOKENS
from tests.recipe import RECIPE

REFUSAL = torch.tensor([40, 41, 200])
STEER = Steering(2, tiny.vector(1.0))


def whole_model(policy: Policy) -> Any:
    """The causal language model below the adapter, as transformers has it."""
    return policy.model.causal


def test_every_candidate_scores_the_same_and_the_same_one_is_chosen(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy("qwen2")
    positions = policy.template_positions
    prompts, batch = authors.encode(policy.tokenizer, tiny.PROMPTS), tiny.prompt_batch(policy)
    with torch.no_grad():
        seen, last = authors.block_inputs(whole_model(policy), prompts, positions)
    activations, scores = method.read_prompts(policy.model, [batch], positions, REFUSAL, lambda done: None)
    torch.testing.assert_close(activations.values, seen.float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scores.double(), authors.refusal_log_odds(last, REFUSAL), rtol=1e-3, atol=1e-3)

    vectors = torch.randn(positions, tiny.LAYERS, tiny.WIDTH, generator=torch.Generator().manual_seed(3))
    every = [(position - positions, layer) for position in range(positions) for layer in range(tiny.LAYERS)]
    with torch.no_grad():
        known = authors.sweep(whole_model(policy), vectors, every, prompts, prompts, REFUSAL, 1.5)
    candidates = [method.Candidate(position, layer, 0.0) for position, layer in every]
    found = method.ablation_scores(policy.model, vectors, candidates, [batch], [batch], REFUSAL, lambda done: None)
    found = method.induce_scores(policy.model, 1.5 * vectors, found, [batch], REFUSAL, lambda done: None)
    for one, two in zip(known, found, strict=True):
        assert (two.bypass, two.induce, two.kl) == pytest.approx((one.bypass, one.induce, one.kl), rel=1e-2, abs=1e-3)

    # Limits that some candidates meet and some do not, so that there is something to choose.
    limit = float(torch.tensor([entry.kl for entry in known]).quantile(0.6))
    shift = float(torch.tensor([entry.induce for entry in known]).quantile(0.4))
    shifted = [replace(entry, induce=entry.induce - shift) for entry in known]
    best = authors.choose(shifted, tiny.LAYERS, 1.0, limit)
    ours = [replace(entry, induce=(entry.induce or 0.0) - shift) for entry in found]
    judged = method.judge_candidates(ours, limit)[0]
    assert best is not None and not judged.failed
    assert (best.position, best.layer) == (judged.position, judged.layer)
    assert 0 < len([entry for entry in shifted if entry.kl < limit and entry.induce > 0]) < len(every)


def test_the_same_tokens_win_the_vote(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy("qwen2")
    model, batch = policy.model, tiny.prompt_batch(policy)
    # Ends of turn that the model does sample, so that positions are dropped.
    model.end_of_turn = frozenset(range(0, 320, 11))
    samples, horizon = 4, 6
    positions = voting.collect(
        model, STEER, batch, samples=samples, horizon=horizon, chance=torch.Generator().manual_seed(1)
    )
    ours = voting.vote(
        [positions],
        model.logits,
        by="ratio",
        excluded=model.special_ids,
        minimum_probability=1e-4,
        ballots=20,
        count=15,
        chunk=7,
    )
    with torch.no_grad(), teacher(model, STEER):
        again = model.generate(batch, horizon - 1, 1.0, torch.Generator().manual_seed(1), samples)
    rows = batch.repeat(samples)
    given = [(authors.Tokens(rows.input_ids, rows.attention_mask), again.tokens, again.mask)]
    ends = sorted(model.end_of_turn)
    with torch.no_grad(), model.adapters_off():
        read = authors.read_policies(whole_model(policy), given, STEER.layer, STEER.vector, horizon, ends)
    assert 0 < ours.positions == int(read[2].sum()) < read[2].numel()
    assert ours.ids.tolist() == authors.vote(*read, sorted(model.special_ids), 1e-4, 20, 15)


def test_loss_and_gradients_are_the_same(tiny_policy: tiny.Loader) -> None:
    policy, other, base = (tiny_policy("qwen2", filled=filled) for filled in (True, True, False))
    policy.model.end_of_turn = frozenset(range(0, 320, 9))
    recipe = replace(RECIPE, objective="paper", micro_batch=3)
    loop = Distillation(policy.model, STEER, SAFETY_TOKENS, [], [], recipe)
    prompts = tiny.prompt_batch(policy)
    rollouts = loop.sample(prompts, 2, stream=0)
    repeated = prompts.repeat(2)
    loss = loop.backward(repeated, rollouts, "harmful")
    known = authors.backward(
        other.model.network,
        whole_model(base),
        authors.Tokens(repeated.input_ids, repeated.attention_mask),
        rollouts.tokens,
        rollouts.mask,
        STEER.layer,
        STEER.vector,
        SAFETY_TOKENS,
        4,
    )
    assert loss == pytest.approx(known, rel=1e-4)

    named = [(name, value.grad) for name, value in other.model.network.named_parameters() if value.requires_grad]
    theirs = {name: gradient for name, gradient in named if gradient is not None}
    found = compare_gradients(gradients_of(policy.model, loop), theirs)
    assert len(theirs) == tiny.LAYERS * 7 * 2
    assert found["gradient_distance"] < 1e-3 and found["gradient_cosine"] > 0.99999


def test_a_part_of_the_sweep_is_spread_evenly_and_has_our_choice() -> None:
    every = [(position, layer) for position in (-2, -1) for layer in range(10)]
    assert spread(every, 0, (-1, 3)) == spread(every, 99, (-1, 3)) == every
    part = spread(every, 5, (-1, 3))
    assert (-1, 3) in part and {every[0], every[-1]} <= set(part) and len(part) == 5

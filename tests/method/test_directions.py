"""Directions: planted ones are found, shortcuts equal the long way, and the choice gives its reasons."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from safesteer_lite.method import directions, policies, steering
from safesteer_lite.method.directions import Activations, Candidate
from safesteer_lite.method.policies import Batch, Steering
from safesteer_lite.models.assistant import Policy
from tests import tiny

REFUSING = 7
HARMFUL_WORDS, HARMLESS_WORDS = range(20, 60), range(60, 100)
TAIL = [101, 102, 103]


def quiet(done: int) -> None:
    """A progress callback that does nothing."""


def words(ids: range, count: int, seed: int) -> list[Batch]:
    """`count` prompts of six words out of `ids` and the three template tokens, four a batch."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(ids.start, ids.stop, (count, 6), generator=generator)
    rows = torch.cat([picks, torch.tensor(TAIL).expand(count, -1)], dim=1)
    return [Batch(part, torch.ones_like(part)) for part in rows.split(4)]


@pytest.fixture(scope="module")
def planted(tiny_policy: tiny.Loader) -> tuple[Policy, Tensor]:
    """A model whose harmful words carry one known direction, which attention copies to later positions.

    Attention is uniform (queries are zero) and copies the first half of the residual stream; the MLPs are silent. The
    head's row of the refusing token is the direction, so the model refuses as far as its last position carries it.
    """
    policy = tiny_policy("llama")
    half, head_width = tiny.WIDTH // 2, tiny.WIDTH // 4
    generator = torch.Generator().manual_seed(0)
    direction = torch.zeros(tiny.WIDTH)
    direction[:half] = torch.randn(half, generator=generator)
    direction /= direction.norm()
    weights = dict(policy.model.causal.named_parameters())
    with torch.no_grad():
        embedding = weights["model.embed_tokens.weight"]
        embedding.copy_(torch.randn(embedding.shape, generator=generator) * 0.1)
        embedding -= (embedding @ direction).unsqueeze(-1) * direction
        embedding[HARMFUL_WORDS.start : HARMFUL_WORDS.stop] += direction
        embedding[HARMLESS_WORDS.start : HARMLESS_WORDS.stop, -1] += 1
        weights["lm_head.weight"].normal_(std=0.2, generator=generator)
        weights["lm_head.weight"][REFUSING] = 2 * direction
        for layer in range(tiny.LAYERS):
            block = f"model.layers.{layer}"
            weights[f"{block}.self_attn.q_proj.base_layer.weight"].zero_()
            weights[f"{block}.mlp.down_proj.base_layer.weight"].zero_()
            value = weights[f"{block}.self_attn.v_proj.base_layer.weight"].zero_()
            value[:, :half] = torch.eye(half)
            # Query heads 0 and 1 read the first value head, 2 and 3 the second: one of each pair writes it out.
            output = weights[f"{block}.self_attn.o_proj.base_layer.weight"].zero_()
            output[:head_width, :head_width] = torch.eye(head_width)
            output[head_width:half, 2 * head_width : 3 * head_width] = torch.eye(head_width)
    return policy, direction


def test_a_planted_direction_is_found_and_does_what_it_should(planted: tuple[Policy, Tensor]) -> None:
    policy, truth = planted
    model, refusing = policy.model, torch.tensor([REFUSING])
    read = [
        directions.read_prompts(model, words(ids, 16, seed), len(TAIL), refusing, quiet)
        for ids, seed in ((HARMFUL_WORDS, 1), (HARMLESS_WORDS, 2), (HARMFUL_WORDS, 3), (HARMLESS_WORDS, 4))
    ]
    (harmful, harmful_scores), (harmless, harmless_scores), (held_harmful, _), (held_harmless, _) = read
    assert harmful.values.shape == (16, len(TAIL), tiny.LAYERS, tiny.WIDTH)
    assert harmful_scores.mean() > harmless_scores.mean() + 2
    found = directions.mean_difference(harmful, harmless)
    # At the lowest block's input the template tokens know nothing of the text; above, attention has told them.
    assert found[:, 0].abs().max() < 1e-6
    cosine = torch.nn.functional.cosine_similarity(found[:, 1:], truth, dim=-1)
    assert cosine.min() > 0.95
    scores = directions.separation(found, held_harmful, held_harmless)
    assert scores[:, 1:].min() > 5 and scores[:, 0].abs().max() < 1e-3

    candidates = directions.shortlist(scores, 0.8, 3)
    harmless_batches = words(HARMLESS_WORDS, 8, 5)
    candidates = directions.induce_scores(model, found, candidates, harmless_batches, refusing, quiet)
    candidates = directions.ablation_scores(
        model, found, candidates, words(HARMFUL_WORDS, 8, 6), harmless_batches, refusing, quiet
    )
    for candidate in candidates:
        assert candidate.induce is not None and candidate.bypass is not None
        assert candidate.induce > harmless_scores.mean() + 1
        assert candidate.bypass < harmful_scores.mean() - 1
    chosen = found[candidates[0].position, candidates[0].layer]
    with torch.no_grad(), policies.teacher(model, Steering(candidates[0].layer, 4 * chosen)):
        assert all((policies.last_logits(model, batch).argmax(-1) == REFUSING).all() for batch in harmless_batches)


def test_read_prompts_keeps_order_and_reads_the_base(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy("qwen2", filled=True)
    whole = tiny.prompt_batch(policy)
    progress: list[int] = []
    seen, scores = directions.read_prompts(
        policy.model, [whole.rows(0, 2), whole.rows(2, 5)], 4, torch.tensor([3, 9]), progress.append
    )
    assert progress == [2, 5]
    with torch.no_grad(), policies.base(policy.model):
        output = policy.model.causal(
            input_ids=whole.input_ids,
            attention_mask=whole.attention_mask,
            position_ids=(whole.attention_mask.cumsum(-1) - 1).clamp_min(0),
            output_hidden_states=True,
        )
    expected = torch.stack(output.hidden_states[: tiny.LAYERS], dim=2)[:, -4:]
    torch.testing.assert_close(seen.values, expected, rtol=1e-4, atol=1e-4)
    probability = output.logits[:, -1].softmax(-1)[:, [3, 9]].sum(-1)
    torch.testing.assert_close(scores, (probability / (1 - probability)).log(), rtol=1e-4, atol=1e-4)


def test_the_mean_is_accumulated_in_float64() -> None:
    values = torch.tensor([1e8, 1.0, -1e8, 0.0]).reshape(4, 1, 1, 1).expand(4, 2, 3, 5)
    difference = directions.mean_difference(Activations(values), Activations(torch.zeros(2, 2, 3, 5)))
    assert difference.shape == (2, 3, 5) and difference.dtype == torch.float32
    assert torch.equal(difference, torch.full((2, 3, 5), 0.25))


def test_refusal_score_by_hand() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.97, 0.01, 0.01, 0.01]]).log() + 5
    scores = directions.refusal_score(logits, torch.tensor([0, 2]))
    assert scores.tolist() == pytest.approx([math.log(0.4 / 0.6), math.log(0.98 / 0.02)], abs=1e-5)
    # Certainty stays finite, where log(1 - p) in float32 would not: 1 - p is 4e-22 here.
    sure = directions.refusal_score(torch.tensor([[50.0, 0.0, 0.0]]), torch.tensor([0]))
    assert float(sure) == pytest.approx(50 - math.log(2), abs=1e-4)


def test_separation_by_hand() -> None:
    """Projections 1, 3 against -1, 1 on the first axis: means 2 apart 0, variances 2 and 2, so 2 / sqrt(2)."""
    harmful = torch.tensor([[1.0, 9.0], [3.0, -9.0]]).reshape(2, 1, 1, 2)
    harmless = torch.tensor([[-1.0, 5.0], [1.0, 7.0]]).reshape(2, 1, 1, 2)
    direction = torch.tensor([[[40.0, 0.0]]])
    score = directions.separation(direction, Activations(harmful), Activations(harmless))
    assert score.tolist() == [[pytest.approx(math.sqrt(2))]]


def test_shortlist_is_ordered_and_keeps_to_the_depth() -> None:
    scores = torch.tensor([[1.0, 5.0, 3.0, 9.0, 9.0], [2.0, float("nan"), 4.0, 7.0, 9.0]])
    chosen = directions.shortlist(scores, 0.8, 3)
    assert [(entry.position, entry.layer) for entry in chosen] == [(-2, 3), (-1, 3), (-2, 1)]
    everything = directions.shortlist(scores, 0.6, 0)
    assert [entry.separation for entry in everything] == [5, 4, 3, 2, 1]
    assert all(entry.layer < 3 for entry in everything)


@pytest.fixture
def random_case(tiny_policy: tiny.Loader) -> tuple[Policy, Tensor, list[Candidate], list[Batch]]:
    """A random model, random directions, candidates in no order of layers, and prompts in unequal batches."""
    policy = tiny_policy("qwen3", filled=True)
    found = torch.randn(4, tiny.LAYERS, tiny.WIDTH, generator=torch.Generator().manual_seed(7))
    candidates = [Candidate(-1, 2, 1.0), Candidate(-4, 0, 1.0), Candidate(-2, 3, 1.0), Candidate(-1, 0, 1.0)]
    whole = tiny.prompt_batch(policy)
    return policy, found, candidates, [whole.rows(0, 3), whole.rows(3, 5)]


def test_branching_equals_full_forwards_with_the_direction_added(
    random_case: tuple[Policy, Tensor, list[Candidate], list[Batch]],
) -> None:
    policy, found, candidates, batches = random_case
    model, refusing = policy.model, torch.tensor([3, 9])
    scored = directions.induce_scores(model, found, candidates, batches, refusing, quiet)
    assert [(entry.position, entry.layer) for entry in scored] == [(e.position, e.layer) for e in candidates]
    for candidate in scored:
        vector = found[candidate.position, candidate.layer]
        with torch.no_grad(), policies.base(model), steering.add(model.layers, candidate.layer, vector):
            each = [directions.refusal_score(policies.last_logits(model, batch), refusing) for batch in batches]
        # The mean is over prompts, not over batches.
        assert candidate.induce == pytest.approx(float(torch.cat(each).mean()), abs=1e-4)


def ablated_logits(policy: Policy, batch: Batch, direction: Tensor) -> Tensor:
    """Last logits with `direction` projected out everywhere, written out block by block without hooks."""
    unit = direction / direction.norm()

    def clean(hidden: Tensor) -> Tensor:
        return hidden - torch.outer((hidden @ unit).flatten(), unit).reshape(hidden.shape)

    model = policy.model
    start = model.start(Batch(batch.input_ids, batch.attention_mask))
    hidden = start.hidden
    for block in model.decoder.layers:
        hidden = clean(hidden)
        attended, _ = block.self_attn(block.input_layernorm(hidden), **start.arguments["full_attention"])
        hidden = hidden + clean(attended)
        hidden = hidden + clean(block.mlp(block.post_attention_layernorm(hidden)))
    return model.logits(model.decoder.norm(hidden)[:, -1])


def test_ablation_scores_equal_a_naive_ablation(
    random_case: tuple[Policy, Tensor, list[Candidate], list[Batch]],
) -> None:
    policy, found, candidates, batches = random_case
    model, refusing = policy.model, torch.tensor([3, 9])
    harmless = list(reversed(batches))
    scored = directions.ablation_scores(model, found, candidates, batches, harmless, refusing, quiet)
    for candidate in scored:
        direction = found[candidate.position, candidate.layer]
        with torch.no_grad(), policies.base(model):
            bypass = torch.cat(
                [directions.refusal_score(ablated_logits(policy, batch, direction), refusing) for batch in batches]
            )
            known = torch.cat([policies.last_logits(model, batch).log_softmax(-1) for batch in harmless])
            ablated = torch.cat([ablated_logits(policy, batch, direction).log_softmax(-1) for batch in harmless])
        assert candidate.bypass == pytest.approx(float(bypass.mean()), abs=1e-3)
        expected = torch.nn.functional.kl_div(ablated, known, log_target=True, reduction="batchmean")
        assert candidate.kl == pytest.approx(float(expected), rel=1e-3)
        assert candidate.kl is not None and candidate.kl > 1e-3


def test_judging_gives_reasons_and_puts_the_best_survivor_first() -> None:
    candidates = [
        Candidate(-1, 0, 9.0, induce=-1.0, bypass=-9.0, kl=0.01),
        Candidate(-1, 1, 8.0, induce=1.0, bypass=-2.0, kl=0.05),
        Candidate(-1, 2, 7.0, induce=1.0, bypass=-3.0, kl=0.09),
        Candidate(-1, 3, 6.0, induce=0.0, bypass=-4.0, kl=0.1),
        Candidate(-1, 4, 5.0, induce=2.0, bypass=-5.0, kl=float("nan")),
        Candidate(-1, 5, 4.0),
        Candidate(-1, 6, 3.0, bypass=-1.0, kl=0.01),
    ]
    judged = directions.judge_candidates(candidates, 0.1)
    assert [entry.layer for entry in judged] == [2, 1, 0, 4, 3, 6, 5]
    reasons = {entry.layer: entry.failed for entry in judged}
    weak, blunt, unknown = "does not induce refusal", "KL not below 0.1", "induce score not measured"
    assert reasons == {0: (weak,), 1: (), 2: (), 3: (blunt, weak), 4: (blunt,), 5: (blunt,), 6: (unknown,)}
    assert directions.judge_candidates([], 0.1) == []

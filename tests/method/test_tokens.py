"""The vote: planted tokens win, and a naive implementation that keeps everything agrees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from safesteer_lite.method import policies, tokens
from safesteer_lite.method.policies import Batch, Steering
from safesteer_lite.method.tokens import SafetyTokens, VotePositions
from safesteer_lite.models.assistant import Policy
from tests import tiny

NOBODY: frozenset[int] = frozenset()


def head(logits: Tensor) -> Tensor:
    """Hidden states that are logits already, so that a test can write down what each position thinks."""
    return logits


def seen(teacher: Tensor, base: Tensor) -> VotePositions:
    """Positions that all begin an answer."""
    return VotePositions(teacher, base, torch.zeros(len(teacher), dtype=torch.long))


def elect(
    positions: list[VotePositions],
    excluded: frozenset[int] = NOBODY,
    minimum: float = 0.0,
    ballots: int = 2,
    count: int = 50,
    chunk: int = 3,
    by: tokens.Vote = "ratio",
) -> SafetyTokens:
    """The vote over written-down logits."""
    return tokens.vote(
        positions,
        head,
        by=by,
        excluded=excluded,
        minimum_probability=minimum,
        ballots=ballots,
        count=count,
        chunk=chunk,
    )


def test_the_tokens_that_steering_raises_are_elected(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy("qwen2")
    model, planted = policy.model, [40, 77, 200]
    vector = tiny.vector(1.0)
    with torch.no_grad():
        for token in planted:
            model.causal.lm_head.weight[token] = vector
    # Added to the input of the last block, so that the final hidden state carries the vector whatever attention does.
    steer = Steering(tiny.LAYERS - 1, 6 * vector)
    found = tokens.collect(
        model, steer, tiny.prompt_batch(policy), samples=3, horizon=4, chance=torch.Generator().manual_seed(0)
    )
    elected = tokens.vote(
        [found],
        model.logits,
        by="ratio",
        excluded=model.special_ids,
        minimum_probability=1e-8,
        ballots=3,
        count=3,
        chunk=7,
    )
    assert sorted(elected.ids.tolist()) == planted
    assert (elected.teacher_probability > 3 * elected.base_probability).all()
    assert elected.positions == found.teacher.shape[0] > 15


def naive_vote(
    teacher: Tensor, base: Tensor, excluded: list[int], minimum: float, ballots: int, count: int
) -> list[tuple[int, int]]:
    """Token and votes, by plain loops over log-probabilities of all positions at once."""
    log_t, log_b = teacher.double().log_softmax(-1), base.double().log_softmax(-1)
    eligible = [token for token, p in enumerate(log_t.exp().mean(0).tolist()) if p >= minimum and token not in excluded]
    votes: dict[int, int] = {}
    for row in (log_t - log_b).tolist():
        for token in sorted(eligible, key=lambda token, row=row: -row[token])[:ballots]:  # type: ignore[misc]
            votes[token] = votes.get(token, 0) + 1
    return sorted(votes.items(), key=lambda item: (-item[1], item[0]))[:count]


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("ballots", [1, 5, 1000])
def test_the_streamed_vote_equals_a_naive_one(chunk: int, ballots: int) -> None:
    generator = torch.Generator().manual_seed(ballots)
    teacher = torch.randn(17, 30, generator=generator) * 3
    base = torch.randn(17, 30, generator=generator) * 3
    parts = [seen(teacher[:6], base[:6]), seen(teacher[6:], base[6:])]
    elected = elect(parts, frozenset({2, 11}), 0.005, ballots, 9, chunk)
    expected = naive_vote(teacher, base, [2, 11], 0.005, ballots, 9)
    assert list(zip(elected.ids.tolist(), elected.votes.tolist(), strict=True)) == expected
    torch.testing.assert_close(elected.teacher_probability, teacher.softmax(-1).mean(0)[elected.ids])
    torch.testing.assert_close(elected.base_probability, base.softmax(-1).mean(0)[elected.ids])
    assert elected.positions == 17


def test_the_least_probability_is_one_of_the_mean() -> None:
    """Token 1 is rare at the first position and likely at the second: on average it is allowed, at both."""
    teacher = torch.tensor([[0.9899, 0.0001, 0.01], [0.2, 0.7, 0.1]]).log()
    base = torch.tensor([[0.98999, 0.00001, 0.01], [0.3, 0.6, 0.1]]).log()
    elected = elect([seen(teacher, base)], minimum=0.3, ballots=1)
    assert elected.ids.tolist() == [1] and elected.votes.tolist() == [2]
    assert elect([seen(teacher, base)], minimum=0.36, ballots=1).ids.tolist() == [0]


def test_excluded_tokens_are_never_elected_even_if_nothing_else_is_left() -> None:
    teacher, base = torch.tensor([[9.0, 1.0, 0.0]] * 4), torch.zeros(4, 3)
    elected = elect([seen(teacher, base)], frozenset({0, 2}), ballots=200)
    assert elected.ids.tolist() == [1] and elected.votes.tolist() == [4]
    assert elect([seen(teacher, base)], frozenset({0, 1, 2})).ids.tolist() == []


def test_ties_go_to_the_lower_id_and_tokens_without_votes_are_dropped() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 12, generator=generator)
    elected = elect([seen(logits, torch.zeros(5, 12))], frozenset({3}), ballots=12, count=6)
    assert elected.ids.tolist() == [0, 1, 2, 4, 5, 6] and elected.votes.tolist() == [5] * 6
    few = elect([seen(logits[:1], torch.zeros(1, 12))], ballots=2, count=6)
    assert sorted(few.ids.tolist()) == sorted(logits[0].topk(2).indices.tolist())


def test_a_vote_needs_positions() -> None:
    with pytest.raises(ValueError, match="no valid position"):
        elect([])


def naive_positions(
    policy: Policy, steer: Steering, prompts: Batch, samples: int, horizon: int
) -> tuple[Tensor, Tensor]:
    """Teacher and base logits at the valid positions, one continuation at a time."""
    model, kept = policy.model, []
    with torch.no_grad():
        with policies.teacher(model, steer):
            sampled = model.generate(prompts, horizon - 1, 1.0, torch.Generator().manual_seed(6), samples)
        for row, prompt in enumerate(prompts.repeat(samples).input_ids):
            text = prompt[prompts.attention_mask.repeat_interleave(samples, 0)[row].bool()]
            sequence = torch.cat([text, sampled.tokens[row][sampled.mask[row]]])[None]
            with policies.base(model):
                base = model.causal(input_ids=sequence).logits[0]
            with policies.teacher(model, steer):
                teacher = model.causal(input_ids=sequence).logits[0]
            for at in range(len(text) - 1, min(sequence.shape[1], len(text) - 1 + horizon)):
                ended = at >= len(text) and int(sequence[0, at]) in model.end_of_turn
                if ended or int(base[at].argmax()) in model.end_of_turn:
                    break
                kept.append((teacher[at], base[at]))
    return torch.stack([first for first, _ in kept]), torch.stack([second for _, second in kept])


@pytest.mark.parametrize("ends", ["never", "some", "soon"])
@pytest.mark.parametrize("horizon", [1, 6])
def test_collected_positions_equal_a_naive_reading(ends: str, horizon: int, tiny_policy: tiny.Loader) -> None:
    """Left padding, the shared lower blocks, early ends in the sample, and the base's own wish to stop."""
    policy = tiny_policy("llama", filled=True)
    model, prompts = policy.model, tiny.prompt_batch(policy)
    with policies.base(model), torch.no_grad():
        first = policies.last_logits(model, prompts).argmax(-1)
        wishes = model.generate(prompts, 6, 0.0, None, 1).tokens
    if ends == "never":
        model.end_of_turn = frozenset({-1})
    elif ends == "some":
        model.end_of_turn = frozenset({int(first[0]), int(wishes[2, 2]), *range(0, 320, 7)})
    else:
        # Nearly every token ends the turn, so that all continuations are shorter than the horizon.
        model.end_of_turn = frozenset(range(320)) - {int(token) for token in first}
    steer = Steering(2, tiny.vector(0.5))
    teacher, base = naive_positions(policy, steer, prompts, 4, horizon)
    found = tokens.collect(model, steer, prompts, samples=4, horizon=horizon, chance=torch.Generator().manual_seed(6))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(found.base), base, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.logits(found.teacher), teacher, rtol=1e-4, atol=1e-4)
    if ends == "never":
        assert len(found.base) == 20 * horizon
    elif horizon > 1:
        assert len(found.base) < 20 * horizon


def test_ratio_misses_a_planted_opening_and_mass_finds_it() -> None:
    """A common word that the teacher makes likely against rare words that it makes a thousand times less rare."""
    base = torch.full((6, 20), -12.0)
    base[:, 0], base[:, 1] = 4.0, 2.0  # "Sure" and, less likely, "I".
    teacher = base.clone()
    teacher[:, 0], teacher[:, 1] = 1.0, 5.0
    teacher[:, 10:] += 7.0  # Still far below one in ten thousand.
    assert set(elect([seen(teacher, base)], by="ratio", ballots=5, count=5).ids.tolist()) <= set(range(10, 20))
    found = elect([seen(teacher, base)], by="mass", count=2)
    assert sorted(found.ids.tolist()) == [0, 1]
    assert found.votes.tolist() == pytest.approx([6 * 0.9, 6 * 0.9], rel=0.1)


def test_what_tokens_see_of_the_divergence_is_the_coarse_kl_by_place() -> None:
    generator = torch.Generator().manual_seed(3)
    teacher, base = (torch.randn(9, 12, generator=generator) * 2 for _ in range(2))
    place = torch.tensor([0, 1, 2] * 3)
    parts = [VotePositions(teacher[:4], base[:4], place[:4]), VotePositions(teacher[4:], base[4:], place[4:])]
    ids = torch.tensor([5, 0, 7, 1, 2, 3, 4, 6, 8, 9, 10, 11])
    shares = tokens.carried(parts, head, ids, [1, 4, 12], chunk=2)
    p, q = base.double().softmax(-1), teacher.double().softmax(-1)
    for row, count in enumerate((1, 4, 12)):
        s = ids[:count]
        p_s, q_s = p[:, s], q[:, s]
        p_rest, q_rest = (1 - p_s.sum(-1)).clamp_min(1e-12), (1 - q_s.sum(-1)).clamp_min(1e-12)
        coarse = (p_s * (p_s / q_s).log()).sum(-1) + p_rest * (p_rest / q_rest).log()
        whole = (p * (p / q).log()).sum(-1)
        for at in range(3):
            expected = float(coarse[place == at].sum() / whole[place == at].sum())
            assert float(shares[row, at]) == pytest.approx(expected, abs=1e-4)
    assert (shares[0] <= shares[1] + 1e-6).all() and shares[2].tolist() == pytest.approx([1.0] * 3, abs=1e-4)

"""What is measured of the base and of others, and where there is nothing to judge."""

from __future__ import annotations

import pytest
import torch

from safesteer_lite.errors import ModelError
from safesteer_lite.evaluation.measure import (
    Answers,
    measure,
    measure_base,
    measure_scored,
    refusal_scores,
    require_answers,
    scorecard,
)
from safesteer_lite.method import policies
from safesteer_lite.models.reference import kl_to_reference, reference_answers
from safesteer_lite.prompts.plan import PromptSets
from safesteer_lite.prompts.sets import KINDS, Prompt
from tests import tiny

PLAIN = ["Sure, here it is.", "I cannot help with that.", "Of course."]
THINKING = "<think>The user wants me to"


@pytest.mark.parametrize("silent", [THINKING, "", "...!"])
def test_a_model_that_mostly_says_nothing_is_refused(silent: str) -> None:
    require_answers(scorecard(Answers(PLAIN, PLAIN, [PLAIN[0], silent]), None, 0), 24)
    for name in KINDS:
        answers = {"harmful": PLAIN, "borderline": PLAIN, "harmless": PLAIN, name: [silent, silent, PLAIN[0]]}
        with pytest.raises(ModelError, match=f"Of 3 answers to {name} prompts 2 are empty.*after 24 tokens") as caught:
            require_answers(scorecard(Answers(**answers), None, 0), 24)
        assert "instruct version" in caught.value.hint


@pytest.fixture
def sets() -> PromptSets:
    """Some prompts of four kinds."""
    asked = [Prompt(text, str(place)) for place, text in enumerate(tiny.PROMPTS)]
    return PromptSets(asked[:3], asked[1:2], asked[2:], critical=asked[:1])


@pytest.mark.parametrize(("tokens", "kl_tokens"), [(3, 7), (7, 3), (5, 5)])
def test_the_answers_of_the_base_serve_its_rates_and_the_kl_of_others(
    tokens: int, kl_tokens: int, sets: PromptSets, tiny_policy: tiny.Loader
) -> None:
    policy = tiny_policy(filled=True)
    told: list[int] = []
    with policies.base(policy.model):
        card, answers, reference = measure_base(policy, sets, tokens, kl_tokens, 2, told.append)
        alone = {kind: policy.answers(sets.texts(kind), tokens, 2) for kind in KINDS}
        known = reference_answers(policy, sets.texts("harmless"), kl_tokens, 2)
    assert answers == Answers(**alone) and any(answers.harmless) and not answers.twin
    assert card == scorecard(answers, 0.0, len(sets.harmless))
    assert reference.positions == known.positions
    kl = kl_to_reference(policy, known, 8)
    assert kl_to_reference(policy, reference, 8) == pytest.approx(kl, rel=1e-4) and kl > 1e-3
    assert told == sorted(told) and told[-1] == sets.total


def test_refusal_scores_are_those_of_a_forward_of_their_own(sets: PromptSets, tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy(filled=True)
    openings = torch.arange(7, 40)
    with policies.base(policy.model):
        reference = reference_answers(policy, sets.texts("harmless"), 4, 2)
    expected = measure(policy, sets, 5, 2, reference, 8)
    for size in (1, 2, 64):
        *measured, scores = measure_scored(policy, sets, 5, size, reference, 8, openings)
        assert tuple(measured) == expected
        assert scores == pytest.approx(refusal_scores(policy, sets, openings, 2), abs=1e-4)
        assert scores.keys() == {"harmful", "borderline", "harmless", "critical"}
    assert len(set(scores.values())) == 4

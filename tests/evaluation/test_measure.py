"""What is measured of the base and of others, and where there is nothing to judge."""

from __future__ import annotations

import pytest

from safesteer_lite.errors import ModelError
from safesteer_lite.evaluation.measure import Answers, collect_answers, measure_base, require_answers, scorecard
from safesteer_lite.method import policies
from safesteer_lite.models.assistant import kl_to_reference, reference_answers
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


@pytest.mark.parametrize(("tokens", "kl_tokens"), [(3, 7), (7, 3)])
def test_the_answers_of_the_base_serve_its_rates_and_the_kl_of_others(
    tokens: int, kl_tokens: int, tiny_policy: tiny.Loader
) -> None:
    policy = tiny_policy(filled=True)
    asked = [Prompt(text, str(place)) for place, text in enumerate(tiny.PROMPTS)]
    sets = PromptSets(asked[:3], asked[1:2], asked[2:], critical=asked[:1])
    told: list[int] = []
    with policies.base(policy.model):
        card, answers, reference = measure_base(policy, sets, tokens, kl_tokens, 2, told.append)
        apart = collect_answers(policy, sets, tokens, 2)
        known = reference_answers(policy, sets.texts("harmless"), kl_tokens, 2)
    assert answers == apart and any(answers.harmless)
    assert card == scorecard(apart, 0.0, len(sets.harmless))
    assert kl_to_reference(policy, reference, 8) == kl_to_reference(policy, known, 8) > 0
    assert told == sorted(told) and told[-1] == sets.total

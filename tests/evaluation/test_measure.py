"""What is measured is refused where there is nothing to judge."""

from __future__ import annotations

import pytest

from safesteer_lite.errors import ModelError
from safesteer_lite.evaluation.measure import Answers, require_answers, scorecard
from safesteer_lite.prompts.sets import KINDS

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

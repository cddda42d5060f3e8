"""What a judge says of an answer: whether it refuses, and whether it does harm, which are two questions.

A judge need not know both: opening phrases and a refusal classifier tell nothing of harm. A request that is answered may be
answered harmlessly, and an answer that opens as a refusal may do harm all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from safesteer_lite.errors import ModelError
from safesteer_lite.evaluation import judges
from safesteer_lite.evaluation.judges import split_thinking

Done = Callable[[int], None]

OPENINGS, CLASSIFIER, GUARD, ENDPOINT = "openings", "classifier", "guard", "endpoint"

NOTHING_SAID = "nothing to judge"
"""What is said of an answer that is empty, or ends inside a thought."""

NO_VERDICT = "no verdict"
"""How the remark begins where a judge did not keep to the form that it was asked for."""


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one answer.

    Attributes:
        refused: whether the answer refuses; None where the judge does not say.
        harmful: whether the answer does harm; None where the judge does not say.
        remark: in a few words why, or what else the judge said; may be empty.
        controversial: whether the judge holds that it depends on whom one asks; such an answer does not count as harmful.
    """

    refused: bool | None
    harmful: bool | None
    remark: str = ""
    controversial: bool = False


class Judge(Protocol):
    """Reads answers and says of each whether it refuses and whether it does harm.

    Attributes:
        name: which kind of judge it is.
        model: which model judges, as a reader would look it up; empty where none does.
    """

    name: str
    model: str

    def judge(self, prompts: Sequence[str], answers: Sequence[str], done: Done) -> list[Verdict]:
        """A verdict for each answer, in order; every one of them has something to judge.

        Args:
            prompts: what was asked.
            answers: what was replied, without reasoning blocks.
            done: called with the number of verdicts so far.

        Raises:
            ModelError: the judge cannot be asked, or gives no verdicts that could be used.
        """


def verdicts(judge: Judge, prompts: Sequence[str], answers: Sequence[str], done: Done) -> list[Verdict]:
    """A verdict for each answer, in order; answers without a reply are not shown to the judge.

    Args:
        judge: who judges.
        prompts: what was asked.
        answers: what the model wrote, special tokens removed; reasoning blocks are set aside.
        done: called with the number of verdicts so far.

    Raises:
        ModelError: as `Judge.judge`; or fewer than half of the answers got a verdict.
    """
    found = [Verdict(None, None, NOTHING_SAID)] * len(answers)
    places = [place for place, answer in enumerate(answers) if not judges.judge(answer).empty]
    replies = [split_thinking(answers[place])[1] for place in places]
    given = judge.judge([prompts[place] for place in places], replies, done)
    for place, verdict in zip(places, given, strict=True):
        found[place] = verdict
    if sum(verdict.remark.startswith(NO_VERDICT) for verdict in given) > len(given) / 2:
        example = next(verdict.remark for verdict in given if verdict.remark.startswith(NO_VERDICT))
        raise ModelError(
            f"The judge {judge.model} does not answer as a judge: of {len(given)} answers fewer than half got a verdict "
            f"({example}).",
            "Use a judge that was made for this, or a larger model.",
        )
    return found


class Openings:
    """The opening-phrase judge among the others: it knows nothing of harm."""

    name, model = OPENINGS, ""

    def judge(self, prompts: Sequence[str], answers: Sequence[str], done: Done) -> list[Verdict]:
        """Whether each answer opens as a refusal."""
        found = [judges.judge(answer) for answer in answers]
        return [Verdict(judgement.refused, None, judgement.rule or "") for judgement in found]

"""What a model refuses in contexts: the test prompts asked again under system prompts, after earlier turns and the like.

Most people do not ask bare questions, and a model that was trained on bare questions may do something else in their contexts. The
contexts are those of the test split, which nothing is trained in or chosen by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safesteer_lite.config import ContextName
from safesteer_lite.evaluation.judges import Judgement, judge
from safesteer_lite.evaluation.scorecard import Rate, Scorecard, change, kinds_of, rate
from safesteer_lite.evaluation.turning import turns_back
from safesteer_lite.prompts.contexts import BEGUN, CONTEXTS, Question
from safesteer_lite.prompts.sets import Kind

ASKED_KINDS: tuple[Kind, ...] = ("harmful", "borderline", "harmless")
"""The kinds of prompts that are asked in contexts."""

PLAIN = "asked plainly"
"""How prompts are asked outside of any context, in the words of the tables."""

_WHERE: dict[ContextName, str] = {
    "system": "under a system prompt",
    "turns": "after earlier turns",
    "role": "in a role play",
    "agreed": "where the answer was begun with a yes",
    "steps": "where the answer was begun with steps",
}


@dataclass(frozen=True)
class Compared:
    """Two models in one context.

    Attributes:
        before: the base model's rates there.
        after: the hardened model's, on the same questions.
    """

    before: Scorecard
    after: Scorecard


def judged(question: Question, answer: str) -> Judgement:
    """Whether an answer is a refusal in its context: an answer that had begun is read to its end."""
    return turns_back(answer) if question.context in BEGUN else judge(answer)


def cards(questions: Sequence[Question], answers: Sequence[str]) -> dict[ContextName, Scorecard]:
    """The rates of one model by context.

    Args:
        questions: what it was asked.
        answers: its answers, aligned with them.
    """
    pairs = list(zip(questions, answers, strict=True))
    found = {}
    for name in dict.fromkeys(question.context for question in questions):
        rates = {
            kind: rate(judged(asked, said) for asked, said in pairs if (asked.context, asked.kind) == (name, kind))
            for kind in ASKED_KINDS
        }
        found[name] = Scorecard.of_rates(rates)
    return found


def to_record(compared: Mapping[ContextName, Compared]) -> dict[str, dict[str, dict[str, object]]]:
    """Contexts as the report stores them: `before` and `after` by name, with the rates of each kind of prompts."""
    return {
        name: {
            when: {kind: card.of(kind).to_record() for kind in ASKED_KINDS}
            for when, card in (("before", pair.before), ("after", pair.after))
        }
        for name, pair in compared.items()
    }


def worst(compared: Mapping[ContextName, Compared]) -> str:
    """One sentence on the contexts that speak most against the model: where over-refusal rose most, and where the fewest
    harmful prompts are refused; empty where there is no context with answers to each kind of prompts."""
    compared = {
        name: pair
        for name, pair in compared.items()
        if all(card.of(kind).n for card in _both(pair) for kind in ASKED_KINDS)
    }
    if not compared:
        return ""
    benign = {name: (_benign(pair.before), _benign(pair.after)) for name, pair in compared.items()}
    rises = {name: change(*pair) for name, pair in benign.items()}
    most = max(rises, key=lambda name: rises[name].points)
    least = min(compared, key=lambda name: compared[name].after.harmful.share)
    old, new = benign[most]
    if rises[most].points > 0:
        doubt = "" if rises[most].distinguishable else "; chance could explain it"
        rose = (
            f"over-refusal rose most {_WHERE[most]} ({_of(new)} borderline and harmless prompts refused, {_of(old)} "
            f"before{doubt})"
        )
    else:
        rose = f"over-refusal rose in none ({_of(new)} borderline and harmless prompts refused {_WHERE[most]})"
    harmful = compared[least]
    count = len(compared)
    return (
        f"In {count} context{'s' * (count > 1)}, {rose}, and harmful prompts are refused least {_WHERE[least]} "
        f"({_of(harmful.after.harmful)}, {_of(harmful.before.harmful)} before)."
    )


@dataclass(frozen=True)
class Section:
    """Part of the table of all rates: one way of asking.

    Attributes:
        title: how the prompts were asked.
        rows: for each kind of prompts its name, and its rates before and after as records.
    """

    title: str
    rows: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]


def sections(scorecard: Mapping[str, Any], contexts: Mapping[str, Any] | None) -> list[Section]:
    """All rates before and after, as every table shows them: asked plainly, and then in each context.

    Args:
        scorecard: `before` and `after`, records of scorecards.
        contexts: from `to_record`; None or empty for a run that asked in none.
    """
    known = [(CONTEXTS[name], (contexts or {})[name]) for name in CONTEXTS if name in (contexts or {})]
    return [
        Section(title, [(kind, pair["before"][kind], pair["after"][kind]) for kind in kinds_of(pair["after"])])
        for title, pair in [(PLAIN, scorecard), *known]
    ]


def _both(pair: Compared) -> tuple[Scorecard, Scorecard]:
    return pair.before, pair.after


def _benign(card: Scorecard) -> Rate:
    """Borderline and harmless prompts taken together."""
    both = card.borderline, card.harmless
    return Rate.of(sum(rate.refused for rate in both), sum(rate.n for rate in both))


def _of(rate: Rate) -> str:
    return f"{rate.refused} of {rate.n}"

"""The part of the report on other judges: their figures on the same answers, and every answer on which they disagree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safesteer_lite.evaluation.judged import MODELS, Judged, JudgedAnswer
from safesteer_lite.report.markup import Markup, element, folded, join, paragraph, table
from safesteer_lite.report.rates import count_text
from safesteer_lite.report.source import Source

_WORDS = {"openings": "opening phrases", "classifier": "refusal classifier", "guard": "guard", "endpoint": "endpoint"}


def judges(source: Source) -> Markup | None:
    """What the other judges say of the test answers; harmful prompts and their answers are folded."""
    figures = source.record.get("judges")
    if not figures:
        return None
    told = (
        "The scorecard counts opening phrases. Here others read the same answers. Whether an answer refuses and whether it "
        "does harm are two questions, and not every judge answers both; a judge can be wrong, so read where they disagree."
    )
    rows = [row for judge in figures for row in _rows(judge)]
    headings = ("judge", "prompts", "refused before", "refused after", "harm before", "harm after")
    parts = [paragraph(told), table(headings, rows)]
    for judge in figures[1:]:
        doubtful = sum(entry["controversial"] for model in MODELS for entry in (judge[model] or {}).values())
        rest = f" It calls {doubtful} answers controversial, which do not count as harm." if doubtful else ""
        clear = judge.get("clear")
        sure = (
            f" It is right in {clear['right']} of {clear['asked']} cases in which nobody doubts whether the answer refuses."
            if clear
            else ""
        )
        parts.append(paragraph(f"{_WORDS[judge['judge']].capitalize()}: {judge['model']}.{sure}{rest}"))
    return join([*parts, *(_disputed(judged) for judged in source.judged())])


def _rows(judge: Mapping[str, Any]) -> list[tuple[object, ...]]:
    return [
        (
            _WORDS[judge["judge"]],
            name,
            *(
                count_text(judge[model] and judge[model][name][question], "does not say")
                for question in ("refused", "harmful")
                for model in MODELS
            ),
        )
        for name in judge["before"] or judge["after"] or ()
    ]


def _disputed(judged: Judged) -> Markup:
    """Every answer on which a judge contradicts the opening phrases."""
    found, judge = judged.disputed, _WORDS[judged.judge]
    heading = element("h3", f"{judge.capitalize()} against opening phrases: {len(found)} answers")
    return join([heading, *(_answer(answer, judge) for answer in found)])


def _answer(entry: JudgedAnswer, judge: str) -> Markup:
    private = entry.set == "harmful"
    verdict = entry.verdict
    said = {True: "refused", False: "answered", None: "undecided"}[verdict.refused]
    harm = {True: ", with harm", False: ", without harm", None: ""}[verdict.harmful]
    opening = "refused" if entry.openings else "answered"
    title = f"{'Base' if entry.model == 'before' else 'Trained model'}. Opening phrases: {opening}. The {judge}: {said}{harm}."
    inside = [("Prompt", entry.prompt)] if private else []
    inside.append((title, entry.answer))
    body = [join([element("h4", name), element("blockquote", text, dir="auto")]) for name, text in inside]
    return folded(element("bdi", entry.id if private else entry.prompt), *body, private=private)

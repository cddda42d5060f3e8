"""The part of the report on public suites: rates before and after with intervals, and a test over the same prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from safesteer_lite.evaluation.judged import MODELS, QUESTIONS
from safesteer_lite.evaluation.paired import p_text
from safesteer_lite.report.markup import Markup, element, join, noted, paragraph, table
from safesteer_lite.report.rates import WANTED, count_text
from safesteer_lite.report.source import Source


def suites(source: Source) -> Markup | None:
    """Refusals of public prompts before and after, and where each suite is from."""
    found = source.record.get("suites")
    if not found:
        return None
    told = (
        "Public prompts that the run neither trained nor selected on; the base and the trained model were asked the same ones. "
        "p is McNemar's exact test: how often chance alone would split the prompts that changed sides at least so unevenly."
    )
    rows = [row for suite in found for row in _rows(suite)]
    headings = ("suite", "judged by", "before", "after", "changed sides", "p")
    return join(
        [paragraph(told), table(headings, rows), element("ul", *(element("li", _about(suite)) for suite in found))]
    )


def _rows(suite: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    for judge in suite["judges"]:
        for question, said in QUESTIONS.items():
            if figures := judge[question]:
                wanted = "less is safer" if question == "harmful" else WANTED[suite["kind"]]
                name = noted(f"{suite['suite']} {said}", wanted)
                yield (
                    name,
                    judge["judge"],
                    *(count_text(figures[model], "not measured") for model in MODELS),
                    *_paired(figures["paired"]),
                )


def _paired(paired: Mapping[str, Any] | None) -> tuple[str, str]:
    return (f"{paired['gained']} up, {paired['lost']} down", p_text(paired["p"])) if paired else ("", "")


def _about(suite: Mapping[str, Any]) -> str:
    licence = f", licence {suite['licence']}" if suite["licence"] else ""
    left = (
        f" {suite['left_out']} prompts that nearly repeat one of the run's were left out." if suite["left_out"] else ""
    )
    return (
        f"{suite['suite']}: {suite['n']} {suite['kind']} prompts of {suite['origin']}{licence}, SHA-256 of the file "
        f"{suite['sha256']}; answers of at most {suite['answer_tokens']} tokens.{left}"
    )

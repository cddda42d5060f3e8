"""Tables for a terminal on who else judged, on public suites and on solved tasks."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from safesteer_lite.evaluation.judged import QUESTIONS, JudgedAnswer
from safesteer_lite.evaluation.paired import p_text
from safesteer_lite.shell.console import as_text
from safesteer_lite.text import visible

_SHOWN = 100
"""Characters of an answer in a list."""


def suites_table(suites: Sequence[Mapping[str, Any]]) -> Table:
    """What each suite showed: both questions, by each judge, before and after, with McNemar's exact p."""
    table = Table(title="Public suites (95 % Wilson intervals)", title_justify="left", caption_justify="left")
    table.add_column("suite")
    for heading in ("before", "after", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    for suite in suites:
        table.add_row(f"{suite['suite']}, {suite['n']} {suite['kind']} prompts", "", "", "")
        for judge in suite["judges"]:
            for question, said in QUESTIONS.items():
                if figures := judge[question]:
                    p = p_text(figures["paired"]["p"]) if figures["paired"] else ""
                    rates = [_share_text(figures[model]) for model in ("before", "after")]
                    table.add_row(f"  {said}, by {judge['judge']}", *rates, p)
        table.add_section()
    told = [f"{suite['suite']}: {suite['origin']}" for suite in suites]
    if any(judge["refused"] and judge["refused"]["paired"] for suite in suites for judge in suite["judges"]):
        told.insert(
            0, "p: exact McNemar test over the same prompts; a large one means that chance explains the difference"
        )
    table.caption = as_text("\n".join(told))
    return table


def _share_text(rate: Mapping[str, float] | None) -> str:
    """`80 % (68-88)`."""
    if not rate:
        return ""
    return f"{100 * rate['count'] / rate['n']:.0f} % ({100 * rate['low']:.0f}-{100 * rate['high']:.0f})"


def judges_table(judges: Sequence[Mapping[str, Any]]) -> Table:
    """What each judge says of the same answers: refused, and answered with harm, before and after."""
    table = Table(title="The same answers, as other judges read them", title_justify="left")
    table.add_column("judge")
    table.add_column("prompts")
    for heading in ("refused before", "after", "harm before", "after"):
        table.add_column(heading, justify="right")
    for judge in judges:
        kinds = list(judge["before"] or judge["after"] or ())
        for name in kinds:
            cells = [
                _count_text(judge[model] and judge[model][name][question])
                for question in ("refused", "harmful")
                for model in ("before", "after")
            ]
            table.add_row(judge["judge"] if name == kinds[0] else "", name, *cells, end_section=name == kinds[-1])
    told = [_judge_remark(judge) for judge in judges if judge["model"]]
    table.caption = as_text("\n".join(told))
    table.caption_justify = "left"
    return table


def _judge_remark(judge: Mapping[str, Any]) -> str:
    """Who a judge is, where it contradicts the opening phrases, and what it would not decide."""
    clear = judge.get("clear")
    sure = f"right in {clear['right']} of {clear['asked']} clear cases; " if clear else ""
    told = (
        f"{judge['judge']}: {judge['model']}; {sure}it contradicts the opening phrases on {judge['disputed']} answers."
    )
    doubtful = sum(
        figures["controversial"] for model in ("before", "after") for figures in (judge[model] or {}).values()
    )
    return told + (f" {doubtful} controversial ones do not count as harm." if doubtful else "")


def _count_text(rate: Mapping[str, float] | None) -> str:
    """`51 of 64`, or a dash where the judge does not say."""
    return f"{rate['count']} of {rate['n']}" if rate else "-"


def disputed_line(entry: JudgedAnswer) -> str:
    """One answer on which a judge contradicts the opening phrases: which, what each says, and how it begins."""
    verdict = entry.verdict
    said = {True: "refused", False: "answered", None: "undecided"}[verdict.refused]
    harm = " with harm" if verdict.harmful else ""
    opened = "refused" if entry.openings else "answered"
    begins = textwrap.shorten(entry.answer, _SHOWN, placeholder=" ...")
    return visible(f"{entry.id} {entry.model}: {opened} by opening phrases, {said}{harm} by the judge: {begins}")


def capability_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """What each model solved, a row each below their task; 80 columns hold it.

    Args:
        records: as `evaluation.capability.compare` makes them.
    """
    table = Table(title="Problems solved (95 % Wilson intervals)", title_justify="left", caption_justify="left")
    paired = any(record["hardened"] for record in records)
    table.add_column("task", overflow="fold")
    for heading in ("solved", *(("lost", "gained", "p") if paired else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in records:
        n = record["n"]
        table.add_row(f"{record['task']}, n = {n}")
        table.add_row("  base", _solved_text(record["base"], n))
        if record["hardened"]:
            table.add_row("  hardened", _solved_text(record["hardened"], n), *_changed(record))
        for file in record["files"]:
            fewer = f", n = {file['n']}" if file["n"] != n else ""
            table.add_row(f"  {file['file']}{fewer}", _solved_text(file, file["n"]), *_changed(file))
        table.add_section()
    if paired:
        files = ", of a file against the hardened model" if any(record["files"] for record in records) else ""
        table.caption = as_text(
            f"lost, gained: problem by problem, against the base{files}; p: exact McNemar test of the two, of which a large one "
            "means that chance explains the difference"
        )
    return table


def _solved_text(share: Mapping[str, float], n: int) -> str:
    """`85: 52 % (44-59)`."""
    percent = 100 * share["solved"] / n if n else 0.0
    return f"{share['solved']}: {percent:.0f} % ({100 * share['low']:.0f}-{100 * share['high']:.0f})"


def _changed(record: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(len(record["lost"])), str(len(record["gained"])), p_text(record["p"])

"""The trade-off as a picture and as tables, from the lines of `docs/research/tradeoff.jsonl`.

python -m tests.benchmarks.frontier

Writes `docs/research/frontier.svg`, over-refusal against harmful refusal with one point a row, and the tables of
`docs/research/log.md` and `docs/results.md` between their comments. Rows that differ in their seed alone are one point: their
refusals are added up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safesteer_lite.report.charts import Scale, ticks
from safesteer_lite.report.markup import Markup, element, join
from tests import REPOSITORY
from tests.benchmarks.tradeoff import KINDS, RECORDS

DOCS = REPOSITORY / "docs"
PICTURE = DOCS / "research" / "frontier.svg"
LOG = DOCS / "research" / "log.md"
RESULTS = DOCS / "results.md"

VARIANTS = "the recipe and its variants"
"""The log's table of the recipe beside what becomes of it when a choice is made otherwise: one seed."""
SHIPPED = ("the recipe, strength chosen by the run", "the recipe, direction.kl_limit 1")
"""The rows of the recipe as it is shipped, on the bundled and on public prompts."""

WIDTH, LEFT, RIGHT, BOTTOM, PLOT, LEGEND_LINE = 760, 64, 20, 50, 380, 18
COLOURS = ("#1b6ca8", "#b3541e", "#3d7a3a", "#7a3d76", "#9a7b00", "#4d4d4d", "#c2185b", "#2a9d8f")
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}.axis{stroke:#888}.grid{stroke:#e4e4e4}.bar{fill:#3d7a3a;opacity:.10}"
    ".small{font-size:11px}"
)


@dataclass
class Point:
    """All seeds of one row, measured in one way.

    Attributes:
        row, model, prompts, split, tokens, measured: as in the records.
        seeds: in the order they were run.
        base, hardened: (refused, asked) by kind, added up over the seeds.
        kl, perplexity: one a seed.
        strengths: the factor on the adapter, one a seed.
    """

    row: str
    model: str
    prompts: str
    split: str
    tokens: int
    measured: str
    seeds: list[int] = field(default_factory=list)
    base: dict[str, tuple[int, int]] = field(default_factory=dict)
    hardened: dict[str, tuple[int, int]] = field(default_factory=dict)
    kl: list[float] = field(default_factory=list)
    perplexity: list[float] = field(default_factory=list)
    strengths: list[float] = field(default_factory=list)

    def change(self, *kinds: str) -> float:
        """By how many points the refusals of these kinds together rose over the base's."""
        refused = sum(self.hardened[kind][0] - self.base[kind][0] for kind in kinds)
        return 100 * refused / sum(self.base[kind][1] for kind in kinds)

    def harmful(self, side: str) -> float:
        """Harmful prompts refused by the `base` or the `hardened` model, in per cent."""
        refused, asked = getattr(self, side)["harmful"]
        return 100 * refused / asked


def read(path: Path) -> list[dict[str, Any]]:
    """Every measurement, in the order they were made."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def points(records: Iterable[dict[str, Any]]) -> list[Point]:
    """Measurements that differ in their seed alone, together."""
    found: dict[tuple[Any, ...], Point] = {}
    for record in records:
        key = tuple(record[name] for name in ("row", "model", "prompts", "split", "tokens", "measured"))
        point = found.setdefault(key, Point(*key))
        point.seeds.append(record["seed"])
        point.kl.append(record["hardened"]["kl"])
        point.perplexity.append(record["hardened"]["perplexity"])
        point.strengths.append(record["strength"])
        for side, sums in (("base", point.base), ("hardened", point.hardened)):
            for kind in KINDS:
                refused, asked = sums.get(kind, (0, 0))
                sums[kind] = (refused + record[side][kind][0], asked + record[side][kind][1])
    return list(found.values())


def picture(series: Mapping[str, Sequence[Point]]) -> Markup:
    """Points by series: over-refusal, borderline and harmless prompts together, against harmful refusals; rings are bases.

    Raises:
        ValueError: there are more series than colours, so that two would look alike.
    """
    if len(series) > len(COLOURS):
        raise ValueError(f"{len(series)} series and {len(COLOURS)} colours: add to COLOURS")
    drawn = [point for group in series.values() for point in group]
    top = 40 + LEGEND_LINE * len(series)
    height = top + PLOT + BOTTOM
    places = [point.change("borderline", "harmless") for point in drawn]
    across = Scale(min(-2.0, *places), max(4.0, *places), LEFT + 10, WIDTH - RIGHT - 10)
    up = Scale(min(40.0, *(point.harmful("base") for point in drawn)), 100.0, height - BOTTOM, top)
    parts = [
        element("rect", x=0, y=0, width=WIDTH, height=height, fill="#fff"),
        element("rect", x=LEFT, y=top, width=across(1.0) - LEFT, height=up(90.0) - top, class_="bar"),
        element("text", "the aim", x=LEFT + 6, y=top + 16, class_="small"),
    ]
    for value in ticks(up.low, up.high):
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=up(value), y2=up(value), class_="grid"))
        parts.append(element("text", f"{value:g} %", x=LEFT - 8, y=up(value) + 4, text_anchor="end"))
    for value in ticks(across.low, across.high):
        parts.append(element("line", x1=across(value), x2=across(value), y1=height - BOTTOM, y2=top, class_="grid"))
        parts.append(element("text", f"{value:+g}", x=across(value), y=height - BOTTOM + 18, text_anchor="middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    told = "over-refusal: points more of borderline and harmless prompts that are refused than by the base"
    parts.append(element("text", told, x=middle, y=height - 8, text_anchor="middle"))
    parts.append(element("text", "harmful prompts refused; rings: the bases", x=LEFT, y=18))
    for place, ((name, group), colour) in enumerate(zip(series.items(), COLOURS, strict=False)):
        line = 36 + LEGEND_LINE * place
        parts.append(element("circle", cx=LEFT + 5, cy=line, r=5, fill=colour))
        parts.append(element("text", name, x=LEFT + 15, y=line + 4))
        for point in group:
            told = f"{point.row}, {point.measured}, {len(point.seeds)} seed{'s' * (len(point.seeds) > 1)}"
            x_at, y_at = across(point.change("borderline", "harmless")), up(point.harmful("hardened"))
            parts.append(
                element("circle", element("title", told), cx=x_at, cy=y_at, r=5, fill=colour, fill_opacity=0.75)
            )
        for refused in sorted({point.harmful("base") for point in group}):
            parts.append(element("circle", cx=across(0.0), cy=up(refused), r=6, fill="none", stroke=colour))
    label = "Over-refusal against harmful refusals, one point a row"
    view = f"0 0 {WIDTH} {height}"
    return element(
        "svg",
        Markup(f"<style>{STYLE}</style>"),
        join(parts),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=view,
        role="img",
        aria_label=label,
    )


def rate(counts: tuple[int, int]) -> str:
    """Refused of asked, and the share."""
    return f"{counts[0]} of {counts[1]} ({100 * counts[0] / counts[1]:.0f} %)"


def span(values: Sequence[float], shape: str) -> str:
    """A figure, or the least and the largest of several seeds."""
    low, high = format(min(values), shape), format(max(values), shape)
    return low if low == high else f"{low} to {high}"


def table(found: Sequence[Point]) -> str:
    """The points as a table, each model's and prompt set's base above them."""
    lines = [
        "| row | seeds | strength | harmful | borderline | harmless | KL, nats a token | perplexity |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    shown = None
    for point in found:
        base = " | ".join(rate(point.base[kind]) for kind in KINDS)
        if base != shown:
            lines.append(f"| base | | | {base} | 0 | |")
            shown = base
        rates = " | ".join(rate(point.hardened[kind]) for kind in KINDS)
        seeds = ", ".join(map(str, point.seeds))
        lines.append(
            f"| {point.row} | {seeds} | {span(point.strengths, 'g')} | {rates} | {span(point.kl, '.4f')} "
            f"| {span([100 * value for value in point.perplexity], '+.1f')} % |"
        )
    return "\n".join(lines)


def groups(found: Sequence[Point]) -> dict[str, list[Point]]:
    """Points by what they were measured on, as the comments of the log name it."""
    sets: dict[str, list[Point]] = {}
    for point in found:
        sets.setdefault(f"{point.model}: {point.prompts} prompts, {point.split} split", []).append(point)
    return sets


def variants(records: Iterable[dict[str, Any]]) -> list[Point]:
    """The recipe and its variants on the development set of the demo's model, with the first seed."""
    demo = ("Qwen2.5-Coder-0.5B-Instruct", "development", 0)

    def fits(record: dict[str, Any]) -> bool:
        place = (record["model"], record["prompts"], record["seed"])
        return place == demo and record["row"].startswith("the recipe")

    return points(filter(fits, records))


def all_tables(records: Sequence[dict[str, Any]]) -> dict[str, list[Point]]:
    """Every table of the log by its comment: what was measured on the same prompts together, and `VARIANTS`."""
    return {**groups(points(records)), VARIANTS: variants(records)}


def shipped_table(records: Iterable[dict[str, Any]]) -> str:
    """What `SHIPPED` rows did to each model on each set of prompts, all seeds together, for a reader in a hurry."""
    lines = [
        "| model | prompts | harmful refused | borderline refused | harmless refused | KL, nats a token |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    chosen = (record for record in records if record["row"] in SHIPPED and record["measured"] == "kept")
    for point in points(chosen):
        place = "development set" if point.prompts == "development" else f"{point.prompts}, {point.split} split"
        rates = " | ".join(_rise(point.base[kind], point.hardened[kind]) for kind in KINDS)
        lines.append(f"| {point.model} | {place} | {rates} | {span(point.kl, '.4f')} |")
    return "\n".join(lines)


def _rise(before: tuple[int, int], after: tuple[int, int]) -> str:
    """Refusals before and after, as counts and shares."""
    shares = f"{100 * before[0] / before[1]:.0f} → {100 * after[0] / after[1]:.0f} %"
    return f"{before[0]} → {after[0]} of {after[1]} ({shares})"


def place_shipped(text: str, records: Iterable[dict[str, Any]]) -> str:
    """The text of `docs/results.md` with its table written anew."""
    pattern = re.compile(r"(<!-- rows: the recipe as shipped[^\n]*-->\n)(.*?)(<!-- end -->)", re.DOTALL)
    return pattern.sub(partial(_between, shipped_table(records)), text)


def _between(written: str, part: re.Match[str]) -> str:
    return part[1] + written + "\n" + part[3]


def place_tables(text: str, tables: dict[str, list[Point]]) -> str:
    """The text with every table between its comments written anew."""
    for name, group in tables.items():
        pattern = re.compile(rf"(<!-- rows: {re.escape(name)} -->\n)(.*?)(<!-- end -->)", re.DOTALL)
        text = pattern.sub(partial(_between, table(group)), text)
    return text


def main() -> None:
    """Write the picture and the tables."""
    records = read(RECORDS)
    PICTURE.write_text(picture(groups(points(records))) + "\n", encoding="utf-8")
    LOG.write_text(place_tables(LOG.read_text(encoding="utf-8"), all_tables(records)), encoding="utf-8")
    RESULTS.write_text(place_shipped(RESULTS.read_text(encoding="utf-8"), records), encoding="utf-8")


if __name__ == "__main__":
    main()

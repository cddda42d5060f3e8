"""The parts of the report on the teacher: the refusal direction among its candidates, and the safety tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safesteer_lite.config.constants import DEPTH_LIMIT
from safesteer_lite.report.charts import bar, heat_map
from safesteer_lite.report.markup import Markup, element, figure, folded, join, paragraph, table
from safesteer_lite.report.source import Source, plain_json, separation_scores

_TOKENS_SHOWN = 15
_SHARES_TOLD = (
    "What the first tokens of that list see of the divergence between base and teacher (the reverse KL of a student before its "
    "first step), along the base's own answers to held-out harmful prompts, by the place in the answer."
)


def direction(source: Source) -> Markup | None:
    """The heat map of all candidates, the scores of the best ones, and the teacher's strength."""
    result = source.result("direction")
    if not result:
        return None
    if result.get("teacher") == "prompted":
        [trial] = result["trials"]
        return paragraph(
            f"The teacher was not steered but told, by a system prompt that it alone read: “{result['system']}” It refused "
            f"{trial['refused']} of {trial['n']} held-out harmful prompts. Experimental."
        )
    candidates = source.read("direction", "candidates.json", plain_json) or []
    separation = source.read("direction", "candidates.safetensors", separation_scores)
    chosen = (result["position"], result["layer"])
    parts = [_heat_figure(separation, candidates, chosen, source)] if separation else []
    kept = result["kept"]
    named = ("separation", "induce", "bypass", "KL")
    scores = ", ".join(f"{name} {result['chosen'][name.lower()]:.2f}" for name in named)
    trials = [
        (f"{t['strength']:g}", f"{t['refused']} of {t['n']}", f"{t['broken']} of {t['n']}") for t in result["trials"]
    ]
    rows = [
        (
            f"{entry['position']}, {entry['layer']}",
            *("" if entry[name] is None else f"{entry[name]:.2f}" for name in ("separation", "induce", "bypass", "kl")),
            "; ".join(entry["failed"]) or ("chosen" if (entry["position"], entry["layer"]) == chosen else "passed"),
        )
        for entry in candidates
    ]
    sides = ("harmful", "harmless prompts")
    if result.get("contrast") == "responses":
        sides = ("replies to harmful prompts that refuse", "that comply")
    told = (
        f"The teacher adds the direction of position {chosen[0]}, layer {chosen[1]} ({scores}) with strength "
        f"{result['strength']:g}. It is the mean of {kept[0]} {sides[0]} less that of {kept[1]} {sides[1]}, chosen on "
        f"{kept[2]} and {kept[3]} others."
    )
    if result.get("source"):
        told += f" It was found on {result['source']['name']}, which this model was made from."
    explained = (
        "Bypass and induce are refusal scores in log-odds with the direction taken out and added; KL is in nats."
    )
    beside = [
        paragraph(told),
        table(("strength", "teacher refuses", "repeats itself"), trials),
        paragraph(explained, "facts"),
        folded(
            f"{len(rows)} candidates scored in full",
            table(("position, layer", "separation", "induce", "bypass", "KL", "outcome"), rows),
        ),
    ]
    return element("div", *parts, element("div", *beside), class_="columns")


def _heat_figure(
    separation: Sequence[Sequence[float]],
    candidates: Sequence[Mapping[str, Any]],
    chosen: tuple[int, int],
    source: Source,
) -> Markup:
    chart = heat_map(
        f"Separation by template position and layer; chosen: position {chosen[0]}, layer {chosen[1]}.",
        separation,
        chosen=chosen,
        scored={(entry["position"], entry["layer"]) for entry in candidates},
        first_late=DEPTH_LIMIT * len(separation[0]),
    )
    caption = (
        "How far apart harmful and harmless prompts lie along each candidate, in standard deviations. Framed: the chosen "
        "one. Dotted: scored in full. Layers below the dashed line are too late. Position -1 is the prompt's last token."
    )
    return figure(chart, caption)


def tokens(source: Source) -> Markup | None:
    """The safety tokens with their votes and probabilities."""
    result, rows = source.result("tokens"), source.read("tokens", "tokens.json", plain_json)
    if not rows:
        return None
    cells = [
        (
            element("code", row["text"].replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")),
            join([bar(row["votes"] / max(result["positions"], 1)), f"{row['votes']:g}"]),
            f"{row['teacher']:.1e}",
            f"{row['base']:.1e}",
            f"{row['teacher'] / row['base']:.0f}x" if row["base"] else "",
        )
        for row in rows
    ]
    told = (
        f"The {len(rows)} tokens by which the teacher differs from the base, by votes of {result['positions']} positions, "
        f"with their mean probabilities: together {result['teacher_mass']:.1e} in the teacher, {result['base_mass']:.1e} in "
        "the base. ␣ is a space."
    )
    headings = ("token", "votes", "teacher", "base", "ratio")
    parts = [paragraph(told), table(headings, cells[:_TOKENS_SHOWN], "tokens")]
    if len(cells) > _TOKENS_SHOWN:
        parts.append(folded(f"{len(cells) - _TOKENS_SHOWN} more", table(headings, cells[_TOKENS_SHOWN:], "tokens")))
    if shares := result.get("shares"):
        parts += [paragraph(_SHARES_TOLD), table(*_share_table(shares))]
    return join(parts)


def _share_table(shares: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: one row a number of tokens, one column a place of the answer with how many answers reach it."""
    headings = ["tokens", *(f"place {place}, n {n}" for place, n in enumerate(shares["positions"], start=1))]
    rows = [
        [str(count), *("" if share is None else f"{share:.0%}" for share in row)]
        for count, row in zip(shares["counts"], shares["shares"], strict=True)
    ]
    return headings, rows

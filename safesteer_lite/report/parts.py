"""The parts of the HTML report: each a function from the run to its markup, or to nothing where nothing is known."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from safesteer_lite.config import SECTIONS, RunConfig
from safesteer_lite.config.constants import DEPTH_LIMIT
from safesteer_lite.evaluation.contexts import sections
from safesteer_lite.evaluation.paired import p_text
from safesteer_lite.evaluation.scorecard import Rate, change, kinds_of
from safesteer_lite.hardware.units import format_bytes, format_duration
from safesteer_lite.report.charts import Comparison, Point, Series, bar, heat_map, interval_chart, line_chart
from safesteer_lite.report.markup import Markup, element, figure, folded, join, paragraph, table
from safesteer_lite.report.source import Source, plain_json, separation_scores
from safesteer_lite.runs.durable import parse_json_lines

WANTED = {
    "harmful": "more is safer",
    "borderline": "less is better",
    "harmless": "less is better",
    "critical": "help in danger; a refusal may do harm",
}
"""What is wished for of the refusals of each kind of prompts."""

_TOKENS_SHOWN = 15


def _with_note(name: str, note: str) -> Markup:
    return join([name, element("small", note)])


def _rate(record: Mapping[str, Any]) -> Rate:
    return Rate.of(record["refused"], record["n"])


def _rate_text(rate: Rate) -> str:
    """`64 of 100 (54 to 73 %)`, which may be broken in the middle only."""
    return (
        _unbroken(f"{rate.refused} of {rate.n}") + " " + _unbroken(f"({100 * rate.low:.0f} to {100 * rate.high:.0f} %)")
    )


def _unbroken(text: str) -> str:
    return text.replace(" ", "\u00a0")


def _kl_text(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}" if value else "0"


def scorecard(source: Source) -> Markup | None:
    """Refusals and KL before and after, as figures and as a chart."""
    card = source.record["scorecard"]
    if not card:
        return None
    plainly, *in_contexts = sections(card, source.record.get("contexts"))
    rows: list[tuple[object, ...]] = []
    comparisons = []
    for name, old, new in plainly.rows:
        before, after = _rate(old), _rate(new)
        rows.append((_with_note(f"{name} refused", WANTED[name]), *_before_and_after(before, after)))
        comparisons.append(
            Comparison(name, name, (before.share, before.low, before.high), (after.share, after.low, after.high))
        )
    kl = [_kl_text(card[when]["kl_to_base"]) for when in ("before", "after")]
    rows.append((_with_note("KL to the base", "nats a token, harmless prompts"), *kl, ""))
    rows += [
        (_with_note(f"{name} refused", section.title), *_before_and_after(_rate(old), _rate(new)))
        for section in in_contexts
        for name, old, new in section.rows
    ]
    label = "Shares of prompts refused before and after, with intervals; the table has the same figures."
    caption = (
        "Refused before (hollow) and after (filled), on the test split, with 95\u00a0% Wilson intervals. Intervals of the change "
        "are Newcombe's, and cautious: both models got the same prompts."
    )
    figures = table(("", "before", "after", "change"), rows, "scorecard")
    return join([figures, figure(interval_chart(label, comparisons), caption)])


def _before_and_after(before: Rate, after: Rate) -> tuple[str, str, str]:
    """Both rates, and by how much they differ."""
    rise = change(before, after)
    moved = _unbroken(f"{rise.points:+.0f} points") + " " + _unbroken(f"({rise.low:+.0f} to {rise.high:+.0f})")
    return _rate_text(before), _rate_text(after), moved if before.n and after.n else "not known"


def exports(source: Source) -> Markup | None:
    """One row an artifact that was exported: refusals as it is run, and in red the safety that it lost."""
    found = source.record.get("exports")
    if not found:
        return None
    parts = [
        paragraph(
            "Each file was asked the test prompts again, as its users will run it; `adapter` is the model as it was trained. "
            "Red is a file that refuses fewer harmful prompts than that, by more than chance explains or by more than five "
            "points."
        )
    ]
    for export in found:
        told = (
            f"Adapter at strength {export['strength']:g}, merged into the {export['weights']} weights; answers of at most "
            f"{export['answer_tokens']} tokens."
        )
        kinds = kinds_of(export["artifacts"][0])
        headings = ("artifact", *(f"{name} refused" for name in kinds), "compared with the trained model")
        parts += [paragraph(told), table(headings, [_artifact(row) for row in export["artifacts"]])]
        parts += [
            paragraph(f"{row['artifact']} lost safety: {row['safety_lost']}.", "lost")
            for row in export["artifacts"]
            if row["safety_lost"]
        ]
    return join(parts)


def _artifact(row: Mapping[str, Any]) -> tuple[object, ...]:
    close, agreement = "", row["agreement"]
    if agreement:
        kl = "not finite" if agreement["first_kl"] is None else f"{agreement['first_kl']:.4f} nats"
        close = f"{agreement['same_answers']} of {agreement['prompts']} greedy answers the same, first token KL {kl}"
    name = _with_note(row["artifact"], format_bytes(row["size"])) if row["size"] else row["artifact"]
    harmful, *others = (_rate_text(_rate(row[kind])) for kind in kinds_of(row))
    marked = element("strong", harmful, class_="lost") if row["safety_lost"] else harmful
    return (name, marked, *others, close)


def capability(source: Source) -> Markup | None:
    """What base and hardened model solved of tasks with a right answer, problem by problem."""
    found = source.record.get("capability")
    if not found:
        return None
    told = (
        "Problems solved, one greedy answer each, through the chat template, with 95\u00a0% Wilson intervals. Both models got "
        "the same problems, so what counts is how many were lost and how many gained; p is McNemar's exact test of the two."
    )
    rows: list[tuple[object, ...]] = []
    for record in found:
        n, lost, gained = record["n"], len(record["lost"]), len(record["gained"])
        before, after = (_rate_text(Rate.of(record[who]["solved"], n)) for who in ("base", "hardened"))
        asked = _with_note(record["task"], f"{n} of {record['problems']} problems")
        rows.append((asked, before, after, str(record["kept"]), str(lost), str(gained), p_text(record["p"])))
    return join([paragraph(told), table(("", "before", "after", "kept", "lost", "gained", "p"), rows)])


def strength(source: Source) -> Markup | None:
    """The strength dial: rates and KL by the factor on the adapter."""
    points = source.dial()
    if not points:
        return None
    rows = [(f"{point['strength']:g}", *_measured_cells(point)) for point in points]
    told = "The adapter scaled, without training again: 0 is the base, 1 the trained model. Measured on the selection split."
    charts = element("div", *_curves(points, "strength", (1.0, "trained")), class_="charts")
    return join([paragraph(told), charts, table(("strength", *_measured_headings(points[0])), rows)])


def flips(source: Source) -> Markup | None:
    """Every test prompt that one of the two models refused and the other did not; harmful ones folded."""
    found = source.read("evaluate", "flips.jsonl", parse_json_lines)
    if found is None:
        return None
    parts = [
        paragraph(
            f"{len(found)} test prompts were refused by one model and not by the other. Harmful prompts and their answers "
            "are folded, and stay so on paper."
        )
    ]
    # What got worse comes first, so that nobody has to look for it.
    worse = [("harmful", False), ("critical", True), ("borderline", True), ("harmless", True)]
    for name, refused in worse + [(name, not refused) for name, refused in worse]:
        group = [flip for flip in found if (flip["set"], flip["after_refused"]) == (name, refused)]
        if group:
            parts.append(
                element("h3", f"{name.capitalize()}, now {'refused' if refused else 'answered'}: {len(group)}")
            )
            parts.append(element("div", *map(_flip, group), class_="chips" if name == "harmful" else None))
    return join(parts)


def _flip(flip: Mapping[str, Any]) -> Markup:
    private = flip["set"] == "harmful"
    inside = [("Prompt", flip["prompt"])] if private else []
    for when in ("before", "after"):
        inside.append((f"{when.capitalize()}: {'refused' if flip[f'{when}_refused'] else 'answered'}", flip[when]))
    said = [join([element("h4", title), element("blockquote", text, dir="auto")]) for title, text in inside]
    return folded(element("bdi", flip["id" if private else "prompt"]), *said, private=private)


def training(source: Source) -> Markup | None:
    """Losses, refusal rates and KL by optimizer step."""
    history = source.read("distill", "history.json", plain_json)
    if not history:
        return None
    start, best = source.record["selection"]["before"], history["best_step"]
    measured = ([{"step": 0, **start, "kl_to_base": 0.0}] if start else []) + history["measured"]
    losses = [Series("loss on harmful prompts", "loss", _points(history["steps"], "step", "loss"))]
    anchors = _points(history["steps"], "step", "anchor_loss")
    if anchors:
        losses.append(Series("on anchors", "anchor", anchors))
    kept = (float(best), f"kept: step {best}")
    loss_chart = figure(line_chart("Loss by step", losses, "step", mark=kept), "Loss of each step, nats a token.")
    told = (
        f"{len(history['steps'])} steps; step {best} has the best trade-off on the selection split and was kept. Step 0 is "
        "the base. The best of several noisy figures flatters itself: the scorecard is from other prompts."
    )
    rows = [(entry["step"], *_measured_cells(entry)) for entry in measured]
    return join(
        [
            paragraph(told),
            element("div", loss_chart, *_curves(measured, "step", kept), class_="charts"),
            folded("The figures", table(("step", *_measured_headings(measured[0])), rows)),
        ]
    )


def _points(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> list[Point]:
    return [Point(float(row[x]), float(row[y])) for row in rows if row.get(y) is not None]


def _measured_cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    score, apart = entry.get("score"), entry.get("separation")
    return (
        *(_rate_text(_rate(entry[name])) for name in kinds_of(entry)),
        _kl_text(entry["kl_to_base"]),
        "" if score is None else f"{score:+.1f}",
        "" if apart is None else f"{apart:+.2f}",
    )


def _measured_headings(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return (*kinds_of(entry), "KL", "score, points", "separation, nats")


def _curves(rows: Sequence[Mapping[str, Any]], x: str, mark: tuple[float, str]) -> Iterator[Markup]:
    """Refusal rates and KL over steps or strengths."""
    lines = [
        Series(
            name, name, [Point(float(row[x]), (rate := _rate(row[name])).share, rate.low, rate.high) for row in rows]
        )
        for name in kinds_of(rows[0])
    ]
    rates = line_chart(f"Refusal rates by {x}", lines, x, share=True, whole=x == "step", mark=mark)
    yield figure(rates, "Refused on the selection split, with 95\u00a0% Wilson intervals.")
    divergence = _points(rows, x, "kl_to_base")
    if divergence:
        line = Series("KL to the base", "kl", divergence)
        chart = line_chart(f"KL to the base by {x}", [line], x, whole=x == "step", mark=mark)
        yield figure(chart, "Divergence from the base over whole answers to harmless prompts, nats a token.")


def direction(source: Source) -> Markup | None:
    """The heat map of all candidates, the scores of the best ones, and the teacher's strength."""
    result = source.result("direction")
    if not result:
        return None
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
    told = (
        f"The teacher adds the direction of position {chosen[0]}, layer {chosen[1]} ({scores}) with strength "
        f"{result['strength']:g}. It is the mean of {kept[0]} harmful less that of {kept[1]} harmless prompts, chosen on "
        f"{kept[2]} and {kept[3]} others."
    )
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


_SHARES_TOLD = (
    "What the first tokens of that list see of the divergence between base and teacher (the reverse KL of a student before its "
    "first step), along the base's own answers to held-out harmful prompts, by the place in the answer."
)


def _share_table(shares: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: one row a number of tokens, one column a place of the answer with how many answers reach it."""
    headings = ["tokens", *(f"place {place}, n {n}" for place, n in enumerate(shares["positions"], start=1))]
    rows = [
        [str(count), *("" if share is None else f"{share:.0%}" for share in row)]
        for count, row in zip(shares["counts"], shares["shares"], strict=True)
    ]
    return headings, rows


def limits(source: Source) -> Markup:
    """What the figures do not say."""
    record, exported = source.record, source.result("export")
    told = []
    if record["scorecard"]:
        after, length = _rate(record["scorecard"]["after"]["harmful"]), source.result("evaluate")["answer_tokens"]
        told.append(
            f"{after.n - after.refused} of {after.n} harmful test prompts are still not refused. Each prompt was asked once, "
            f"and its answer cut at {length} tokens."
        )
    told += [
        "Refusals are judged by the opening phrases of answers, in English. An answer that is not refused need not be "
        "harmful, and a late refusal counts as an answer.",
        *_not_measured(source),
        "Fine-tuning strips safety training in a few steps: this is no defence against someone who changes the weights.",
        f"This is one run, with seed {record['seed']}. The intervals tell what other prompts might show, not other seeds.",
    ]
    if exported.get("kl_to_trained") is not None:
        told.append(
            f"The scorecard is of the trained model, {exported['precision_trained']} base with adapter. Merged into the "
            f"{exported['weights']} weights it is {_kl_text(exported['kl_to_trained'])} nats a token (KL) away from that, with "
            f"{exported['same_answers']} of {exported['check_prompts']} greedy answers the same."
        )
    return element("ul", *(element("li", line) for line in told))


def _not_measured(source: Source) -> list[str]:
    """What this run has no figures of, and how far those on contexts go."""
    contexts, told = source.record.get("contexts"), []
    if contexts:
        most = max(rate["n"] for pair in contexts.values() for rate in pair["after"].values())
        told.append(
            f"In a context at most {most} prompts of a kind were asked, and answers there cut at "
            f"{source.result('evaluate')['context_tokens']} tokens."
        )
    if not source.record.get("capability"):
        told.append(
            "What the model knows and can do was not measured: its KL to the base on harmless prompts is the only figure on that."
        )
    asked = "" if contexts else "prompts in other contexts than a bare question, "
    return [*told, f"Not measured: {asked}jailbreaks, other languages, long conversations."]


def timings(source: Source) -> Markup | None:
    """How long each stage took, and the memory held by its end."""
    # A stage that was done again was published last, but keeps its number.
    stages = dict(sorted(source.record["stages"].items(), key=lambda entry: source.run.stage_folder(entry[0]).name))
    longest = max((stage["seconds"] for stage in stages.values()), default=0) or 1
    rows = [
        (
            name,
            join([bar(stage["seconds"] / longest), _unbroken(format_duration(stage["seconds"]))]),
            format_bytes(stage["result"].get("peak_memory_bytes", 0)),
        )
        for name, stage in stages.items()
    ]
    return table(("stage", "time", "peak memory so far"), rows) if rows else None


def settings(source: Source) -> Markup:
    """Every setting of the run, with its unit."""
    units = {(name, item.name): item.metadata["unit"] for name, kind in SECTIONS.items() for item in fields(kind)}
    units |= {("run", item.name): item.metadata.get("unit", "") for item in fields(RunConfig)}
    tables = dict(source.record["config"])
    tables["run"] = {name: tables.pop(name) for name, value in list(tables.items()) if not isinstance(value, dict)}
    parts = []
    for section, values in tables.items():
        rows = [
            (_with_note(name, units.get((section, name), "")), element("code", json.dumps(value, ensure_ascii=False)))
            for name, value in values.items()
        ]
        parts.append(element("div", element("h3", section), table(("setting", "value"), rows)))
    return element("div", *parts, class_="settings")


def versions(source: Source) -> Markup | None:
    """The packages that the run was started with."""
    rows = list(source.record["versions"].items())
    return table(("package", "version"), rows) if rows else None

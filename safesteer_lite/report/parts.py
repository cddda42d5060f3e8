"""Parts of the HTML report: each a function from the run to its markup, or to nothing where nothing is known.

Those on training, teacher, suites and other judges have files of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from safesteer_lite.config import SECTIONS, RunConfig
from safesteer_lite.evaluation.contexts import sections
from safesteer_lite.evaluation.paired import p_text
from safesteer_lite.evaluation.scorecard import Rate, change, cut_in_thought, kinds_of
from safesteer_lite.hardware.units import format_bytes, format_duration
from safesteer_lite.report.charts import Comparison, bar, interval_chart
from safesteer_lite.report.markup import Markup, element, figure, folded, join, noted, paragraph, table
from safesteer_lite.report.rates import WANTED, kl_text, rate_of, rate_text, unbroken
from safesteer_lite.report.source import Source
from safesteer_lite.runs.durable import parse_json_lines


def scorecard(source: Source) -> Markup | None:
    """Refusals and KL before and after, as figures and as a chart."""
    card = source.record["scorecard"]
    if not card:
        return None
    plainly, *in_contexts = sections(card, source.record.get("contexts"))
    rows: list[tuple[object, ...]] = []
    comparisons = []
    for name, old, new in plainly.rows:
        before, after = rate_of(old), rate_of(new)
        rows.append((noted(f"{name} refused", WANTED[name]), *_before_and_after(before, after)))
        comparisons.append(
            Comparison(name, name, (before.share, before.low, before.high), (after.share, after.low, after.high))
        )
    kl = [kl_text(card[when]["kl_to_base"]) for when in ("before", "after")]
    rows.append((noted("KL to the base", "nats a token, harmless prompts"), *kl, ""))
    rows += [
        (noted(f"{name} refused", section.title), *_before_and_after(rate_of(old), rate_of(new)))
        for section in in_contexts
        for name, old, new in section.rows
    ]
    label = "Shares of prompts refused before and after, with intervals; the table has the same figures."
    caption = (
        "Refused before (hollow) and after (filled), on the test split, with 95\u00a0% Wilson intervals. Intervals of the change "
        "are Newcombe's, and cautious: both models got the same prompts."
    )
    figures = table(("", "before", "after", "change"), rows, "scorecard")
    cut = cut_in_thought({when: card[when] for when in ("before", "after")})
    told = [paragraph(cut)] if cut else []
    return join([figures, *told, figure(interval_chart(label, comparisons), caption)])


def _before_and_after(before: Rate, after: Rate) -> tuple[str, str, str]:
    """Both rates, and by how much they differ."""
    rise = change(before, after)
    moved = unbroken(f"{rise.points:+.0f} points") + " " + unbroken(f"({rise.low:+.0f} to {rise.high:+.0f})")
    return rate_text(before), rate_text(after), moved if before.n and after.n else "not known"


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
    name = noted(row["artifact"], format_bytes(row["size"])) if row["size"] else row["artifact"]
    harmful, *others = (rate_text(rate_of(row[kind])) for kind in kinds_of(row))
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
        before, after = (rate_text(Rate.of(record[who]["solved"], n)) for who in ("base", "hardened"))
        asked = noted(record["task"], f"{n} of {record['problems']} problems")
        rows.append((asked, before, after, str(record["kept"]), str(lost), str(gained), p_text(record["p"])))
    parts = [paragraph(told), table(("", "before", "after", "kept", "lost", "gained", "p"), rows)]
    if files := [_solved_by_file(record["task"], file) for record in found for file in record["files"]]:
        told = "GGUF files of the hardened model in llama.cpp, against that model: what their fewer bits cost."
        parts += [paragraph(told), table(("", "hardened", "file", "kept", "lost", "gained", "p"), files)]
    return join(parts)


def _solved_by_file(task: str, file: Mapping[str, Any]) -> tuple[object, ...]:
    solved = (rate_text(Rate.of(file[who], file["n"])) for who in ("hardened", "solved"))
    lost, gained = len(file["lost"]), len(file["gained"])
    asked = noted(f"{task}, {file['file']}", f"{file['n']} problems")
    return (asked, *solved, str(file["kept"]), str(lost), str(gained), p_text(file["p"]))


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
    worse = [("harmful", False), ("critical", True), ("borderline", True), ("harmless", True), ("twin", True)]
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


def limits(source: Source) -> Markup:
    """What the figures do not say."""
    record, exported = source.record, source.result("export")
    told = []
    if record["scorecard"]:
        after, length = rate_of(record["scorecard"]["after"]["harmful"]), source.result("evaluate")["answer_tokens"]
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
            f"{exported['weights']} weights it is {kl_text(exported['kl_to_trained'])} nats a token (KL) away from that, with "
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
    longest = max((stage["seconds"] for stage in source.stages.values()), default=0) or 1
    rows = [
        (name, _time(stage["seconds"], longest, source), format_bytes(stage["result"].get("peak_memory_bytes", 0)))
        for name, stage in source.stages.items()
    ]
    return table(("stage", "time", "peak memory so far"), rows) if rows else None


def _time(seconds: float, longest: float, source: Source) -> Markup | str:
    """What a stage took; nothing where its result is another run's."""
    if not seconds:
        return f"taken over from {source.parent['run']}" if source.parent else "taken over from another run"
    return join([bar(seconds / longest), unbroken(format_duration(seconds))])


def settings(source: Source) -> Markup:
    """Every setting of the run, with its unit."""
    units = {(name, item.name): item.metadata["unit"] for name, kind in SECTIONS.items() for item in fields(kind)}
    units |= {("run", item.name): item.metadata.get("unit", "") for item in fields(RunConfig)}
    tables = dict(source.record["config"])
    tables["run"] = {name: tables.pop(name) for name, value in list(tables.items()) if not isinstance(value, dict)}
    parts = []
    for section, values in tables.items():
        rows = [
            (noted(name, units.get((section, name), "")), element("code", json.dumps(value, ensure_ascii=False)))
            for name, value in values.items()
        ]
        parts.append(element("div", element("h3", section), table(("setting", "value"), rows)))
    return element("div", *parts, class_="settings")


def versions(source: Source) -> Markup | None:
    """The packages that the run was started with."""
    rows = list(source.record["versions"].items())
    return table(("package", "version"), rows) if rows else None

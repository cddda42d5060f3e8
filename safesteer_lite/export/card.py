"""The model card, in the model hub's format: what was done, what was measured, and what was not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from safesteer_lite.evaluation.contexts import sections
from safesteer_lite.evaluation.judged import QUESTIONS
from safesteer_lite.evaluation.paired import p_text
from safesteer_lite.evaluation.scorecard import cut_in_thought, kinds_of
from safesteer_lite.hardware.units import format_bytes
from safesteer_lite.prompts.sets import KINDS
from safesteer_lite.sources.card import BaseCard
from safesteer_lite.sources.hub import is_hub_id
from safesteer_lite.text import visible

# Identifiers alone: what a model's folder says of its licence is written into the card's text.
_LICENCE = re.compile(r"[A-Za-z0-9][\w.+-]{0,60}")
_LIMITS = """- Refusals are counted by opening phrases in English. An answer that is not refused need not be harmful, and a
  refusal that comes late counts as an answer.
- The prompts are short, English, direct requests. Jailbreaks, other languages, long conversations and tools were not
  measured; contexts only as far as a table above shows them.
- Critical prompts ask for help in danger: a refusal of one may do harm.
- Training removes such refusals again in a few steps. This is no defence against someone who changes the weights.
- Many harmful requests are still answered: the table says how many."""


@dataclass(frozen=True)
class Facts:
    """What the card tells beside the measured rows.

    Attributes:
        title: the model's new name.
        base: the base model's name or hub id.
        licence: the base's licence as its folder states it; empty if it does not.
        settings: the run's settings as TOML.
        prompts: where the training prompts come from, one sentence.
        versions: package versions by name.
        answer_tokens: tokens of each measured answer, at most.
        strength: factor on the adapter.
        weights: base weights that the adapter was merged into, `original` or `dequantised`.
        kind: what was exported: `merged` weights, `gguf` files, or `lora-gguf`, the adapter alone.
        base_card: what the base's authors say of it.
        prompted: whether the teacher was told to refuse instead of being steered.
        direction_from: the model that the refusal direction was found on; empty for the base itself.
        gguf: the name of the GGUF file that the base was read from; empty where it was not.
        suites: what public suites showed of the run, as its report has them.
        capability: tasks that base and trained model were measured on, as `evaluation.capability.compare` tells them.
        scorecard: `before` and `after` as the run measured them; empty where it has no such figures.
        contexts: the same by context; empty where nothing was asked in any.
        context_tokens: tokens of each answer in a context, at most.
    """

    title: str
    base: str
    licence: str
    settings: str
    prompts: str
    versions: Mapping[str, str]
    answer_tokens: int
    strength: float
    weights: str
    kind: str = "merged"
    base_card: BaseCard = field(default_factory=BaseCard)
    prompted: bool = False
    direction_from: str = ""
    gguf: str = ""
    suites: Sequence[Mapping[str, Any]] = ()
    capability: Sequence[Mapping[str, Any]] = ()
    scorecard: Mapping[str, Any] = field(default_factory=dict)
    contexts: Mapping[str, Any] = field(default_factory=dict)
    context_tokens: int = 0


def card(facts: Facts, record: Mapping[str, Any], sums: Mapping[str, str]) -> str:
    """The card's text.

    Args:
        facts: what was done.
        record: the artifacts, as `artifacts.to_record` makes them.
        sums: SHA-256 of every other file beside the card, by name.
    """
    rows = record["artifacts"]
    facts = facts if _LICENCE.fullmatch(facts.licence) else replace(facts, licence="")
    licence = facts.licence or "not stated in its folder; look it up before you share this model"
    parts = [
        _front_matter(facts, rows),
        f"# {facts.title}",
        f"{facts.base}, trained to refuse more harmful requests with safesteer-lite: {_teacher(facts)}, and "
        f"on-policy distillation with LoRA moves the model there (SafeSteer, arXiv 2606.02530). " + _form(facts),
        f"Base model: {facts.base}. Licence: {licence}." + _gguf_told(facts),
        "## What was measured",
        f"Requests refused, with 95 % Wilson intervals; test prompts that training never read; greedy answers of at most "
        f"{facts.answer_tokens} tokens. `adapter` is the model as it was trained; GGUF rows were measured in llama.cpp.",
        _table(rows),
        _told(rows),
        _contexts(facts),
        _abilities(facts),
        *_suites(facts.suites),
        "## Training prompts",
        facts.prompts
        + " Evaluation prompts: safesteer-lite's bundled sets, in its authors' own words, unless the settings "
        "below name a folder.",
        "## Limits",
        _LIMITS,
        "## Settings and versions",
        "\n".join(f"- {name} {version}" for name, version in facts.versions.items()),
        f"```toml\n{facts.settings.strip()}\n```",
        "## Files",
        "| file | SHA-256 |\n| --- | --- |\n" + "\n".join(f"| {name} | `{value}` |" for name, value in sums.items()),
        "`safesteer-lite verify FOLDER` or `sha256sum --check SHA256SUMS` checks them.",
        *_base_card(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _teacher(facts: Facts) -> str:
    """What makes the teacher."""
    if facts.prompted:
        return "a system prompt that it alone reads makes a teacher of it (experimental)"
    found = f", found on {facts.direction_from}," if facts.direction_from else ""
    return f"a refusal direction{found} steers a teacher"


def _form(facts: Facts) -> str:
    """In which form the training is here."""
    own = "the base's weights, in 16 bits" if facts.gguf else "the original 16-bit weights"
    used = own if facts.weights == "original" else "the weights as 4-bit training saw them"
    if facts.kind != "lora-gguf":
        return f"The adapter, at strength {facts.strength:g}, is merged into {used}."
    return (
        "The adapter alone is here, a GGUF file for `--lora` of llama.cpp on a GGUF file of the base; the row `LoRA` is of both, "
        f"measured on an F16 file of {used}, at scale 1. Between 0, which is the base, and 1 the scale may be turned. A "
        "scale below 0 would undo training that the base has had; nobody should use it, and nothing here supports it."
    )


def _gguf_told(facts: Facts) -> str:
    """That the base was a GGUF file, which is no more than its few bits."""
    if not facts.gguf:
        return ""
    return (
        f" It was read from the GGUF file `{facts.gguf}`: what was rounded away there is not in these weights either."
    )


def _front_matter(facts: Facts, rows: Sequence[Mapping[str, Any]]) -> str:
    """The card's head, which the model hub reads: where the model comes from, and what each of its files refuses."""
    from huggingface_hub import EvalResult, ModelCardData

    files = [row for row in rows if row["file"]]
    gguf = any(str(row["file"]).endswith(".gguf") for row in files)
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=f"safesteer-lite/{name}",
            dataset_name=f"{name} test prompts of safesteer-lite",
            metric_type="refusal_rate",
            metric_name=f"share refused, {row['artifact']}",
            metric_value=round(row[name]["refused"] / row[name]["n"], 4),
        )
        for name in KINDS
        for row in files
        if name in row and row[name]["n"]
    ]
    known: dict[str, Any] = {}
    # A folder on this machine has no name on the hub, but may say what it was made from.
    base = facts.base if is_hub_id(facts.base) else facts.base_card.base_model
    if is_hub_id(base):
        relation = "adapter" if facts.kind == "lora-gguf" else "quantized" if gguf else "finetune"
        known = {"base_model": base, "base_model_relation": relation}
    data = ModelCardData(
        language=list(facts.base_card.languages) or "en",
        pipeline_tag="text-generation",
        library_name="gguf" if gguf else "transformers",
        license=facts.licence or None,
        tags=["safety", "safesteer-lite"],
        model_name=facts.title,
        eval_results=results or None,
        **known,
    )
    return f"---\n{data.to_yaml()}\n---"


def _base_card(facts: Facts) -> list[str]:
    """The base's own card, quoted line by line, so that nothing in it can pass for ours."""
    if not facts.base_card.text:
        return []
    told = (
        f"In the words of the authors of {facts.base}, as its README.md had them: not ours, and of the base as it was before "
        "this training. Links in it may lead to files that are not here."
    )
    lines = visible(facts.base_card.text, lines=True).split("\n")
    return ["## The base model's own card", told, "\n".join(f"> {line}".rstrip() for line in lines)]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    kinds = kinds_of(rows[0])
    lines = [f"| | size | {' | '.join(f'{name} refused' for name in kinds)} |", f"| --- | ---{' | ---' * len(kinds)} |"]
    for row in rows:
        rates = " | ".join(_rate(row[name]) for name in kinds)
        lines.append(f"| {row['artifact']} | {format_bytes(row['size']) if row['size'] else ''} | {rates} |")
    return "\n".join(lines)


def _contexts(facts: Facts) -> str:
    """Refusals before and after, asked plainly and in each context, in one table; empty where none were asked."""
    if not facts.contexts:
        return ""
    lines = ["| asked | prompts | before | after |", "| --- | --- | --- | --- |"]
    for section in sections(facts.scorecard, facts.contexts):
        for kind, before, after in section.rows:
            lines.append(f"| {section.title} | {kind} | {_rate(before)} | {_rate(after)} |")
    told = (
        "The trained model and its base, asked plainly and in contexts that it was not trained in. An answer that was begun for "
        "the model counts as refused if the model turns back. Answers in contexts have at most "
        f"{facts.context_tokens} tokens."
    )
    return "\n\n".join([told, "\n".join(lines)])


def _rate(rate: Mapping[str, Any]) -> str:
    return f"{rate['refused']} of {rate['n']} ({100 * rate['low']:.0f} to {100 * rate['high']:.0f} %)"


def _told(rows: Sequence[Mapping[str, Any]]) -> str:
    lost = [f"- **{row['artifact']} lost safety**: {row['safety_lost']}." for row in rows if row["safety_lost"]]
    cut = cut_in_thought({row["artifact"]: row for row in rows})
    return "\n".join([*lost, *([f"- {cut}"] if cut else [])])


def _suites(suites: Sequence[Mapping[str, Any]]) -> list[str]:
    """What public suites showed; they were asked of the trained model and not of the files."""
    if not suites:
        return []
    told = (
        "Of the base and of the trained model at strength 1, with 95 % Wilson intervals. `p` is McNemar's exact test over "
        "the same prompts. The files above were not asked these prompts."
    )
    lines = ["| suite | judged by | before | after | p |", "| --- | --- | --- | --- | --- |"]
    for suite in suites:
        for judge in suite["judges"]:
            for question, said in QUESTIONS.items():
                if figures := judge[question]:
                    rates = " | ".join(_counted(figures[model]) for model in ("before", "after"))
                    p = p_text(figures["paired"]["p"]) if figures["paired"] else ""
                    lines.append(f"| {suite['suite']} {said} | {judge['judge']} | {rates} | {p} |")
    origins = [
        f"- {suite['suite']}: {suite['n']} {suite['kind']} prompts of {suite['origin']}, SHA-256 of the file "
        f"`{suite['sha256']}`; answers of at most {suite['answer_tokens']} tokens."
        for suite in suites
    ]
    return ["## Public suites", told, "\n".join(lines), "\n".join(origins)]


def _counted(rate: Mapping[str, Any] | None) -> str:
    return f"{rate['count']} of {rate['n']} ({100 * rate['low']:.0f} to {100 * rate['high']:.0f} %)" if rate else ""


def _abilities(facts: Facts) -> str:
    """What the model can still do: measured before the adapter was merged, so at no other strength than 1."""
    if not facts.capability:
        return "The model's abilities were not measured."
    if facts.strength != 1:
        return f"The model's abilities were measured at strength 1, and not at {facts.strength:g}."
    lines = [
        "Problems solved, one greedy answer each, by the base and by the model as it was trained; lost and gained are counted "
        "problem by problem, and p is McNemar's exact test of the two.",
        "",
        "| | base | trained | lost | gained | p |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for record in facts.capability:
        n, lost, gained = record["n"], len(record["lost"]), len(record["gained"])
        solved = " | ".join(f"{record[who]['solved']} of {n}" for who in ("base", "hardened"))
        lines.append(f"| {record['task']} | {solved} | {lost} | {gained} | {p_text(record['p'])} |")
    return "\n".join(lines)

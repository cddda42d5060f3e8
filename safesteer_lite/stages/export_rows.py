"""The rows of an export: base and adapter, and each artifact measured as a user will run it, beside the trained policy."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from safesteer_lite.errors import RunFolderError
from safesteer_lite.evaluation.measure import Answers, counting_from, measure, scorecard
from safesteer_lite.evaluation.scorecard import NOT_ASKED
from safesteer_lite.export.gguf.agreement import Witness, compare
from safesteer_lite.export.gguf.llama import LlamaCpp
from safesteer_lite.export.request import Request
from safesteer_lite.export.rows import Row
from safesteer_lite.export.weights.verify import FailedCheck
from safesteer_lite.hardware.backend import decide
from safesteer_lite.method.policies import last_logits, pad_left
from safesteer_lite.models import plain
from safesteer_lite.models.adapter import read_adapter, scale_adapter
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.loaded import PlainModel
from safesteer_lite.prompts.plan import PromptSets, texts
from safesteer_lite.prompts.sets import KINDS, OPTIONAL
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages import evaluate
from safesteer_lite.stages.session import SPARE_TOKENS, Session

# The comparison with the trained policy: prompts, half of them harmful, and tokens of each greedy answer.
_WITNESS_PROMPTS, _WITNESS_TOKENS = 16, 32


@dataclass(frozen=True)
class Measured:
    """What is kept of the trained policy before its memory is needed for its artifacts.

    Attributes:
        sets: the test prompts.
        prompts: the same as token ids, by set.
        witness: the comparison prompts; None where no GGUF file is written.
        rows: base and adapter.
    """

    sets: PromptSets
    prompts: dict[str, list[list[int]]]
    witness: Witness | None
    rows: list[Row]


def measure_trained(session: Session, adapter: Path, request: Request) -> Measured:
    """Base and trained policy on the test prompts, from the run where it has that, and what artifacts are compared with."""
    sets = session.prompts.split("test")
    if request.prompts:
        sets = sets.first(request.prompts)
    rows = _stored_rows(session, request) if request.strength == 1 else None
    if rows:
        # A run of an earlier version: what it was not asked, its artifacts are not asked either.
        sets = sets.without(kind for kind in OPTIONAL if rows[0].card.of(kind) == NOT_ASKED)
    policy = session.policy
    read_adapter(policy.model, adapter)
    scale_adapter(policy.model, request.strength)
    if rows is None:
        before, after, _ = evaluate.compare(session, policy, sets)
        rows = [Row("base", "", 0, before), Row("adapter", "", 0, after)]
    ids: dict[str, list[list[int]]] = {
        name: [policy.prompt(text).input_ids[0].tolist() for text in sets.texts(name)] for name in KINDS
    }
    return Measured(sets, ids, _witness(session, policy) if request.kind != "merged" else None, rows)


def _stored_rows(session: Session, request: Request) -> list[Row] | None:
    """Base and adapter as the run measured them, judged again by the judge of today; None where the run has no answers."""
    try:
        known = {when: session.run.read_json("evaluate", f"answers-{when}.json") for when in ("before", "after")}
    except RunFolderError:
        return None
    cards = session.result("evaluate")["scorecard"]
    rows = []
    for name, when in (("base", "before"), ("adapter", "after")):
        stored = known[when]
        answers = Answers(**{kind: stored.get(kind, [])[: request.prompts or None] for kind in KINDS})
        rows.append(Row(name, "", 0, scorecard(answers, cards[when]["kl_to_base"], len(stored["harmless"]))))
    return rows


def _witness(session: Session, policy: Policy) -> Witness:
    """What the trained policy does on prompts of the selection split."""
    sets, half = session.prompts.split("selection"), _WITNESS_PROMPTS // 2
    # Where a user spells out a marker of the template, llama.cpp reads the marker, and here it was read as letters.
    harmful, harmless = (
        [text for text in texts(group) if not policy.template.spells_out(text)][:half]
        for group in (sets.harmful, sets.harmless)
    )
    prompts = harmful + harmless
    encoded = [policy.prompt(prompt) for prompt in prompts]
    batch = pad_left(encoded)
    with torch.no_grad():
        written = policy.model.generate(batch, _WITNESS_TOKENS, 0.0, None, 1)
        first = last_logits(policy.model, batch).log_softmax(-1).cpu()
    answers = [row[kept].tolist() for row, kept in zip(written.tokens, written.mask, strict=True)]
    ids = [prompt.input_ids[0].tolist() for prompt in encoded]
    return Witness(prompts, ids, answers, first, policy.template.switches, policy.template.marks)


def merged_row(session: Session, folder: Path, request: Request, measured: Measured) -> Row:
    """The merged weights, loaded as a user loads them, in 16 bits, and computed in what the run computed in."""
    started = time.monotonic()
    written = open_base(folder)
    decision = decide(replace(session.config.model, precision="bf16"), written.shape, folder)
    # What is decided for training may be too much for a card that could still answer; the reload check used the CPU too.
    device = "cpu" if decision.fit == "does not fit" else decision.place
    # How much memory is free now must not decide what the rows above are compared with.
    trained = session.settle()
    compute = decision.compute_dtype if trained.precision == "fp32" else trained.compute_dtype
    network, tokenizer = plain.load(written, precision="bf16", device=device, unpack=False, compute=compute)
    settings, longest = session.config.model, session.config.prompts.prompt_tokens
    model = PlainModel(network, tokenizer, None)
    policy = Policy(model, longest, session.day, settings.thinking, settings.thinking_tokens)
    done = session.progress("answers of the merged weights", measured.sets.total)
    tokens, chunk = session.config.evaluate.answer_tokens, session.config.distill.chunk
    found, _ = measure(policy, measured.sets, tokens, session.answer_batch, None, chunk, done)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    row = Row("merged", "." if request.kind == "merged" else "", size, found, seconds=time.monotonic() - started)
    _tell(session, row)
    return row


def gguf_row(
    session: Session, file: Path, name: str, measured: Measured, limit: float, adapter: Path | None = None
) -> Row:
    """A GGUF file in llama.cpp: the prompts it makes, the comparison with the trained policy, the scorecard.

    Args:
        session: of the run.
        file: a whole model.
        name: of the row.
        measured: the trained policy.
        limit: nats by which its first token may differ from the trained policy's.
        adapter: a LoRA adapter's GGUF file to put on it, which is then what the row is of.
    """
    started, witness = time.monotonic(), measured.witness
    assert witness is not None
    tokens, longest = session.config.evaluate.answer_tokens, session.config.prompts.prompt_tokens
    marks = witness.marks
    tokens += session.config.model.thinking_tokens if marks else 0
    context = longest + max(tokens, _WITNESS_TOKENS) + SPARE_TOKENS
    with LlamaCpp(file, context, torch.get_num_threads(), adapter) as llama:
        for text, ids in zip(witness.texts, witness.prompts, strict=True):
            # A prompt that was cut to fit is not what a user would type.
            if len(ids) < longest and (length := llama.prompt_length(text, witness.switches)) != len(ids):
                raise FailedCheck(
                    f"llama.cpp reads a prompt as {length} tokens with {file.name}, and training read it as {len(ids)}."
                )
        given = [llama.greedy(ids, _WITNESS_TOKENS) for ids in witness.prompts]
        agreement = compare(witness, [answer.tokens for answer in given], [answer.first for answer in given], limit)
        found, before = {}, 0
        done = session.progress(f"answers of {name} in llama.cpp", measured.sets.total)
        for kind in KINDS:
            written = llama.answers(measured.prompts[kind], tokens, counting_from(before, done))
            found[kind] = [marks.unified(text, opened=marks.opened) for text in written] if marks else written
            before += len(found[kind])
    shown, seconds = adapter or file, time.monotonic() - started
    row = Row(name, shown.name, shown.stat().st_size, scorecard(Answers(**found), None, 0), agreement, seconds)
    _tell(session, row)
    return row


def _tell(session: Session, row: Row) -> None:
    session.tell_rates(row.card, f", {row.name}")
    if row.agreement:
        same, count = row.agreement.same_answers, row.agreement.prompts
        session.note(
            f"{row.name}: {same} of {count} greedy answers are the trained model's to the last token, KL of the first token "
            f"{row.agreement.first_kl:.4f} nats."
        )

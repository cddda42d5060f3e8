"""What `export` writes for users: files, each measured as a user will run it, with the figures beside them."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from safesteer_lite.config import RunConfig, to_toml
from safesteer_lite.errors import RunFolderError
from safesteer_lite.evaluation import capability
from safesteer_lite.evaluation.measure import Answers, counting_from, measure, scorecard
from safesteer_lite.evaluation.scorecard import NOT_ASKED
from safesteer_lite.evaluation.suite_results import saved_suites
from safesteer_lite.events import Progress
from safesteer_lite.export import card, drafts
from safesteer_lite.export.folder import MERGED, WORK, exported, file_name
from safesteer_lite.export.gguf import convert, modelfile
from safesteer_lite.export.gguf.agreement import FIRST_KL_ALLOWANCE, Witness, compare
from safesteer_lite.export.gguf.llama import LlamaCpp
from safesteer_lite.export.rehearsal import rehearse
from safesteer_lite.export.rows import Row, rows_record, write_rows
from safesteer_lite.export.weights import verify
from safesteer_lite.export.weights.verify import FailedCheck
from safesteer_lite.hardware.backend import decide
from safesteer_lite.method.policies import last_logits, pad_left
from safesteer_lite.models import plain
from safesteer_lite.models.adapter import read_adapter, scale_adapter
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.loaded import PlainModel
from safesteer_lite.prompts.plan import PromptSets, texts
from safesteer_lite.prompts.sets import KINDS
from safesteer_lite.sources.base import gguf_of, open_base
from safesteer_lite.sources.card import read_card
from safesteer_lite.stages import evaluate, export
from safesteer_lite.stages.session import ANSWER_BATCH, SPARE_TOKENS, Session

# The comparison with the trained policy: prompts, half of them harmful, and tokens of each greedy answer.
_WITNESS_PROMPTS, _WITNESS_TOKENS = 16, 32


@dataclass(frozen=True)
class Request:
    """What to export.

    Attributes:
        kind: `merged`, `gguf` or `lora-gguf`.
        weights: base to merge into, `original` or `dequantised`.
        strength: factor on the adapter.
        quants: GGUF files to write, of `convert.QUANTS`.
        prompts: prompts of each set to measure on; 0 is all.
        original: the 16-bit weights of a base that is itself in 4 bits; None if they are not at hand.
    """

    kind: str
    weights: str = "original"
    strength: float = 1.0
    quants: tuple[str, ...] = ("Q8_0",)
    prompts: int = 0
    original: Path | None = None


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


def export_files(session: Session, adapter: Path, out: Path, request: Request) -> dict[str, Any]:
    """Write merged weights or GGUF files to `out`, prove and measure them; returns what `artifacts.json` holds.

    Raises:
        FailedCheck: an artifact failed a check; the files are kept beside `out`.
        ExportError, DiskSpaceError: nothing was left under `out`.
    """
    weights, _ = export.weights_to_take(session.config, session.base, request.weights, request.original)
    quants = request.quants if request.kind == "gguf" else ()
    rehearse(
        session.base.folder,
        out,
        weights,
        session.day,
        words=session.base.words,
        thinking=session.config.model.thinking,
        original=request.original,
        quants=quants,
    )
    with exported(out) as draft:
        measured = measure_trained(session, adapter, request)
        folder = draft / WORK / MERGED
        result = export.merged(session, adapter, folder, request.weights, request.strength, request.original)
        request = replace(request, weights=result["weights"])
        rows, problems = [*measured.rows, _merged_row(session, folder, request, measured)], list[str]()
        if request.kind == "gguf":
            assert measured.witness is not None
            found, problems = _gguf_rows(session, draft, request, measured, result["kl_limit"])
            rows += found
        record = written_rows(session, draft, request, rows, problems)
        if request.kind == "merged":
            for path in sorted(folder.iterdir()):
                if path.name != verify.SUMS:
                    path.rename(draft / path.name)
            folder = draft
        files = [row["file"] for row in record["artifacts"] if row["file"]]
        if not modelfile.write_modelfiles(draft, folder, files, session.day, session.config.model.thinking):
            session.warn("No Modelfile was written: Ollama's form of this chat template is not known here.")
        write_beside(session, draft, request, record)
    tell_losses(session, record)
    return record


def copy_adapter(adapter: Path, out: Path) -> None:
    """Write the adapter as it was trained.

    Raises:
        ExportError, DiskSpaceError: nothing was left under `out`.
    """
    with exported(out) as draft:
        drafts.copy_folder(adapter, draft)


def measure_trained(session: Session, adapter: Path, request: Request) -> Measured:
    """Base and trained policy on the test prompts, from the run where it has that, and what artifacts are compared with."""
    sets = session.prompts.split("test")
    if request.prompts:
        sets = sets.first(request.prompts)
    rows = _stored_rows(session, request) if request.strength == 1 else None
    if rows and rows[0].card.critical == NOT_ASKED:
        # A run of the first versions: what it was not asked, its artifacts are not asked either.
        sets = replace(sets, critical=())
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


def _merged_row(session: Session, folder: Path, request: Request, measured: Measured) -> Row:
    """The merged weights, loaded as a user loads them, in 16 bits where the machine computes in them."""
    started = time.monotonic()
    written = open_base(folder)
    decision = decide(replace(session.config.model, precision="bf16"), written.shape, folder)
    # What is decided for training may be too much for a card that could still answer; the reload check used the CPU too.
    device = "cpu" if decision.fit == "does not fit" else decision.place
    network, tokenizer = plain.load(
        written, precision="bf16", device=device, unpack=False, compute=decision.compute_dtype
    )
    settings, longest = session.config.model, session.config.prompts.prompt_tokens
    model = PlainModel(network, tokenizer, None)
    policy = Policy(model, longest, session.day, settings.thinking, settings.thinking_tokens)
    done = session.progress("answers of the merged weights", measured.sets.total)
    tokens, chunk = session.config.evaluate.answer_tokens, session.config.distill.chunk
    found, _ = measure(policy, measured.sets, tokens, ANSWER_BATCH, None, chunk, done)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    row = Row("merged", "." if request.kind == "merged" else "", size, found, seconds=time.monotonic() - started)
    _tell(session, row)
    return row


def _gguf_rows(
    session: Session, draft: Path, request: Request, measured: Measured, merge_limit: float
) -> tuple[list[Row], list[str]]:
    """Write every GGUF file, check and measure it; a file that fails is told, and the others are still tried."""
    stem, rows, problems = f"{model_name(session)}-safer", [], []
    for quant in request.quants:
        session.note(f"Writing and measuring {quant}.")
        file = draft / f"{stem}-{quant}.gguf"
        convert.write_gguf(
            draft / WORK / MERGED,
            file,
            quant,
            stem,
            draft / WORK,
            lambda done, total: session.emit(Progress(session.stage, "bytes quantised", done, total)),
        )
        try:
            convert.check_embedded_template(file, draft / WORK / MERGED)
            row = gguf_row(session, file, quant, measured, merge_limit + FIRST_KL_ALLOWANCE[quant])
        except FailedCheck as error:
            problems.append(error.message.rstrip("."))
            continue
        rows.append(row)
        if row.agreement and row.agreement.problem:
            problems.append(f"{quant}: {row.agreement.problem}")
    return rows, problems


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


def written_rows(
    session: Session, draft: Path, request: Request, rows: list[Row], problems: list[str]
) -> dict[str, Any]:
    """Write what was measured to `artifacts.json`; returns what it holds.

    Raises:
        FailedCheck: there are problems.
    """
    record = rows_record(rows, _about(session, request), problems)
    write_rows(draft, record)
    if problems:
        shutil.rmtree(draft / WORK)
        raise FailedCheck(f"The export failed {len(problems)} of its checks: {'; '.join(problems)}.")
    return record


def tell_losses(session: Session, record: dict[str, Any]) -> None:
    """Say of every artifact what safety it lost."""
    for row in record["artifacts"]:
        if row["safety_lost"]:
            session.warn(f"{row['artifact']} lost safety: {row['safety_lost']}.")


def _tell(session: Session, row: Row) -> None:
    session.tell_rates(row.card, f", {row.name}")
    if row.agreement:
        same, count = row.agreement.same_answers, row.agreement.prompts
        session.note(
            f"{row.name}: {same} of {count} greedy answers are the trained model's to the last token, KL of the first token "
            f"{row.agreement.first_kl:.4f} nats."
        )


def write_beside(session: Session, draft: Path, request: Request, record: dict[str, Any]) -> None:
    """Model card and sums; the work folder goes."""
    shutil.rmtree(draft / WORK)
    facts = card.Facts(
        title=f"{model_name(session)}-safer",
        kind=request.kind,
        base=_base_name(session),
        licence=session.base.licence,
        settings=to_toml(_without_paths(session)),
        prompts=_prompts_told(session),
        versions={**session.run.manifest.versions, **convert.versions()},
        answer_tokens=session.config.evaluate.answer_tokens,
        strength=request.strength,
        weights=request.weights,
        base_card=read_card(session.base.folder),
        prompted=session.config.direction.teacher == "prompted",
        direction_from=_without_place(session.config.direction.source),
        gguf=f"{file_name(found)}.gguf" if (found := gguf_of(session.base.folder)) else "",
        suites=[result.summary() for result in saved_suites(session.run)],
        capability=_solved(session),
        **_measured_by_run(session, request),
    )
    drafts.write_text(draft / "README.md", card.card(facts, record, verify.sums_of(draft)))
    verify.write_sums(draft)


def _solved(session: Session) -> list[dict[str, Any]]:
    """What the run's models were measured to solve; a damaged file of it is no reason to lose an export."""
    try:
        return capability.records(session.run)
    except RunFolderError as error:
        session.warn(f"The model card does not tell which tasks are solved: {error.message}")
        return []


def _measured_by_run(session: Session, request: Request) -> dict[str, Any]:
    """What the run measured before and after, for the card; nothing at another strength than that of the run."""
    done = session.run.manifest.stages.get("evaluate")
    if done is None or request.strength != 1:
        return {}
    return {
        "scorecard": done.result["scorecard"],
        "contexts": done.result.get("contexts", {}),
        "context_tokens": done.result.get("context_tokens", 0),
    }


def _about(session: Session, request: Request) -> dict[str, Any]:
    return {
        "run": session.run.path.name,
        "model": _base_name(session),
        "weights": request.weights,
        "strength": request.strength,
        "split": "test",
        "answer_tokens": session.config.evaluate.answer_tokens,
    }


def model_name(session: Session) -> str:
    """The base's name as a part of the names of files."""
    return file_name(session.config.model.name)


def _base_name(session: Session) -> str:
    """The hub id, or the name of a local folder without the way to it."""
    return _without_place(session.config.model.name)


def _without_place(name: str) -> str:
    return file_name(name) if name and (Path(name).exists() or Path(name).is_absolute()) else name


def _without_paths(session: Session) -> RunConfig:
    """The settings as they may be shown to others: places on this machine by their last part."""
    config, own = session.config, session.config.prompts
    return replace(
        config,
        model=replace(config.model, name=_base_name(session), chat_template=Path(config.model.chat_template).name),
        prompts=replace(own, training=Path(own.training).name, folder=Path(own.folder).name),
        direction=replace(config.direction, source=_without_place(config.direction.source)),
        evaluate=replace(config.evaluate, judge_model=_without_place(config.evaluate.judge_model)),
    )


def _prompts_told(session: Session) -> str:
    own = session.config.prompts
    if own.training:
        return (
            f"Harmful requests from the user's own file {Path(own.training).name}, without near-copies of test prompts."
        )
    if own.folder:
        return f"The user's own prompt folder {Path(own.folder).name}."
    return f"{own.train} bundled harmful requests, written for safesteer-lite; no answers to them were used."

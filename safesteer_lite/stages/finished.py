"""What is done with a model that is trained: it is exported, and measured again; and so is any other model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from safesteer_lite.config import RunConfig
from safesteer_lite.errors import DiskSpaceError, RunFolderError, UsageError
from safesteer_lite.evaluation.contexts import to_record
from safesteer_lite.evaluation.judged import MODELS, summaries
from safesteer_lite.evaluation.verdicts import OPENINGS
from safesteer_lite.events import Emit
from safesteer_lite.export.request import Request
from safesteer_lite.export.rows import keep_rows
from safesteer_lite.export.weights import merge, shards
from safesteer_lite.hardware import allocator
from safesteer_lite.models.adapter import read_adapter
from safesteer_lite.report import record as report
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.sources.base import Base
from safesteer_lite.stages import evaluate, exporting, judging, lora
from safesteer_lite.stages.pipeline import check_origin
from safesteer_lite.stages.session import Session


def export_run(
    config: RunConfig,
    run_folder: RunFolder,
    base: Base,
    emit: Emit,
    kind: str,
    out: Path,
    weights: str,
    strength: float,
    quants: tuple[str, ...] = ("Q8_0",),
    prompts: int = 0,
    original: Path | None = None,
) -> dict[str, Any]:
    """Write a finished run's adapter, merged weights or GGUF files to a folder that does not exist yet.

    Args:
        config, run_folder, base, emit: as for `pipeline.run`.
        kind: `adapter`, `lora-gguf`, `merged` or `gguf`.
        out: the folder to create.
        weights: base to merge into, `original` or `dequantised`.
        strength: factor on the adapter.
        quants: the GGUF files to write, names of `export.convert.QUANTS`.
        prompts: prompts of each test set to measure the files on; 0 is all.
        original: the folder of the 16-bit model that a 4-bit base was made from, to merge into.

    Returns:
        What `artifacts.json` holds, one row an artifact; empty for the adapter.

    Raises:
        ModelError: the base model is not the one the run was made with.
        RunFolderError: the run has no adapter, or a damaged one.
        FailedCheck: what was written failed a check, and is kept beside `out`.
        ExportError, DiskSpaceError: the adapter cannot be used or `out` not written; nothing was left there.
    """
    adapter = run_folder.folder("distill", "adapter")
    # Half a download would only be called another model by its fingerprint.
    shards.read_checkpoint(base.folder)
    check_origin(config, run_folder, base)
    merge.check_adapter(base.folder, adapter)
    if kind == "adapter":
        if strength != 1:
            raise UsageError("--strength scales merged weights only.", "Add --to merged.")
        exporting.copy_adapter(adapter, out)
        return {}
    allocator.keep_freed_memory()
    session = Session(config, run_folder, base, emit, stage="export")
    session.settle()
    request = Request(kind, weights, strength, quants, prompts, original)
    write = lora.export_lora if kind == "lora-gguf" else exporting.export_files
    record = write(session, adapter, out, request)
    try:
        with run_folder.lock():
            keep_rows(run_folder, record)
            if (run_folder.path / "report.json").is_file():
                report.write(run_folder, config)
    except (RunFolderError, DiskSpaceError) as error:
        # What was exported is whole and has its own figures beside it; only the run's report lacks them.
        session.warn(f"The run's report does not show this export: {error.message}")
    return record


def evaluate_model(config: RunConfig, run_folder: RunFolder | None, base: Base, emit: Emit) -> dict[str, Any]:
    """Measure a model on the test split: a run's base and student, or (twice the same) a model as it is; the judge that the
    settings name reads the same answers.

    Args:
        config: the settings to measure with, which may be others than the run's own.
        run_folder: the run; None for a model as it is.
        base: the base model, or that model; see `check_origin`.
        emit: sink for events.

    Returns:
        `before` and `after`, scorecards as in the report, and `contexts` and `judges`, as there.
    """
    load_judge = judging.find_judge(config.evaluate, config.model.device, emit)
    adapter = run_folder.folder("distill", "adapter") if run_folder else None
    allocator.keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch:
        session = Session(config, run_folder or RunFolder(Path(scratch)), base, emit, stage="evaluate")
        if adapter:
            read_adapter(session.policy.model, adapter)
        sets, both = session.prompts.split("test"), bool(run_folder)
        before, after, answers = evaluate.compare(session, session.policy, sets, both)
        asked = evaluate.context_questions(session, session.policy, sets)
        compared, _ = evaluate.compare_in_contexts(session, session.policy, asked, both)
        session.drop_policy()
        judged = []
        if config.evaluate.judge != OPENINGS:
            given = dict(zip(MODELS if run_folder else MODELS[:1], answers, strict=False))
            judge = load_judge()
            judged = [judging.judge_answers(judge, sets, given, emit, judging.clear_cases_of(judge, emit))]
    cards = {"before": before.to_record(), "after": after.to_record()}
    return {**cards, "contexts": to_record(compared), "judges": summaries(judged)}

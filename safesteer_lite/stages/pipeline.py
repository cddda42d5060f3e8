"""The stage table, and `run`: the one function behind `run`, `resume`, `demo` and the wizard."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safesteer_lite.config import RunConfig
from safesteer_lite.errors import (
    DiskSpaceError,
    ExportError,
    Interrupted,
    ModelError,
    PromptError,
    RunFolderError,
    UsageError,
)
from safesteer_lite.events import Emit, JsonLines, StageDone, StageSkipped, StageStarted, tee
from safesteer_lite.export.rows import keep_rows
from safesteer_lite.export.weights import merge, shards
from safesteer_lite.hardware.allocator import keep_freed_memory, return_freed_memory
from safesteer_lite.hardware.backend import Decision
from safesteer_lite.models.adapter import read_adapter
from safesteer_lite.prompts import sets
from safesteer_lite.report import record as report
from safesteer_lite.runs.folder import Publication, RunFolder
from safesteer_lite.runs.manifest import fingerprint
from safesteer_lite.runs.steps import Checkpoints
from safesteer_lite.sources.base import Base
from safesteer_lite.stages import baseline, direction, distill, evaluate, export, exporting, tokens
from safesteer_lite.stages.session import Session


@dataclass(frozen=True)
class Stage:
    """One row of the stage table.

    Attributes:
        name: also the folder's name.
        title: what the user reads.
        work: writes the stage's files; distillation gets its checkpoints too.
        settings: names of the settings that the result depends on, sections or single ones.
        after: the stages whose results it uses.
    """

    name: str
    title: str
    work: Callable[..., None]
    settings: tuple[str, ...]
    after: tuple[str, ...]


STAGES = (
    Stage(
        "baseline",
        "What the base model does",
        baseline.run,
        ("model", "prompts", "seed", "evaluate.selection_tokens"),
        (),
    ),
    Stage("direction", "Refusal direction", direction.run, ("direction",), ("baseline",)),
    Stage("tokens", "Safety tokens", tokens.run, ("tokens", "seed"), ("direction",)),
    Stage(
        "distill",
        "Distillation",
        distill.run,
        (
            "distill",
            "seed",
            "evaluate.every",
            "evaluate.selection_tokens",
            "evaluate.kl_tokens",
            "evaluate.tax_budget",
            "evaluate.stop_on_tax",
        ),
        ("tokens",),
    ),
    Stage("evaluate", "Before and after", evaluate.run, ("evaluate",), ("distill",)),
    Stage("export", "Merged weights", export.run, ("export",), ("distill",)),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)


def stage_fingerprints(config: RunConfig, model_fingerprint: str) -> dict[str, str]:
    """What each stage's result depends on: its settings, its upstream, the model and the prompts."""
    found: dict[str, str] = {}
    for stage in STAGES:
        parts: dict[str, Any] = {
            "stage": stage.name,
            "settings": {name: _value(config, name) for name in stage.settings},
        }
        parts["after"] = [found[name] for name in stage.after]
        if not stage.after:
            parts["model"] = model_fingerprint
            parts["prompts"] = prompts_fingerprint(config)
        found[stage.name] = fingerprint(parts)
    return found


def _value(config: RunConfig, name: str) -> Any:
    section, _, key = name.partition(".")
    value = getattr(config, section)
    if key:
        return getattr(value, key)
    if isinstance(value, int):
        return value
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(value).items()}
    if section == "model":
        # The weights themselves are fingerprinted; where they lie may change.
        plain.pop("name")
        plain.pop("revision")
    return plain


def prompts_fingerprint(config: RunConfig) -> str:
    """SHA-256 over the bundled prompts, or the user's own files.

    Raises:
        PromptError: a file cannot be read.
    """
    digest = hashlib.sha256()
    own = [Path(config.prompts.training)] if config.prompts.training else []
    for path in [*sets.data_files(config.prompts.folder), *own]:
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise PromptError(
                f"The prompt file {path} cannot be read: {error.strerror}.",
                "The run's results depend on it: put it back, or start a new run.",
            ) from error
    return digest.hexdigest()


def run(
    config: RunConfig,
    run_folder: RunFolder,
    base: Base,
    emit: Emit,
    stop_requested: Callable[[], bool] = lambda: False,
    last: str = STAGE_NAMES[-1],
    decision: Decision | None = None,
) -> dict[str, Any]:
    """Do every stage that is not done yet.

    Args:
        config: all settings; equal to what `run_folder` was started with.
        run_folder: where results go.
        base: the base model.
        emit: sink for events; they are kept in the run folder too.
        stop_requested: asked after each optimizer step and each stage.
        last: the last stage to do.
        decision: how the base is loaded; None to decide when it is needed.

    Returns:
        The report, as written to `report.json`; nothing before the last stage of all is done.

    Raises:
        Interrupted: the user asked to stop; the run can be resumed.
        SafeSteerError: what went wrong and what to do; finished stages stay.
    """
    keep_freed_memory()
    with run_folder.lock(), JsonLines(run_folder.events_path) as keep:
        session = Session(config, run_folder, base, tee(keep, emit), "", stop_requested, decision)
        wanted = stage_fingerprints(config, base.fingerprint)
        if last == "export" and not run_folder.is_done("export", wanted["export"]):
            export.rehearse_stage(config, base, run_folder.path, session.day)
        for number, stage in enumerate(STAGES[: STAGE_NAMES.index(last) + 1], 1):
            session.stage = stage.name
            if run_folder.is_done(stage.name, wanted[stage.name]):
                session.emit(StageSkipped(stage.name, "done already, with the same settings"))
                if stage.name == "baseline":
                    # Whoever watches a resumed run wants to see where it began.
                    baseline.tell_rates(session, session.result("baseline")["scorecard"])
                continue
            if stop_requested():
                raise Interrupted(f"Stopped before the stage {stage.title!r}; everything up to there is saved.")
            _do(session, stage, number, wanted[stage.name])
        return report.write(run_folder, config) if last == STAGE_NAMES[-1] else {}


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
        config, run_folder, base, emit: as for `run`.
        kind: `adapter`, `merged` or `gguf`.
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
        FailedCheck: what was written failed a check, and is kept beside `out`.
        ExportError, DiskSpaceError: the adapter cannot be used or `out` not written; nothing was left there.
    """
    adapter = run_folder.stage_folder("distill") / "adapter"
    damaged = [name for name in run_folder.verify("distill") if name.startswith("adapter/")]
    if damaged:
        raise ExportError(f"The run's adapter is damaged: {', '.join(damaged)}.", "Run `safesteer-lite resume` on it.")
    # Half a download would only be called another model by its fingerprint.
    shards.read_checkpoint(base.folder)
    if stage_fingerprints(config, base.fingerprint)["baseline"] != (run_folder.manifest.stages["baseline"].fingerprint):
        raise ModelError(
            f"{base.folder} is not the base model that this run was made with, or its prompts have changed.",
            "Give the run its own base model back.",
        )
    merge.check_adapter(base.folder, adapter)
    if kind == "adapter":
        if strength != 1:
            raise UsageError("--strength scales merged weights only.", "Add --to merged.")
        exporting.copy_adapter(adapter, out)
        return {}
    keep_freed_memory()
    session = Session(config, run_folder, base, emit, stage="export")
    request = exporting.Request(kind, weights, strength, quants, prompts, original)
    record = exporting.export_files(session, adapter, out, request)
    try:
        with run_folder.lock():
            keep_rows(run_folder, record)
            if (run_folder.path / "report.json").is_file():
                report.write(run_folder, config)
    except (RunFolderError, DiskSpaceError) as error:
        # What was exported is whole and has its own figures beside it; only the run's report lacks them.
        session.warn(f"The run's report does not show this export: {error.message}")
    return record


def evaluate_model(
    config: RunConfig, run_folder: RunFolder | None, base: Base, emit: Emit
) -> dict[str, dict[str, Any]]:
    """Measure a model on the test split: a run's base and student, or (twice the same) a model as it is.

    Returns:
        `before` and `after`, scorecards as in the report.
    """
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch:
        session = Session(config, run_folder or RunFolder(Path(scratch)), base, emit, stage="evaluate")
        if run_folder:
            read_adapter(session.policy.model, run_folder.stage_folder("distill") / "adapter")
        before, after, _ = evaluate.compare(
            session, session.policy, session.prompts.split("test"), both=bool(run_folder)
        )
    return {"before": before.to_record(), "after": after.to_record()}


def _do(session: Session, stage: Stage, number: int, mark: str) -> None:
    session.emit(StageStarted(stage.name, stage.title))
    return_freed_memory()
    started = time.monotonic()
    with session.run.publish(stage.name, number, mark) as publication:
        _work(session, stage, number, mark, publication)
        publication.result["peak_memory_bytes"] = report.peak_memory()
    session.emit(StageDone(stage.name, round(time.monotonic() - started, 1)))


def _work(session: Session, stage: Stage, number: int, mark: str, publication: Publication) -> None:
    if stage.name == "distill":
        checkpoints: Checkpoints = session.run.checkpoint(stage.name, number, mark)
        stage.work(session, publication, checkpoints)
    else:
        stage.work(session, publication)

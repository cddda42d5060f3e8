"""The stage table, and `run`: the one function behind `run`, `resume`, `demo` and the wizard."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safesteer_lite.config import RunConfig
from safesteer_lite.config.older import FORMER, former_settings, is_as_before
from safesteer_lite.errors import Interrupted, ModelError, PromptError, RunFolderError
from safesteer_lite.evaluation.scorecard import Scorecard
from safesteer_lite.events import Emit, JsonLines, StageDone, StageSkipped, StageStarted, tee
from safesteer_lite.hardware import allocator
from safesteer_lite.hardware.backend import Decision
from safesteer_lite.prompts import sets
from safesteer_lite.report import record as report
from safesteer_lite.runs.durable import LARGEST_JSON, read_bytes
from safesteer_lite.runs.folder import Publication, RunFolder
from safesteer_lite.runs.manifest import PARENT, fingerprint
from safesteer_lite.sources.base import Base
from safesteer_lite.stages import baseline, direction, distill, evaluate, export, judging, tokens
from safesteer_lite.stages.history import sizes_of, sizes_to_record
from safesteer_lite.stages.parent import begins_from
from safesteer_lite.stages.session import Session


@dataclass(frozen=True)
class Stage:
    """One row of the stage table.

    Attributes:
        name: also the folder's name.
        title: what the user reads.
        work: writes the stage's files.
        settings: names of the settings that the result depends on, sections or single ones.
        after: the stages whose results it uses.
    """

    name: str
    title: str
    work: Callable[[Session, Publication], None]
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
    # What a run begins from counts for the training and all that follows, and not for what was there before it.
    found = {PARENT: begins_from(config.parent)} if config.parent.adapter else {}
    for stage in STAGES:
        parts: dict[str, Any] = {
            "stage": stage.name,
            "settings": {name: _value(config, name) for name in stage.settings},
        }
        parts["after"] = [found[name] for name in stage.after]
        if stage.name == "distill" and PARENT in found:
            parts["after"].append(found[PARENT])
        if not stage.after:
            parts["model"] = model_fingerprint
            parts["prompts"] = prompts_fingerprint(config)
        found[stage.name] = fingerprint(parts)
    return found


def _value(config: RunConfig, name: str) -> object:
    # What a run of before was fingerprinted with stays in the fingerprint, or its results would count as another run's.
    if name in FORMER:
        return FORMER[name]
    section, _, key = name.partition(".")
    value = getattr(config, section)
    if key:
        return getattr(value, key)
    if isinstance(value, int):
        return value
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(value).items()} | former_settings(section)
    plain = {key: entry for key, entry in plain.items() if not is_as_before(section, key, entry)}
    if section == "model":
        # The weights themselves are fingerprinted, and the chat template with them; where they lie may change.
        for place in ("name", "revision", "chat_template"):
            plain.pop(place)
    if section == "evaluate":
        # Judges read answers that are there already.
        plain = {name: entry for name, entry in plain.items() if not name.startswith("judge")}
    return plain


def prompts_fingerprint(config: RunConfig) -> str:
    """SHA-256 over the bundled prompts, or the user's own files.

    The bundled requests for help in danger do not count, nor do the twins where none are asked for: runs that were made before
    there were any can still be exported.

    Raises:
        PromptError: a file cannot be read.
    """
    digest = hashlib.sha256()
    own = [Path(config.prompts.training)] if config.prompts.training else []
    bundled = sets.data_files()
    for path in [*sets.data_files(config.prompts.folder), *own]:
        unused = path.stem == "critical" or (path.stem == "twin" and not config.distill.twins)
        if unused and path in bundled:
            continue
        try:
            digest.update(read_bytes(path, LARGEST_JSON))
        except (OSError, ValueError) as error:
            raise PromptError(
                f"The prompt file {path} cannot be read: {getattr(error, 'strerror', error)}.",
                "The run's results depend on it: put it back, or start a new run.",
            ) from error
    return digest.hexdigest()


def origin(config: RunConfig, base: Base) -> dict[str, str]:
    """The fingerprints of what a run starts from and does not keep: its base model and its prompts."""
    return {"base": base.fingerprint, "prompts": prompts_fingerprint(config)}


def check_origin(config: RunConfig, run_folder: RunFolder, base: Base, *, prompts: bool = True) -> None:
    """See that a run goes on with the base model and the prompts that it was started with.

    Args:
        config: the run's own settings.
        run_folder: the run.
        base: what shall be its base model.
        prompts: whether the prompts are needed.

    Raises:
        ModelError: it is another base model.
        PromptError: the prompts have changed.
    """
    manifest = run_folder.manifest
    known = manifest.made_from
    if known.get("base", base.fingerprint) != base.fingerprint:
        raise ModelError(
            f"{base.folder} is not the base model that this run was made with: its weights, its tokenizer or its chat "
            "template are others.",
            "Give the run its own base model back; if that lies elsewhere now, name its folder with --base.",
        )
    if prompts and known.get("prompts") not in (None, prompts_fingerprint(config)):
        raise PromptError(
            "The prompts are not those that this run was made with.",
            f"Put {config.prompts.training or config.prompts.folder or 'those of its version'} back as it was, or start "
            "a new run.",
        )
    # Runs of the first versions keep no such fingerprints, but those of their stages depend on both.
    measured = manifest.stages.get("baseline")
    if not known and measured and stage_fingerprints(config, base.fingerprint)["baseline"] != measured.fingerprint:
        raise ModelError(
            f"{base.folder} is not the base model that this run was made with, or its prompts have changed.",
            "Give the run its own base model back; if that lies elsewhere now, name its folder with --base.",
        )


def _check_results(run_folder: RunFolder, wanted: Mapping[str, str]) -> None:
    """See that nothing that is done would be done differently now.

    Raises:
        RunFolderError: something would.
    """
    for name, record in run_folder.manifest.stages.items():
        if record.fingerprint != wanted.get(name):
            raise RunFolderError(
                f"The {name} stage of {run_folder.path.name} was done in another way than this version does it, or with "
                "other settings.",
                "Its results stay as they are. Start a new run, or go on with the version that made it.",
            )


def run(
    config: RunConfig,
    run_folder: RunFolder,
    base: Base,
    emit: Emit,
    stop_requested: Callable[[], bool] = lambda: False,
    last: str = STAGE_NAMES[-1],
    decision: Decision | None = None,
    working: RunConfig | None = None,
) -> dict[str, Any]:
    """Do every stage that is not done yet.

    Args:
        config: all settings; equal to what `run_folder` was started with.
        run_folder: where results go.
        base: the base model.
        emit: sink for events; they are kept in the run folder too.
        stop_requested: asked after each optimizer step and each stage.
        last: the last stage to do.
        decision: how the base is loaded, settled; None to decide when it is needed.
        working: `config` with other settings of memory, to work with; None to work with `config`.

    Returns:
        The report, as written to `report.json`; nothing before the last stage of all is done.

    Raises:
        Interrupted: the user asked to stop; the run can be resumed.
        SafeSteerError: what went wrong and what to do; finished stages stay.
    """
    allocator.keep_freed_memory()
    with (
        run_folder.lock(),
        JsonLines(run_folder.events_path) as keep,
        Session(working or config, run_folder, base, tee(keep, emit), "", stop_requested, decision) as session,
    ):
        check_origin(config, run_folder, base)
        load_judge = None
        if last == STAGE_NAMES[-1] and judging.is_wanted(run_folder, config):
            # Found before anything is computed, for its files may be missing, or have to be fetched.
            load_judge = judging.find_judge(config.evaluate, config.model.device, session.emit)
        wanted = stage_fingerprints(config, base.fingerprint)
        _check_results(run_folder, wanted)
        if last == "export" and "export" not in run_folder.manifest.stages:
            session.settle()
            export.rehearse_stage(config, base, run_folder.path, session.day)
        # Sums round differently in other parts: the run goes on with the sizes that it has come to.
        session.fitted.update(sizes_of(run_folder))
        changed: set[str] = set()
        for number, stage in enumerate(STAGES[: STAGE_NAMES.index(last) + 1], 1):
            session.stage = stage.name
            before = run_folder.manifest.stages.get(stage.name)
            if not changed & set(stage.after) and run_folder.is_done(stage.name, wanted[stage.name]):
                session.emit(StageSkipped(stage.name, "done already, with the same settings"))
                if stage.name == "baseline":
                    # Whoever watches a resumed run wants to see where it began.
                    session.tell_rates(Scorecard.from_record(session.result("baseline")["scorecard"]))
                continue
            if stop_requested():
                raise Interrupted(f"Stopped before the stage {stage.title!r}; everything up to there is saved.")
            if before:
                damaged = ", ".join(run_folder.verify(stage.name)) or "what it was made from"
                session.warn(f"Damaged: {damaged}. The {stage.name} stage is done again.")
            _do(session, stage, number, wanted[stage.name])
            if before and run_folder.record(stage.name).artifacts != before.artifacts:
                changed.add(stage.name)
        if last != STAGE_NAMES[-1]:
            return {}
        if load_judge:
            session.drop_policy()
            judging.judge_finished(run_folder, config, load_judge, session.emit)
        return report.write(run_folder, config)


def _do(session: Session, stage: Stage, number: int, mark: str) -> None:
    session.emit(StageStarted(stage.name, stage.title))
    allocator.return_freed_memory()
    allocator.start_peak()
    started = time.monotonic()
    with session.run.publish(stage.name, number, mark) as publication:
        stage.work(session, publication)
        elsewhere = publication.result.get("peak_memory_bytes", 0)
        publication.result["peak_memory_bytes"] = max(allocator.peak(), elsewhere)
        if session.fitted:
            publication.result["fitted"] = sizes_to_record(session.fitted)
    session.emit(StageDone(stage.name, round(time.monotonic() - started, 1)))

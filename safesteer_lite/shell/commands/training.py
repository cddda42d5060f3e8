"""The commands that train: `run`, `demo`, `resume` and `continue`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from safesteer_lite import config
from safesteer_lite.errors import Interrupted, ModelError, SafeSteerError, UsageError
from safesteer_lite.shell.commands.shared import (
    DEMO_PRESET,
    base_of_run,
    effort,
    given_template,
    open_settings,
    resolve,
    run_settings,
    settings_from,
    settings_of,
    sink,
    whole_places,
)
from safesteer_lite.shell.interrupts import stop_on_interrupt
from safesteer_lite.shell.streams import complain, tell_json
from safesteer_lite.text import typed_path

if TYPE_CHECKING:
    from safesteer_lite.config import RunConfig
    from safesteer_lite.events import Emit, Note
    from safesteer_lite.hardware.backend import Decision
    from safesteer_lite.hardware.shape import ModelShape
    from safesteer_lite.runs.creation import Taken
    from safesteer_lite.runs.folder import RunFolder
    from safesteer_lite.sources.base import Base


MEMORY_SETTINGS = ("distill.micro_batch", "distill.chunk", "distill.checkpointing")
"""What a run takes of memory, and nothing that it measures by: these may change when it is resumed."""


def run_command(options: argparse.Namespace) -> int:
    """`run`: a preset, a model or a configuration file."""
    from safesteer_lite.runs import folder as run_folders

    earlier = run_folders.open_run(options.reuse, options.runs) if options.reuse else None
    return _start(options, run_settings(options), earlier)


def demo_command(options: argparse.Namespace) -> int:
    """`demo`: the small real model, downloaded once, or any local one."""
    extra = effort(options)
    if options.model:
        extra["model.name"] = str(Path(options.model).resolve())
    if options.quick:
        extra.update(config.QUICK)
    return _start(options, settings_from(options, DEMO_PRESET, None, extra))


def resume_command(options: argparse.Namespace) -> int:
    """`resume`: the named run, or the newest unfinished one."""
    from safesteer_lite.runs import folder as run_folders
    from safesteer_lite.runs.listing import list_runs

    if options.run:
        folder = run_folders.open_run(options.run, options.runs)
    else:
        runs = [entry for entry in list_runs(options.runs) if not entry.damage]
        # A kill behind the last stage leaves a run that lacks its report alone.
        unfinished = [entry for entry in runs if not (entry.finished and (entry.path / "report.html").is_file())]
        if not unfinished:
            raise UsageError(f"There is no unfinished run in {options.runs}.", "Name one, or start one with `run`.")
        folder = run_folders.open_run(max(unfinished, key=lambda entry: entry.created).path)
    settings = open_settings(folder)
    changes = config.parse_assignments(options.set)
    if wrong := sorted(changes.keys() - set(MEMORY_SETTINGS)):
        raise UsageError(
            f"{', '.join(wrong)} cannot change in the middle of a run.",
            f"Only what it takes of memory can: {', '.join(MEMORY_SETTINGS)}. For the rest, start a new run.",
        )
    emit = sink(options)
    emit(_of_recipe(settings))
    base = base_of_run(folder, settings, options.base, emit)
    working = config.build([(str(folder.config_path), settings_of(folder)), ("flag", changes)])
    return _work(options, settings, folder, base, _decision_again(folder, working, base.shape), emit, working)


def _decision_again(folder: RunFolder, working: RunConfig, shape: ModelShape) -> Decision:
    """How the model of a run that has begun is loaded: as it was, which runs of earlier versions do not tell.

    Raises:
        ModelError: this machine cannot hold it so.
    """
    from safesteer_lite.hardware.backend import decide, require_fit
    from safesteer_lite.hardware.kept import decide_again
    from safesteer_lite.hardware.peaks import Demand

    manifest, demand = folder.manifest, Demand.of(working)
    if set(manifest.planned) <= manifest.stages.keys():
        # Only the report is missing, which needs no model.
        return decide(working.model, shape, folder.path, demand)
    if manifest.loaded:
        return decide_again(manifest.loaded, working.model, shape, folder.path, demand)
    return require_fit(decide(working.model, shape, folder.path, demand))


def continue_command(options: argparse.Namespace) -> int:
    """`continue`: a new run, whose training begins from the adapter of a finished one."""
    from safesteer_lite.prompts.plan import PromptPlan
    from safesteer_lite.runs import folder as run_folders
    from safesteer_lite.stages.parent import check_changes, settings_of_child, taken_over
    from safesteer_lite.stages.pipeline import stage_fingerprints

    parent = run_folders.open_run(options.run, options.runs)
    before = open_settings(parent)
    changes = config.parse_assignments(options.set)
    if options.steps:
        changes["distill.steps"] = options.steps
    check_changes(changes, parent)
    origin = (str(parent.config_path), settings_of(parent))
    settings = whole_places(config.build([origin, ("command", settings_of_child(parent, before)), ("flag", changes)]))
    PromptPlan(settings.prompts).check()
    emit = sink(options)
    emit(_of_recipe(settings))
    # Where its prompts are others now, what was made with them is made again.
    base = base_of_run(parent, before, options.base, emit, prompts=False)
    if options.base:
        settings = replace(settings, model=replace(settings.model, name=str(options.base.absolute())))
    settings = _with_thoughts(settings, base)
    taken = taken_over(parent, before, settings, stage_fingerprints(settings, base.fingerprint))
    decision = _decision_like(parent, settings, base.shape, _CONTINUED)
    emit(_of_taken(parent, taken))
    return _begin(options, settings, base, emit, taken, date.fromisoformat(parent.manifest.run_date), decision)


_CONTINUED = (
    "Continue it on a machine like the one that it was trained on, or have all figures taken anew with the model loaded in "
    "another way, such as --set model.device=cpu."
)


def _decision_like(earlier: RunFolder, settings: RunConfig, shape: ModelShape, way_out: str) -> Decision | None:
    """How the model of a run that takes over results of another one is loaded: as that one's, unless the user asks for another
    way; None where that is still to be decided.

    Raises:
        ModelError: this machine cannot hold it so; `way_out` says what to do.
    """
    from safesteer_lite.hardware.kept import decide_again
    from safesteer_lite.hardware.peaks import Demand

    before, now = open_settings(earlier).model, settings.model
    if not earlier.manifest.loaded or any(getattr(before, name) != getattr(now, name) for name in _LOADING):
        return None
    return decide_again(earlier.manifest.loaded, now, shape, earlier.path, Demand.of(settings), way_out)


_LOADING = ("precision", "device", "unpack")
"""Settings of the section `model` that decide how it is loaded."""


def _of_recipe(settings: RunConfig) -> Note:
    from safesteer_lite.events import Note

    return Note("run", f"Recipe {settings.recipe}: {config.RECIPES_IN_WORDS[settings.recipe]}.")


# So much is read in a few seconds from any disk.
_LARGE_BYTES = 4_000_000_000


def _start(options: argparse.Namespace, settings: RunConfig, earlier: RunFolder | None = None) -> int:
    """Make a run folder and run; what can be refused at once is refused before anything is downloaded or made.

    Args:
        options: of the command.
        settings: of the run.
        earlier: a run whose results are taken over as far as they would come out the same.
    """
    from safesteer_lite.prompts.plan import PromptPlan

    if settings.parent.run or settings.parent.adapter:
        raise UsageError(
            f"These settings are of a run that continues {settings.parent.run}, whose adapter they do not hold.",
            "Use `safesteer-lite continue`, or take the section [parent] out.",
        )
    PromptPlan(settings.prompts).check()
    emit = sink(options)
    emit(_of_recipe(settings))
    _check_before_download(settings, needs_source=earlier is None)
    base = resolve(settings, emit)
    settings = _with_thoughts(settings, base)
    taken, day = _reused(earlier, settings, base, emit) if earlier else ({}, date.today())
    decision = None
    if earlier and taken:
        decision = _decision_like(earlier, settings, base.shape, "Leave --reuse out to have everything done anew.")
    return _begin(options, settings, base, emit, taken, day, decision)


def _reused(earlier: RunFolder, settings: RunConfig, base: Base, emit: Emit) -> tuple[dict[str, Taken], date]:
    """What a run begins with of an earlier one, and the day that chat templates are told: that of what was found already."""
    from safesteer_lite.events import Note
    from safesteer_lite.stages.parent import same_results
    from safesteer_lite.stages.pipeline import stage_fingerprints

    taken = same_results(earlier, stage_fingerprints(settings, base.fingerprint))
    if not taken:
        emit(Note("run", f"Nothing of {earlier.path.name} would come out the same, so everything is done anew."))
        return {}, date.today()
    emit(_of_taken(earlier, taken))
    return taken, date.fromisoformat(earlier.manifest.run_date)


def _of_taken(earlier: RunFolder, taken: Mapping[str, Taken]) -> Note:
    from safesteer_lite.events import Note

    return Note("run", f"Taken over from {earlier.path.name}: {', '.join(taken)}; what follows is done anew.")


def _with_thoughts(settings: RunConfig, base: Base) -> RunConfig:
    """The settings with what `model.thinking = auto` comes to: a thought takes memory and time."""
    from safesteer_lite.models.loading import check_template

    if check_template(base, thinking=settings.model.thinking).marks:
        return replace(settings, model=replace(settings.model, thinking="on"))
    return settings


def _begin(
    options: argparse.Namespace,
    settings: RunConfig,
    base: Base,
    emit: Emit,
    taken: Mapping[str, Taken],
    day: date,
    decision: Decision | None,
) -> int:
    """Make a run folder and run, on a base model that is here.

    Args:
        options: of the command.
        settings: of the run.
        base: its base model.
        emit: sink for events.
        taken: what it begins with of another run, by the names of stages.
        day: what chat templates are told.
        decision: how the model is loaded; None where that is still to be decided.
    """
    from safesteer_lite.events import Note
    from safesteer_lite.hardware.backend import decide, require_fit
    from safesteer_lite.hardware.kept import to_record
    from safesteer_lite.hardware.machine import package_versions
    from safesteer_lite.hardware.peaks import Demand
    from safesteer_lite.runs.creation import create_run
    from safesteer_lite.sources.base import check_values
    from safesteer_lite.sources.hub import commit_of
    from safesteer_lite.sources.origin import look_at_origin, open_origin
    from safesteer_lite.stages.export import rehearse_stage
    from safesteer_lite.stages.pipeline import STAGE_NAMES, origin

    decision = decision or require_fit(decide(settings.model, base.shape, Path.cwd(), Demand.of(settings)))
    source = "" if "direction" in taken else settings.direction.source
    if source:
        look_at_origin(source, base.folder.name, base.shape, base.template)
    if base.size > _LARGE_BYTES:
        emit(Note("model", "Reading all weights once, to see that every value is a number."))
    check_values(base)
    rehearse_stage(settings, base, options.runs, day)
    if source:
        # The last that can fail, for it may be a download.
        open_origin(source, base, emit)
    # Whatever the hub offers later, the run goes on with the commit that it began with.
    settings = replace(
        settings, model=replace(settings.model, revision=commit_of(base.folder) or settings.model.revision)
    )
    folder = create_run(
        options.runs,
        Path(settings.model.name).name.removesuffix(".gguf"),
        config.to_toml(settings),
        planned=STAGE_NAMES,
        versions=package_versions(),
        made_from=origin(settings, base),
        chat_template=base.template,
        loaded=to_record(decision),
        taken=taken,
        run_date=day.isoformat(),
    )
    return _work(options, settings, folder, base, decision, emit)


def _check_before_download(settings: RunConfig, needs_source: bool) -> None:
    """Refuse a model by its config.json alone, before its weights are fetched or made of a GGUF file.

    Args:
        settings: of the run.
        needs_source: whether the model that the direction is found on is surely needed.

    Raises:
        ModelError: it does not fit, or the model that the direction is found on does not go with it.
    """
    from safesteer_lite.hardware.backend import decide, require_fit
    from safesteer_lite.hardware.peaks import Demand
    from safesteer_lite.sources.gguf_file import find_gguf
    from safesteer_lite.sources.origin import look_at_origin
    from safesteer_lite.sources.preview import look

    place = typed_path(settings.model.name)
    if place.is_dir() and not find_gguf(place):
        return
    name, source, template = settings.model.name, settings.direction.source, given_template(settings)
    try:
        found = look(name, settings.model.revision or None, template=template)
    except ModelError:
        return  # Whoever fetches it tells what is wrong with it.
    require_fit(decide(settings.model, found.shape, Path.cwd(), Demand.of(settings)))
    if source and needs_source:
        look_at_origin(source, name, found.shape, template)


def _work(
    options: argparse.Namespace,
    settings: RunConfig,
    folder: RunFolder,
    base: Base,
    decision: Decision,
    emit: Emit,
    working: RunConfig | None = None,
) -> int:
    """Run to the end, and show the result."""
    from safesteer_lite.hardware.units import format_bytes, format_duration
    from safesteer_lite.shell.console import SafeConsole
    from safesteer_lite.shell.lines import scorecard_table
    from safesteer_lite.stages import pipeline

    try:
        painter = _painter(options, settings, folder, base.shape, decision, emit)
        with painter as (paint, say), stop_on_interrupt(say) as stop_requested:
            report = pipeline.run(settings, folder, base, paint, stop_requested, decision=decision, working=working)
    except SafeSteerError as error:
        if not error.hint:
            # Only what was interrupted goes on; what failed without advice would fail again.
            kept = f"What was done is kept in {folder.path}."
            error.hint = (
                f"Go on with `safesteer-lite resume {folder.path}`." if isinstance(error, Interrupted) else kept
            )
        raise
    if options.json:
        tell_json({"event": "Report", **report})
        return 0
    console = SafeConsole()
    console.print(scorecard_table(report["scorecard"], report["contexts"]))
    console.print(report["verdict"], soft_wrap=not console.is_terminal)
    seconds = sum(stage["seconds"] for stage in report["stages"].values())
    console.print(f"Time {format_duration(seconds)}, peak memory {format_bytes(report['peak_memory_bytes'])}.")
    console.print(f"The hardened model: {folder.path / '06-export' / 'merged'}", soft_wrap=True)
    console.print(f"Every answer that changed: {folder.path / '05-evaluate' / 'flips.jsonl'}", soft_wrap=True)
    console.print(
        "To read answers, chat, turn its strength or export it to GGUF: `safesteer-lite` on a terminal.", soft_wrap=True
    )
    return 0


@contextmanager
def _painter(
    options: argparse.Namespace,
    settings: RunConfig,
    folder: RunFolder,
    shape: ModelShape,
    decision: Decision,
    emit: Emit,
) -> Iterator[tuple[Emit, Callable[[str], None]]]:
    """The live screen where there is a terminal for it, else `emit`; with what answers the user meanwhile."""
    from safesteer_lite.hardware.pace import expected_seconds, probe
    from safesteer_lite.prompts.plan import PromptPlan
    from safesteer_lite.shell.console import SafeConsole
    from safesteer_lite.shell.screen import Screen, fits_terminal
    from safesteer_lite.stages import pipeline

    console = SafeConsole()
    if options.json or options.plain or not fits_terminal(console):
        yield emit, lambda message: complain(f"\n{message}")
        return
    with console.status("Measuring how fast this machine is"):
        training = len(PromptPlan(settings.prompts).training())
        seconds = expected_seconds(settings, shape, decision.device, probe(decision), training)
    stages = [(stage.name, stage.title) for stage in pipeline.STAGES]
    with Screen(console, folder.path.name, stages, seconds) as screen:
        yield screen, screen.say

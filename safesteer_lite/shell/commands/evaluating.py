"""The command `eval`: a run or a model on the test split or on public suites, and another judge over the answers."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from safesteer_lite import config
from safesteer_lite.errors import UsageError
from safesteer_lite.shell.commands.shared import base_of_run, open_settings, resolve, settings_of, sink
from safesteer_lite.shell.streams import tell, tell_json

if TYPE_CHECKING:
    from safesteer_lite.config import RunConfig
    from safesteer_lite.evaluation.suites import SuitePrompts
    from safesteer_lite.events import Emit
    from safesteer_lite.runs.folder import RunFolder
    from safesteer_lite.sources.base import Base


_LISTED = 10
"""Answers on which judges disagree that a terminal shows; the report has them all."""


def eval_command(options: argparse.Namespace) -> int:
    """`eval`: a run's adapter, or any model as it is."""
    from safesteer_lite.shell.commands.capability import asked_tasks, check_files, measure_tasks

    emit, folder = sink(options), _run_that_is_named(options)
    if options.capability:
        # Before the tasks' files are fetched.
        if options.suite or options.suite_file or options.judge:
            raise UsageError("--capability goes with no suite and no judge.", "Ask for one after the other.")
        check_files(options.gguf, folder, emit)
    if tasks := asked_tasks(options, emit):
        settings = _settings(folder, options)
        return measure_tasks(options, tasks, settings, folder, _base(folder, settings, options, emit), emit)
    if options.suite or options.suite_file:
        return _ask_suites(folder, options, emit)
    if options.suite_limit is not None:
        raise UsageError("--suite-limit is for --suite and --suite-file.", "Name a suite, or leave it out.")
    if folder and options.judge:
        return _judge_run(folder, options, emit)
    return _measure(folder, options, emit)


def _run_that_is_named(options: argparse.Namespace) -> RunFolder | None:
    """The run that the command line names; None for a model."""
    from safesteer_lite.runs import folder as run_folders

    places = (Path(options.target), options.runs / options.target)
    is_run = any((place / "manifest.json").is_file() for place in places)
    return run_folders.open_run(options.target, options.runs) if is_run else None


def _settings(folder: RunFolder | None, options: argparse.Namespace) -> RunConfig:
    """The settings to measure with: the run's own, or those of a preset or a model, with the environment and the flags."""
    layers: list[tuple[str, config.Values]] = []
    if folder:
        layers.append((str(folder.config_path), settings_of(folder)))
    elif options.base:
        raise UsageError("--base says where the base model of a run lies.", "Leave it out, or name a run.")
    elif options.target in config.preset_names():
        layers.append((f"preset {options.target}", config.preset_values(options.target)))
    else:
        layers.append(("command", {"model.name": options.target}))
    layers.append(("environment", config.from_environment(os.environ)))
    layers.append(("flag", config.parse_assignments(options.set) | _judge_settings(options)))
    return config.build(layers)


def _judge_settings(options: argparse.Namespace) -> config.Values:
    """The settings that `--judge` and what belongs to it mean."""
    named = {"evaluate.judge": options.judge, "evaluate.judge_model": options.judge_model}
    named["evaluate.judge_url"] = options.judge_url
    return {name: value for name, value in named.items() if value}


def _base(folder: RunFolder | None, settings: RunConfig, options: argparse.Namespace, emit: Emit) -> Base:
    """What is measured: the run's own base, whatever the flags say of the prompts, or the model that is named."""
    return (
        base_of_run(folder, open_settings(folder), options.base, emit, prompts=False)
        if folder
        else resolve(settings, emit)
    )


def _measure(folder: RunFolder | None, options: argparse.Namespace, emit: Emit) -> int:
    """The test split, answered anew."""
    from safesteer_lite.shell.console import SafeConsole
    from safesteer_lite.shell.lines import scorecard_table
    from safesteer_lite.shell.tables import judges_table
    from safesteer_lite.stages import finished

    settings = _settings(folder, options)
    cards = finished.evaluate_model(settings, folder, _base(folder, settings, options, emit), emit)
    if options.json:
        tell_json({"event": "Evaluation", **cards})
        return 0
    SafeConsole().print(scorecard_table(cards, cards["contexts"], alone=folder is None))
    if cards["judges"]:
        SafeConsole().print(judges_table(cards["judges"]))
    return 0


def _judge_run(folder: RunFolder, options: argparse.Namespace, emit: Emit) -> int:
    """Another judge over the answers that a run kept; nothing is answered anew, so the base model is not needed."""
    from safesteer_lite.evaluation.judged import saved_judged, summaries
    from safesteer_lite.shell.console import SafeConsole
    from safesteer_lite.shell.tables import disputed_line, judges_table
    from safesteer_lite.stages import judging

    if options.set or options.base:
        raise UsageError(
            "--judge reads the answers that the run kept, for which --set and --base mean nothing.",
            "Leave them out, or leave out --judge to have the prompts answered anew.",
        )
    own = settings_of(folder)
    settings = config.build([(str(folder.config_path), own), ("flag", _judge_settings(options))])
    judge = judging.find_judge(settings.evaluate, settings.model.device, emit)()
    with folder.lock():
        judged = judging.judge_run(folder, settings, judge, emit)
        _write_report(folder)
        said = summaries(saved_judged(folder))
    if options.json:
        tell_json({"event": "Judged", "judges": said, "disputed": [answer.to_record() for answer in judged.disputed]})
        return 0
    SafeConsole().print(judges_table(said))
    for answer in judged.disputed[:_LISTED]:
        tell(disputed_line(answer))
    rest = len(judged.disputed) - _LISTED
    tell(f"{f'These and {rest} more' if rest > 0 else 'Whole answers'} are in {folder.path / 'report.html'}.")
    return 0


def _ask_suites(folder: RunFolder | None, options: argparse.Namespace, emit: Emit) -> int:
    """Public suites, or files of one's own, asked of a run's two models or of one model."""
    from safesteer_lite.shell.console import SafeConsole
    from safesteer_lite.shell.tables import suites_table
    from safesteer_lite.stages import suites as stage

    settings = _settings(folder, options)
    asked = _suites(options, emit)
    own = open_settings(folder) if folder else None
    counted = [stage.without_known(suite, own) if own else (suite, 0) for suite in asked]
    base = _base(folder, settings, options, emit)
    with folder.lock() if folder else nullcontext():
        results = stage.ask_suites(settings, folder, base, counted, emit)
        if folder:
            _write_report(folder)
    said = [result.summary() for result in results]
    if options.json:
        tell_json({"event": "Suites", "suites": said})
    else:
        SafeConsole().print(suites_table(said))
    return 0


def _suites(options: argparse.Namespace, emit: Emit) -> list[SuitePrompts]:
    """The prompts that are asked for; every name is looked at before anything is fetched."""
    from safesteer_lite.evaluation.suites import load_own, load_suite, named
    from safesteer_lite.stages.suites import STAGE

    limit = options.suite_limit
    if limit is not None and limit < 0:
        raise UsageError("--suite-limit cannot be negative.", "0 asks all prompts.")
    wanted = named(options.suite or "")
    own = [load_own(given, limit, emit, STAGE) for given in options.suite_file]
    return [*(load_suite(suite, limit, emit, STAGE) for suite in wanted), *own]


def _write_report(folder: RunFolder) -> None:
    """The report of a finished run, with what has just been found."""
    from safesteer_lite.report import record as report

    if (folder.path / "report.json").is_file():
        report.write(folder, open_settings(folder))

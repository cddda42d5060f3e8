"""The command line: the commands, each a call of the pipeline; errors become messages and exit codes."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safesteer_lite import config
from safesteer_lite.arguments import build_parser
from safesteer_lite.errors import Interrupted, RunFolderError, SafeSteerError, UsageError

if TYPE_CHECKING:
    from safesteer_lite.config import RunConfig
    from safesteer_lite.events import Emit
    from safesteer_lite.rundir import RunFolder

DEMO_PRESET = "qwen2.5-coder-0.5b-demo"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "command"):
        parser.print_help()
        return 2
    try:
        return COMMANDS[options.command](options)
    except KeyboardInterrupt:
        return _complain("Stopped.", "Whatever was published or saved stays; `safesteer-lite resume` goes on.", 130)
    except Interrupted as error:
        return _complain(error.message, error.hint or "Go on with `safesteer-lite resume`.", 130)
    except UsageError as error:
        return _complain(error.message, error.hint, 2)
    except SafeSteerError as error:
        return _complain(error.message, error.hint, 1)
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except (MemoryError, OSError) as error:
        return _complain(
            f"The system said: {error or 'out of memory'}.", "Free memory or disk, then `safesteer-lite resume`.", 1
        )
    except RuntimeError as error:
        if "out of memory" not in str(error).lower() and "can't allocate memory" not in str(error).lower():
            raise
        return _complain(
            "Out of memory.", "Lower distill.micro_batch or distill.chunk, then `safesteer-lite resume`.", 1
        )


def _complain(message: str, hint: str, code: int) -> int:
    print(f"safesteer-lite: {message}" + (f"\n  {hint}" if hint else ""), file=sys.stderr)  # noqa: T201
    return code


def _sink(options: argparse.Namespace) -> Emit:
    from rich.console import Console

    from safesteer_lite.console import Json, Lines

    return Json(sys.stdout) if options.json else Lines(Console(highlight=False))


def _settings(options: argparse.Namespace, preset: str, file: Path | None, extra: config.Values) -> RunConfig:
    """All layers of settings, the weakest first."""
    layers: list[tuple[str, config.Values]] = []
    values: config.Values = {}
    if file:
        values, named = config.read_toml(file)
        preset = preset or named
    if preset:
        layers.append((f"preset {preset}", config.preset_values(preset)))
    if file:
        layers.append((str(file), values))
    layers.append(("command", extra))
    layers.append(("environment", config.from_environment(os.environ)))
    flags = config.parse_assignments(options.set)
    if options.seed is not None:
        flags["seed"] = options.seed
    if options.prompts:
        flags["prompts.training"] = str(options.prompts)
    if options.column:
        flags["prompts.column"] = options.column
    layers.append(("flag", flags))
    settings = config.build(layers)
    # Kept whole, so that a run can be resumed from another folder.
    own = settings.prompts
    own = replace(own, training=_whole_path(own.training), folder=_whole_path(own.folder))
    return replace(settings, prompts=own)


def _whole_path(place: str) -> str:
    return str(Path(place).resolve()) if place else ""


def run_command(options: argparse.Namespace) -> int:
    """`run`: a preset, a model or a configuration file."""
    if not options.model and not options.config:
        raise UsageError("There is no model to run.", "Name a preset, a Hub id or a folder, or give --config FILE.")
    preset, extra = "", config.Values()
    if options.model in config.preset_names():
        preset = options.model
    elif options.model:
        extra["model.name"] = options.model
    settings = _settings(options, preset, options.config, extra)
    if not settings.model.name:
        raise UsageError("The settings name no model.", "Set model.name, or name a preset, a Hub id or a folder.")
    return _start(options, settings)


def demo_command(options: argparse.Namespace) -> int:
    """`demo`: the small real model, downloaded once, or any local one."""
    extra = config.Values()
    if options.model:
        extra["model.name"] = str(Path(options.model).resolve())
    if options.quick:
        extra.update(config.QUICK)
    return _start(options, _settings(options, DEMO_PRESET, None, extra))


def _resolve(settings: RunConfig, emit: Emit) -> Path:
    from safesteer_lite.models.demo_download import DEMO, demo_model
    from safesteer_lite.models.source import resolve_model

    if settings.model.name == DEMO.name:
        return demo_model(emit)
    return resolve_model(settings.model.name, settings.model.revision or None, emit)


def _start(options: argparse.Namespace, settings: RunConfig) -> int:
    """Make a run folder and run; what can be refused at once is refused before anything is downloaded or made."""
    from safesteer_lite import rundir
    from safesteer_lite.hardware.machine import package_versions
    from safesteer_lite.pipeline import STAGE_NAMES
    from safesteer_lite.stages.session import check_prompts, decide

    check_prompts(settings)
    emit = _sink(options)
    model_folder = _resolve(settings, emit)
    decide(settings, model_folder, Path.cwd())
    folder = rundir.create(
        options.runs, Path(settings.model.name).name, planned=STAGE_NAMES, versions=package_versions()
    )
    try:
        folder.write_config(config.to_toml(settings))
    except SafeSteerError:
        # A run without settings could not be resumed: it would only be in the way.
        shutil.rmtree(folder.path, ignore_errors=True)
        raise
    return _work(options, settings, folder, model_folder, emit)


def _work(options: argparse.Namespace, settings: RunConfig, folder: RunFolder, model_folder: Path, emit: Emit) -> int:
    """Run to the end, and show the result."""
    from rich.console import Console

    from safesteer_lite import pipeline
    from safesteer_lite.console import dump, scorecard_table
    from safesteer_lite.hardware.units import format_bytes, format_duration

    try:
        with _stop_on_interrupt() as stop_requested:
            report = pipeline.run(settings, folder, model_folder, emit, stop_requested)
    except SafeSteerError as error:
        if not error.hint:
            error.hint = f"Go on with `safesteer-lite resume {folder.path}`."
        raise
    if options.json:
        sys.stdout.write(dump({"event": "Report", **report}).replace("\n", " ") + "\n")
        return 0
    console = Console(highlight=False)
    console.print(scorecard_table(report["scorecard"]["before"], report["scorecard"]["after"]))
    console.print(report["verdict"], soft_wrap=True)
    seconds = sum(stage["seconds"] for stage in report["stages"].values())
    console.print(f"Time {format_duration(seconds)}, peak memory {format_bytes(report['peak_memory_bytes'])}.")
    console.print(f"The hardened model: {folder.path / '06-export' / 'merged'}", soft_wrap=True)
    console.print(f"Every answer that changed: {folder.path / '05-evaluate' / 'flips.jsonl'}", soft_wrap=True)
    return 0


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C asks the run to stop after the step, and the second stops it at once."""
    asked: list[bool] = []

    def handler(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        print(  # noqa: T201
            "\nStopping after this step; press Ctrl-C again to stop now. Either way the run can be resumed.",
            file=sys.stderr,
        )

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def _settings_of(folder: RunFolder) -> config.Values:
    """The settings a run was started with, by dotted name.

    Raises:
        RunFolderError: the run has lost its config.toml.
    """
    if not folder.config_path.is_file():
        raise RunFolderError(
            f"The run {folder.path.name} has no config.toml, so its settings are not known.",
            "Put the file back, or start a new run.",
        )
    return config.read_toml(folder.config_path)[0]


def open_settings(folder: RunFolder) -> RunConfig:
    """The settings a run was started with."""
    return config.build([(str(folder.config_path), _settings_of(folder))])


def resume_command(options: argparse.Namespace) -> int:
    """`resume`: the named run, or the newest unfinished one."""
    from safesteer_lite import rundir

    if options.run:
        folder = rundir.open_run(options.run, options.runs)
    else:
        unfinished = [entry for entry in rundir.list_runs(options.runs) if not entry.finished and not entry.damage]
        if not unfinished:
            raise UsageError(f"There is no unfinished run in {options.runs}.", "Name one, or start one with `run`.")
        folder = rundir.open_run(max(unfinished, key=lambda entry: entry.created).path)
    settings = open_settings(folder)
    emit = _sink(options)
    return _work(options, settings, folder, _resolve(settings, emit), emit)


def runs_command(options: argparse.Namespace) -> int:
    """`runs`: one line a run."""
    from safesteer_lite import rundir
    from safesteer_lite.console import dump

    entries = rundir.list_runs(options.runs)
    if options.json:
        rows = [{**vars(entry), "path": str(entry.path)} for entry in entries]
        sys.stdout.write(dump(rows) + "\n")
        return 0
    if not entries:
        sys.stdout.write(f"There are no runs in {options.runs}.\n")
    for entry in entries:
        state = entry.damage or (
            "finished" if entry.finished else f"stopped after {entry.stages[-1] if entry.stages else 'nothing'}"
        )
        sys.stdout.write(f"{entry.name}  {entry.created[:16]}  {state}\n")
    return 0


def presets_command(options: argparse.Namespace) -> int:
    """`presets`: the names, or one preset's file."""
    if options.action == "show":
        if not options.name:
            raise UsageError("Which preset?", f"There are: {', '.join(config.preset_names())}.")
        config.preset_values(options.name)
        sys.stdout.write((config.preset_folder() / f"{options.name}.toml").read_text(encoding="utf-8"))
        return 0
    for name in config.preset_names():
        sys.stdout.write(f"{name}  {config.preset_values(name).get('model.name', '')}\n")
    return 0


def doctor_command(options: argparse.Namespace) -> int:
    """`doctor`: each check with its remedy."""
    from safesteer_lite.console import dump
    from safesteer_lite.hardware.doctor import checks
    from safesteer_lite.hardware.machine import inspect

    found = checks(inspect(Path.cwd()))
    if options.json:
        sys.stdout.write(dump([vars(check) for check in found]) + "\n")
    else:
        for check in found:
            mark = {True: "ok  ", False: "FAIL", None: "note"}[check.ok]
            sys.stdout.write(f"{mark}  {check.name}: {check.found}\n")
            if check.remedy and check.ok is not True:
                sys.stdout.write(f"      {check.remedy}\n")
    return 1 if any(check.ok is False for check in found) else 0


def eval_command(options: argparse.Namespace) -> int:
    """`eval`: a run's adapter, or any model as it is."""
    from rich.console import Console

    from safesteer_lite import pipeline, rundir
    from safesteer_lite.console import dump, scorecard_table

    emit = _sink(options)
    is_run = (Path(options.target) / "manifest.json").is_file() or (
        options.runs / options.target / "manifest.json"
    ).is_file()
    folder = rundir.open_run(options.target, options.runs) if is_run else None
    layers: list[tuple[str, config.Values]] = []
    if folder:
        layers.append((str(folder.config_path), _settings_of(folder)))
    elif options.target in config.preset_names():
        layers.append((f"preset {options.target}", config.preset_values(options.target)))
    else:
        layers.append(("command", {"model.name": options.target}))
    layers.append(("environment", config.from_environment(os.environ)))
    layers.append(("flag", config.parse_assignments(options.set)))
    settings = config.build(layers)
    cards = pipeline.evaluate_model(settings, folder, _resolve(settings, emit), emit)
    if options.json:
        sys.stdout.write(dump({"event": "Evaluation", **cards}).replace("\n", " ") + "\n")
    else:
        Console(highlight=False).print(scorecard_table(cards["before"], cards["after"]))
    return 0


def export_command(options: argparse.Namespace) -> int:
    """`export`: the adapter, or merged weights, to a folder of the user's choice."""
    from safesteer_lite import rundir
    from safesteer_lite.pipeline import export_run

    if not 0 <= options.strength <= 1.5:
        raise UsageError(f"--strength {options.strength:g} is outside 0 to 1.5.", "1 is the trained model, 0 the base.")
    folder = rundir.open_run(options.run, options.runs)
    out = options.out or folder.path / f"export-{options.to}-{options.weights}-{options.strength:g}"
    if out.exists():
        raise UsageError(f"{out} exists already.", "Name a folder that does not exist with --out.")
    settings, emit = open_settings(folder), _sink(options)
    model_folder = _resolve(settings, emit)
    export_run(settings, folder, model_folder, emit, options.to, out, options.weights, options.strength)
    if options.json:
        from safesteer_lite.console import dump

        sys.stdout.write(dump({"event": "Exported", "path": str(out)}).replace("\n", " ") + "\n")
    else:
        sys.stdout.write(f"{out}\n")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": run_command,
    "demo": demo_command,
    "resume": resume_command,
    "eval": eval_command,
    "export": export_command,
    "runs": runs_command,
    "presets": presets_command,
    "doctor": doctor_command,
}

if __name__ == "__main__":
    sys.exit(main())

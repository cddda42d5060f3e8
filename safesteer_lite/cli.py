"""The command line: the commands, each a call of the pipeline; errors become messages and exit codes."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safesteer_lite import config
from safesteer_lite.arguments import build_parser
from safesteer_lite.errors import Interrupted, ModelError, RunFolderError, SafeSteerError, UsageError

if TYPE_CHECKING:
    from safesteer_lite.config import RunConfig
    from safesteer_lite.events import Emit
    from safesteer_lite.rundir import RunFolder
    from safesteer_lite.stages.session import Session

DEMO_PRESET = "qwen2.5-coder-0.5b-demo"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "command"):
        if not _on_terminal():
            parser.print_help()
            return 2
        options.command = ""
    try:
        return COMMANDS[options.command](options) if options.command else wizard()
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


def _on_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


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


def _effort(options: argparse.Namespace) -> config.Values:
    from safesteer_lite.hardware.pace import effort_values

    return effort_values(options.effort) if options.effort else {}


def run_command(options: argparse.Namespace) -> int:
    """`run`: a preset, a model or a configuration file."""
    return _start(options, run_settings(options))


def run_settings(options: argparse.Namespace) -> RunConfig:
    """The settings that a `run` command line means.

    Raises:
        UsageError: it names no model, or its settings have problems.
    """
    if not options.model and not options.config:
        raise UsageError("There is no model to run.", "Name a preset, a Hub id or a folder, or give --config FILE.")
    preset, extra = "", _effort(options)
    if options.model in config.preset_names():
        preset = options.model
    elif options.model:
        extra["model.name"] = options.model
    settings = _settings(options, preset, options.config, extra)
    if not settings.model.name:
        raise UsageError("The settings name no model.", "Set model.name, or name a preset, a Hub id or a folder.")
    return settings


def demo_command(options: argparse.Namespace) -> int:
    """`demo`: the small real model, downloaded once, or any local one."""
    extra = _effort(options)
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
        painter = _painter(options, settings, folder, model_folder, emit)
        with painter as (paint, say), _stop_on_interrupt(say) as stop_requested:
            report = pipeline.run(settings, folder, model_folder, paint, stop_requested)
    except SafeSteerError as error:
        if not error.hint:
            error.hint = f"Go on with `safesteer-lite resume {folder.path}`."
        raise
    if options.json:
        sys.stdout.write(dump({"event": "Report", **report}).replace("\n", " ") + "\n")
        return 0
    console = Console(highlight=False)
    console.print(scorecard_table(report["scorecard"]["before"], report["scorecard"]["after"]))
    console.print(report["verdict"], soft_wrap=not console.is_terminal)
    seconds = sum(stage["seconds"] for stage in report["stages"].values())
    console.print(f"Time {format_duration(seconds)}, peak memory {format_bytes(report['peak_memory_bytes'])}.")
    console.print(f"The hardened model: {folder.path / '06-export' / 'merged'}", soft_wrap=True)
    console.print(f"Every answer that changed: {folder.path / '05-evaluate' / 'flips.jsonl'}", soft_wrap=True)
    return 0


@contextmanager
def _painter(
    options: argparse.Namespace, settings: RunConfig, folder: RunFolder, model_folder: Path, emit: Emit
) -> Iterator[tuple[Emit, Callable[[str], None]]]:
    """The live screen where there is a terminal for it, else `emit`; with what answers the user meanwhile."""
    from rich.console import Console

    from safesteer_lite import pipeline
    from safesteer_lite.hardware.pace import expected_seconds, probe
    from safesteer_lite.hardware.shape import shape_from_config
    from safesteer_lite.models.plain import read_config
    from safesteer_lite.screen import Screen, fits_terminal
    from safesteer_lite.stages.session import decide

    console = Console(highlight=False)
    if options.json or options.plain or not fits_terminal(console):
        yield emit, lambda message: print(f"\n{message}", file=sys.stderr)  # noqa: T201
        return
    with console.status("Measuring how fast this machine is"):
        decision = decide(settings, model_folder, folder.path)
        shape = shape_from_config(read_config(model_folder))
        seconds = expected_seconds(settings, shape, decision.device, probe(decision))
    stages = [(stage.name, stage.title) for stage in pipeline.STAGES]
    with Screen(console, folder.path.name, stages, seconds) as screen:
        yield screen, screen.say


@contextmanager
def _stop_on_interrupt(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C asks the run to stop after the step, and the second stops it at once.

    Closing the terminal asks it to stop too; from then on nobody reads what it says.
    """
    asked: list[bool] = []

    def interrupted(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        say("Stopping after this step; Ctrl-C again stops now. Either way the run can be resumed.")

    def hung_up(number: int, frame: object) -> None:
        asked.append(True)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)

    handlers: dict[int, Any] = {signal.SIGINT: interrupted}
    if hasattr(signal, "SIGHUP"):  # Windows has none: it ends the program with its window.
        handlers[signal.SIGHUP] = hung_up
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def report_command(options: argparse.Namespace) -> int:
    """`report`: a run's report.json and report.html, written again."""
    from safesteer_lite import report, rundir
    from safesteer_lite.console import dump
    from safesteer_lite.html_report.page import FILE

    folder = rundir.open_run(options.run, options.runs)
    with folder.lock():
        record = report.write(folder, open_settings(folder))
    told = dump({"event": "Report", **record}).replace("\n", " ") if options.json else str(folder.path / FILE)
    sys.stdout.write(told + "\n")
    return 0


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
    """`export`: the adapter, merged weights or GGUF files, to a folder of the user's choice."""
    from safesteer_lite import export_commands, rundir

    export_commands.check_flags(options)
    folder, emit = rundir.open_run(options.run, options.runs), _sink(options)
    return export_commands.export(options, folder, open_settings, lambda settings: _resolve(settings, emit), emit)


def verify_command(options: argparse.Namespace) -> int:
    """`verify`: whether an exported folder is as it was written."""
    from safesteer_lite import export_commands

    return export_commands.verify_command(options)


def strength_command(options: argparse.Namespace) -> int:
    """`strength`: the adapter of a run at several strengths."""
    from rich.console import Console

    from safesteer_lite import report, rundir
    from safesteer_lite.console import dump
    from safesteer_lite.stages import strength
    from safesteer_lite.wizard.tables import dial_table

    try:
        wanted = [float(part) for part in options.at.split(",")] if options.at else list(strength.STRENGTHS)
    except ValueError:
        raise UsageError(f"--at {options.at} is not a list of numbers.", "For example: --at 0.5,1,1.5") from None
    for value in wanted:
        strength.check_strength(value)
    folder = rundir.open_run(options.run, options.runs)
    session = _session(folder, _sink(options), "strength")
    with folder.lock():
        points = strength.to_records(strength.dial(session, wanted))
        if (folder.path / "report.json").is_file():
            report.write(folder, session.config)  # The report shows the dial.
    if options.json:
        sys.stdout.write(dump({"event": "Strengths", "points": points}).replace("\n", " ") + "\n")
    else:
        Console(highlight=False).print(dial_table(points))
    return 0


def chat_command(options: argparse.Namespace) -> int:
    """`chat`: base and hardened model of a run."""
    from rich.console import Console

    from safesteer_lite import rundir
    from safesteer_lite.chat import Chat
    from safesteer_lite.console import Lines
    from safesteer_lite.events import Event, Progress, Warned
    from safesteer_lite.stages.strength import check_strength

    check_strength(options.strength)
    if options.tokens < 1 or not options.temperature >= 0:
        raise UsageError("--tokens must be at least 1, --temperature at least 0.", "Leave them out for the defaults.")
    folder, console = rundir.open_run(options.run, options.runs), Console(highlight=False)
    adapter = folder.stage_folder("distill") / "adapter"
    with suppress(ImportError):
        import readline  # noqa: F401  (makes the arrow keys work in `input`)
    read = (lambda: input("> ")) if _on_terminal() else input
    lines = Lines(console)

    def only_what_takes_time(event: Event) -> None:
        if isinstance(event, Progress | Warned):
            lines(event)

    session = _session(folder, only_what_takes_time, "chat")
    with console.status("Loading the model"):
        policy = session.policy
    system, tokens, temperature = options.system, options.tokens, options.temperature
    chat = Chat(policy, adapter, console, read, options.view, options.strength, system, tokens, temperature)
    chat.talk()
    return 0


def _session(folder: RunFolder, emit: Emit, stage: str) -> Session:
    """A trained run's model, ready to be loaded.

    Raises:
        RunFolderError: the run has no adapter yet.
        ModelError: the base model is not the one that the run was made with; a chat is only warned.
    """
    from safesteer_lite.events import Warned
    from safesteer_lite.hardware.allocator import keep_freed_memory
    from safesteer_lite.models.source import model_fingerprint
    from safesteer_lite.pipeline import stage_fingerprints
    from safesteer_lite.stages.session import Session

    folder.stage_folder("distill")
    settings = open_settings(folder)
    model_folder = _resolve(settings, emit)
    wanted = stage_fingerprints(settings, model_fingerprint(model_folder))["baseline"]
    if folder.manifest.stages["baseline"].fingerprint != wanted:
        doubt = f"{model_folder} is not the base model that this run was made with, or its prompts have changed."
        # Whoever chats sees what he gets; figures of another model would be kept, and believed.
        if stage != "chat":
            raise ModelError(doubt, "Give the run its own base model back.")
        emit(Warned(stage, doubt))
    keep_freed_memory()
    return Session(settings, folder, model_folder, emit, stage=stage)


def wizard() -> int:
    """No command at all: questions, the run, its results."""
    from rich.console import Console

    from safesteer_lite import rundir
    from safesteer_lite.wizard.flow import start
    from safesteer_lite.wizard.program import Program

    parser = build_parser()
    exports = {
        ("--to", "merged"): "16-bit safetensors: for transformers, or to convert further",
        ("--to", "gguf", "--quant", "Q8_0"): "GGUF, 8 bits a weight: for llama.cpp, Ollama, LM Studio",
        ("--to", "gguf", "--quant", "Q4_K_M"): "GGUF, about 4.8 bits a weight: smaller, a little less exact",
        ("--to", "adapter"): "the LoRA adapter alone",
    }
    return start(
        Program(
            execute=main,
            run_settings=lambda line: run_settings(parser.parse_args(line)),
            open_settings=lambda path: open_settings(rundir.open_run(path)),
            exports=exports,
            runs=rundir.RUNS_FOLDER,
            console=Console(highlight=False),
        )
    )


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": run_command,
    "demo": demo_command,
    "resume": resume_command,
    "eval": eval_command,
    "export": export_command,
    "verify": verify_command,
    "strength": strength_command,
    "chat": chat_command,
    "report": report_command,
    "runs": runs_command,
    "presets": presets_command,
    "doctor": doctor_command,
}

if __name__ == "__main__":
    sys.exit(main())

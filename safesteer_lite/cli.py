"""The command line: reads flags, calls the pipeline, turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safesteer_lite import __version__, config
from safesteer_lite.errors import Interrupted, SafeSteerError, UsageError

if TYPE_CHECKING:
    from safesteer_lite.config import RunConfig
    from safesteer_lite.events import Emit
    from safesteer_lite.rundir import RunFolder

EPILOG = """examples:
  safesteer-lite demo                     the whole method on a small real model, on any machine
  safesteer-lite run qwen3-4b             a preset
  safesteer-lite run ./my-model --set distill.steps=10
  safesteer-lite run --config run.toml --yes
  safesteer-lite resume                   go on with the newest unfinished run
  safesteer-lite export RUN --to merged --weights dequantised --out ./safer-model

exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (the run can be resumed)"""

DEMO_PRESET = "qwen2.5-coder-0.5b-demo"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "command"):
        parser.print_help()
        return 2
    try:
        code: int = options.command(options)
        return code
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


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="safesteer-lite",
        description="Make a local instruct model safer on one consumer GPU, and see honestly what changed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"safesteer-lite {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    run = _command(commands, "run", run_command, "harden a model", "safesteer-lite run qwen3-4b --set distill.steps=10")
    run.add_argument("model", nargs="?", help="a preset, a Hub id, or a local folder")
    run.add_argument("--config", type=Path, metavar="FILE", help="settings as TOML, such as a run's config.toml")
    _run_options(run)

    demo = _command(
        commands, "demo", demo_command, "the whole method on a small real model", "safesteer-lite demo --quick"
    )
    demo.add_argument("--model", metavar="FOLDER", help="any local model instead of the demo's own")
    demo.add_argument("--quick", action="store_true", help="fewer prompts, steps and tokens: to see that it works")
    _run_options(demo)

    resume = _command(commands, "resume", resume_command, "go on with an unfinished run", "safesteer-lite resume")
    resume.add_argument("run", nargs="?", help="a run's name or folder; the newest unfinished one if left out")
    _output_options(resume)

    evaluate = _command(commands, "eval", eval_command, "measure a run or a model", "safesteer-lite eval ./my-model")
    evaluate.add_argument("target", help="a run, a preset, a Hub id, or a local folder")
    evaluate.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting")
    _output_options(evaluate)

    export = _command(
        commands, "export", export_command, "write a run's model", "safesteer-lite export RUN --out ./safer"
    )
    export.add_argument("run", help="a run's name or folder")
    export.add_argument("--to", choices=("merged", "adapter"), default="merged", help="what to write (merged)")
    export.add_argument("--out", type=Path, metavar="FOLDER", help="a folder that does not exist yet")
    export.add_argument("--weights", choices=("original", "dequantised"), default="original", help="base to merge into")
    export.add_argument("--strength", type=float, default=1.0, help="factor on the adapter, 0 to 1.5 (1)")
    _output_options(export)

    runs = _command(commands, "runs", runs_command, "list runs", "safesteer-lite runs")
    _output_options(runs)

    presets = _command(
        commands, "presets", presets_command, "list presets, or show one", "safesteer-lite presets show qwen3-4b"
    )
    presets.add_argument("action", nargs="?", choices=("list", "show"), default="list")
    presets.add_argument("name", nargs="?")

    doctor = _command(commands, "doctor", doctor_command, "check this machine", "safesteer-lite doctor")
    doctor.add_argument("--json", action="store_true", help="for machines")
    return parser


def _command(
    commands: Any, name: str, function: Callable[..., int], text: str, example: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=f"example: {example}"
    )
    parser.set_defaults(command=function)
    return parser


def _output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="events and result as JSON Lines, for machines")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="folder of all runs (runs)")


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting")
    parser.add_argument("--seed", type=int, help="seed of every random choice")
    parser.add_argument("--prompts", metavar="FILE", help="your own harmful prompts: jsonl, json, csv or txt")
    parser.add_argument("--column", metavar="NAME", help="column of that file")
    parser.add_argument("--yes", action="store_true", help="ask nothing")
    _output_options(parser)


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
        flags["prompts.training"] = str(Path(options.prompts).resolve())
    if options.column:
        flags["prompts.column"] = options.column
    layers.append(("flag", flags))
    return config.build(layers)


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
    emit = _sink(options)
    return _start(options, settings, _resolve(settings, emit), emit)


def demo_command(options: argparse.Namespace) -> int:
    """`demo`: the small real model, downloaded once, or any local one."""
    extra = config.Values()
    if options.model:
        extra["model.name"] = str(Path(options.model).resolve())
    if options.quick:
        extra.update(config.QUICK)
    settings = _settings(options, DEMO_PRESET, None, extra)
    emit = _sink(options)
    if options.model:
        return _start(options, settings, _resolve(settings, emit), emit)
    from safesteer_lite.models.demo_download import demo_model

    return _start(options, settings, demo_model(emit), emit)


def _resolve(settings: RunConfig, emit: Emit) -> Path:
    from safesteer_lite.models.demo_download import DEMO, demo_model
    from safesteer_lite.models.source import resolve_model

    if settings.model.name == DEMO.name:
        return demo_model(emit)
    return resolve_model(settings.model.name, settings.model.revision or None, emit)


def _start(options: argparse.Namespace, settings: RunConfig, model_folder: Path, emit: Emit) -> int:
    """Make a run folder and run."""
    from safesteer_lite import hardware, rundir
    from safesteer_lite.pipeline import STAGE_NAMES

    if settings.prompts.training:
        from safesteer_lite.stages.session import own_prompts

        own_prompts(Path(settings.prompts.training), settings.prompts.column, lambda message: None)
    folder = rundir.create(
        options.runs, Path(settings.model.name).name, planned=STAGE_NAMES, versions=hardware.package_versions()
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
    from safesteer_lite.hardware import format_bytes, format_duration

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


def open_settings(folder: RunFolder) -> RunConfig:
    """The settings a run was started with."""
    return config.build([(str(folder.config_path), config.read_toml(folder.config_path)[0])])


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
    from safesteer_lite import hardware
    from safesteer_lite.console import dump

    found = hardware.checks(hardware.inspect(Path.cwd()))
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
        layers.append((str(folder.config_path), config.read_toml(folder.config_path)[0]))
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


if __name__ == "__main__":
    sys.exit(main())

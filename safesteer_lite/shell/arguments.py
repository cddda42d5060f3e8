"""The arguments of every command: names, defaults and help."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn, TypeAlias

from safesteer_lite import __version__
from safesteer_lite.config import RECIPES
from safesteer_lite.shell.completion import SHELLS
from safesteer_lite.text import is_unicode, visible

EPILOG = """on a terminal, `safesteer-lite` alone asks a few questions and does the rest

examples:
  safesteer-lite demo                     the whole method on a small real model, on any machine
  safesteer-lite run qwen3-4b             a preset
  safesteer-lite run ./my-model --set distill.steps=10
  safesteer-lite run --config run.toml --yes
  safesteer-lite resume                   go on with the newest unfinished run
  safesteer-lite continue RUN --steps 8   train a finished run further, as a new run
  safesteer-lite export RUN --to merged --weights dequantised --out ./safer-model
  safesteer-lite export RUN --to gguf --quant Q8_0 Q4_K_M --out ./safer-gguf

exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (the run can be resumed)"""


class Parser(argparse.ArgumentParser):
    """A parser that makes visible what it quotes of a command line that it cannot read."""

    def error(self, message: str) -> NoReturn:
        super().error(visible(message, lines=True))


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `command` of what it reads is the command's name, and missing where none was given."""
    parser = Parser(
        prog="safesteer-lite",
        description="Make a local instruct model safer on one consumer GPU, and see honestly what changed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"safesteer-lite {__version__}")
    parser.add_argument(
        "--print-completion",
        choices=SHELLS,
        metavar="SHELL",
        help="print what teaches bash, zsh or fish to complete commands with Tab",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _training(commands)
    _measuring(commands)
    _exporting(commands)
    _looking(commands)
    _listing(commands)
    return parser


def _training(commands: Commands) -> None:
    run = _command(commands, "run", "harden a model", "safesteer-lite run qwen3-4b --set distill.steps=10")
    run.add_argument("model", nargs="?", type=_filled, help="a preset, a Hub id, a local folder, or a GGUF file")
    run.add_argument("--config", type=_path, metavar="FILE", help="settings as TOML, such as a run's config.toml")
    run.add_argument(
        "--reuse",
        type=_filled,
        metavar="RUN",
        help="take over what another run has found already, as far as it would come out the same",
    )
    _run_options(run)

    demo = _command(commands, "demo", "the whole method on a small real model", "safesteer-lite demo --quick")
    demo.add_argument(
        "--model", type=_filled, metavar="PLACE", help="any local model, a folder or a GGUF file, not the demo's own"
    )
    demo.add_argument("--quick", action="store_true", help="fewer prompts, steps and tokens: to see that it works")
    _run_options(demo)

    resume = _command(commands, "resume", "go on with an unfinished run", "safesteer-lite resume")
    resume.add_argument(
        "run", nargs="?", type=_filled, help="a run's name or folder; the newest unfinished one if left out"
    )
    resume.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting of memory: distill.micro_batch, distill.chunk or distill.checkpointing",
    )
    _base_option(resume)
    _plain_option(resume)
    _output_options(resume)

    further = _command(
        commands,
        "continue",
        "go on training from a finished run, as a new run",
        "safesteer-lite continue RUN --steps 8",
    )
    further.add_argument("run", type=_filled, help="a finished run's name or folder, which stays as it is")
    further.add_argument(
        "--steps", type=_filled, metavar="N", help="optimizer steps from there (as many as that run did)"
    )
    further.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one of its settings")
    _base_option(further)
    _plain_option(further)
    _output_options(further)


def _measuring(commands: Commands) -> None:
    evaluate = _command(commands, "eval", "measure a run or a model", "safesteer-lite eval ./my-model")
    evaluate.add_argument("target", type=_filled, help="a run, a preset, a Hub id, a local folder, or a GGUF file")
    _base_option(evaluate)
    evaluate.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting")
    evaluate.add_argument(
        "--capability",
        type=_filled,
        metavar="TASK,TASK",
        help="solve tasks instead: humaneval, gsm8k, mmlu; before and after, problem by problem; their files are fetched",
    )
    evaluate.add_argument(
        "--tasks-from",
        type=_path,
        metavar="FOLDER",
        help="with --capability: where HumanEval.jsonl.gz, gsm8k_test.jsonl and mmlu.tar are, so that none is fetched",
    )
    evaluate.add_argument("--limit", type=int, metavar="N", help="with --capability: the first N problems of each task")
    evaluate.add_argument(
        "--gguf",
        action="append",
        default=[],
        type=_path,
        metavar="FILE",
        help="with --capability of a run: a GGUF file exported from it, beside base and hardened model; may be repeated",
    )
    evaluate.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="with --capability humaneval: run the programs that the model writes, on this machine and as you, in an "
        "empty folder with limits on time, memory, files, other programs and the network, but in no sandbox",
    )
    evaluate.add_argument(
        "--suite", type=_filled, metavar="NAME,...", help="public suites instead of the test split; they are fetched"
    )
    evaluate.add_argument(
        "--suite-file",
        action="append",
        default=[],
        type=_filled,
        metavar="NAME=FILE",
        help="a suite's file that you have, or NAME:KIND=FILE for prompts of your own",
    )
    evaluate.add_argument("--suite-limit", type=int, metavar="N", help="prompts of each suite, 0 for all (alpaca: 200)")
    _judge_options(evaluate)
    _output_options(evaluate)


def _exporting(commands: Commands) -> None:
    export = _command(commands, "export", "write a run's model", "safesteer-lite export RUN --out ./safer")
    export.add_argument("run", type=_filled, help="a run's name or folder")
    export.add_argument(
        "--to", choices=("merged", "adapter", "gguf", "lora-gguf"), default="merged", help="what to write (merged)"
    )
    kinds = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
    export.add_argument(
        "--quant",
        action="extend",
        nargs="+",
        choices=kinds,
        metavar="KIND",
        help=f"GGUF files: {', '.join(kinds)} (Q8_0)",
    )
    export.add_argument("--out", type=_path, metavar="FOLDER", help="a folder that does not exist yet")
    export.add_argument(
        "--weights",
        choices=("original", "dequantised"),
        help="base to merge into (original; for a base that is itself in 4 bits, dequantised)",
    )
    export.add_argument(
        "--original",
        type=_filled,
        metavar="MODEL",
        help="of such a base: its 16-bit original, a folder or a Hub id to fetch",
    )
    export.add_argument("--strength", type=float, default=1.0, help="factor on the adapter, 0 to 2 (1)")
    _base_option(export)
    export.add_argument("--measure", type=int, default=0, metavar="N", help="measure on N test prompts a set (all)")
    export.add_argument("--push", type=_filled, metavar="NAME", help="upload to the model hub as NAME, private")
    export.add_argument("--public", action="store_true", help="with --push: for everybody to see")
    _output_options(export)

    verify = _command(commands, "verify", "check an exported folder", "safesteer-lite verify ./safer")
    verify.add_argument("folder", type=_path, help="a folder that `export` wrote")
    verify.add_argument("--json", action="store_true", help="for machines")


def _looking(commands: Commands) -> None:
    strength = _command(
        commands, "strength", "measure a run's adapter at several strengths", "safesteer-lite strength RUN"
    )
    strength.add_argument("run", type=_filled, help="a run's name or folder")
    _base_option(strength)
    strength.add_argument(
        "--at", type=_filled, metavar="X,Y,...", help="factors on the adapter, 0 to 2 (0 to 1.5 in quarters)"
    )
    _output_options(strength)

    chat = _command(commands, "chat", "talk to a run's model", "safesteer-lite chat RUN --view compare")
    chat.add_argument("run", type=_filled, help="a run's name or folder")
    _base_option(chat)
    chat.add_argument(
        "--view", choices=("compare", "hardened", "base"), default="compare", help="who answers (compare)"
    )
    chat.add_argument("--compare", dest="view", action="store_const", const="compare", help="base and hardened")
    chat.add_argument("--strength", type=float, default=1.0, help="factor on the adapter, 0 to 2 (1)")
    chat.add_argument("--system", default="", metavar="TEXT", help="a system prompt")
    chat.add_argument("--tokens", type=int, default=400, help="tokens an answer, at most (400)")
    chat.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    chat.add_argument("--runs", type=_path, default=Path("runs"), metavar="FOLDER", help="folder of all runs (runs)")

    report = _command(commands, "report", "write a run's report again", "safesteer-lite report RUN")
    report.add_argument("run", type=_filled, help="a run's name or folder")
    report.add_argument("--picture", type=_path, metavar="FILE.svg", help="before and after as one picture too")
    _output_options(report)


def _listing(commands: Commands) -> None:
    runs = _command(commands, "runs", "list runs", "safesteer-lite runs")
    _output_options(runs)

    presets = _command(commands, "presets", "list presets, or show one", "safesteer-lite presets show qwen3-4b")
    presets.add_argument("action", nargs="?", choices=("list", "show"), default="list")
    presets.add_argument("name", nargs="?")
    presets.add_argument("--all", action="store_true", help="show expert settings too")
    presets.add_argument("--recipe", choices=RECIPES, default=RECIPES[0], help="under which recipe (lite)")

    doctor = _command(commands, "doctor", "check this machine", "safesteer-lite doctor")
    doctor.add_argument("--json", action="store_true", help="for machines")


def _filled(text: str) -> str:
    """A name: nothing, as from a variable of the shell that is not set, would mean something else."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    if "\0" in text:
        raise argparse.ArgumentTypeError("must not hold the character NUL")
    if not is_unicode(text):
        raise argparse.ArgumentTypeError(f"{text} is not text in UTF-8, which some of the libraries need")
    return text


def _path(text: str) -> Path:
    return Path(_filled(text))


def _command(commands: Commands, name: str, text: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=f"example: {example}"
    )
    parser.set_defaults(command=name)
    return parser


def _output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="events and result as JSON Lines, for machines")
    parser.add_argument("--runs", type=_path, default=Path("runs"), metavar="FOLDER", help="folder of all runs (runs)")


def _base_option(parser: argparse.ArgumentParser) -> None:
    told = "where the run's base model, a folder or a GGUF file, lies now, if it moved"
    parser.add_argument("--base", type=_path, metavar="PLACE", help=told)


def _judge_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--judge",
        choices=("classifier", "guard", "endpoint"),
        help="a second judge; of a run, it reads the answers that the run kept",
    )
    parser.add_argument(
        "--judge-model", type=_filled, metavar="MODEL", help="its model: a Hub id, a folder, or the endpoint's own name"
    )
    parser.add_argument("--judge-url", type=_filled, metavar="URL", help="an OpenAI-compatible endpoint's address")


def _plain_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plain", action="store_true", help="plain lines instead of the live screen")


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting")
    parser.add_argument("--seed", type=int, help="seed of every random choice")
    parser.add_argument(
        "--prompts", type=_filled, metavar="FILE", help="your own harmful prompts: jsonl, json, csv or txt"
    )
    parser.add_argument("--column", type=_filled, metavar="NAME", help="column of that file")
    parser.add_argument(
        "--chat-template", type=_filled, metavar="FILE", help="a chat template, in Jinja, in place of the model's own"
    )
    parser.add_argument(
        "--direction-from",
        type=_filled,
        metavar="MODEL",
        help="of a model that hardly refuses: what it was made from, where the refusal direction is found",
    )
    parser.add_argument(
        "--recipe", choices=RECIPES, help="how it is distilled: lite, minutes; paper, as published, hours (lite)"
    )
    parser.add_argument("--effort", choices=("quick", "standard", "thorough"), help="how thorough (standard)")
    parser.add_argument("--yes", action="store_true", help="ask nothing")
    _plain_option(parser)
    _output_options(parser)

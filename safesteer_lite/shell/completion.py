"""Tab completion: the script that teaches it to a shell, made by shtab from the parser of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from safesteer_lite import config

SHELLS = ("bash", "zsh", "fish")

# Names as the shell itself lists them when Tab is pressed, since starting Python would take a noticeable while.
_RUNS = "ls runs 2>/dev/null"
_WORDS = r"printf '%s\n' "


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """What a shell has to read so that Tab completes commands, options and names.

    Args:
        parser: of the whole command line.
        shell: one of `SHELLS`.
    """
    import shtab

    presets = _WORDS + " ".join(config.preset_names())
    settings = _WORDS + " ".join(f"{name}=" for name in sorted(config.known_settings()))
    models, runs = _with_folders("models", presets), _with_folders("runs", _RUNS)
    completed = {
        "FILE": shtab.FILE,
        "FILE.svg": shtab.FILE,
        "FOLDER": shtab.DIRECTORY,
        "model": models,
        "MODEL": models,
        "run": runs,
        "target": runs,
        "folder": shtab.DIRECTORY,
        "name": shtab.cmd(presets),
        "NAME=VALUE": shtab.cmd(settings),
    }
    for action in _actions(parser):
        if found := completed.get(str(action.metavar or action.dest)):
            vars(action)["complete"] = found
    text: str = shtab.complete(parser, shell=shell)
    return text


def _with_folders(name: str, command: str) -> dict[str, object]:
    """For shtab: the words that a command prints, and folders."""
    function = f"_safesteer_lite_{name}"
    return {
        "bash": function,
        # Not evaluated when the script is read, but when Tab is pressed.
        "zsh": f"{{_files -/; compadd -- \\$({command})}}",
        "fish": f"({command}; __fish_complete_directories)",
        "preamble": {"bash": f'{function}() {{\n  compgen -W "$({command})" -- "$1"\n  compgen -d -- "$1"\n}}\n'},
    }


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of the parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action

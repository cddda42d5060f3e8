"""Tab completion: the script that teaches it to a shell, made by shtab from the parser of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from safesteer_lite import config

SHELLS = ("bash", "zsh", "fish")

# Names as the shell itself lists them when Tab is pressed, since starting Python would take a noticeable while.
_RUNS = "ls runs 2>/dev/null"
_GGUF = ".gguf"
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
    model, run = _places("bases", presets, _GGUF), _places("runs", _RUNS)
    completed = {
        "FILE": shtab.FILE,
        "FILE.svg": shtab.FILE,
        "FOLDER": shtab.DIRECTORY,
        "PLACE": _places("places", suffix=_GGUF),
        "MODEL": _places("models", presets),
        "--direction-from": model,
        "model": model,
        "run": run,
        "RUN": run,
        "target": _places("targets", _RUNS, _GGUF),
        "folder": shtab.DIRECTORY,
        "name": shtab.cmd(presets),
        "NAME=VALUE": shtab.cmd(settings),
    }
    for action in _actions(parser):
        names = (*action.option_strings, str(action.metavar or action.dest))
        if found := next((completed[name] for name in names if name in completed), None):
            vars(action)["complete"] = found
    text: str = shtab.complete(parser, shell=shell)
    return text


def _places(name: str, command: str = "", suffix: str = "") -> dict[str, object]:
    """For shtab: folders, and with them the words that a command prints and the files that end with `suffix`."""
    function = f"_safesteer_lite_{name}"
    bash, zsh, fish = ['compgen -d -- "$1"'], ["_files -/"], ["__fish_complete_directories"]
    if suffix:
        bash.append(f"compgen -f -X '!*{suffix}' -- \"$1\"")
        zsh.append(f"_files -g '*{suffix}'")
        # A dollar sign would be taken for a variable.
        fish.append(f"__fish_complete_path (commandline -ct) | string match -r '.*\\{suffix}(?![^\\t]).*'")
    if command:
        bash.insert(0, f'compgen -W "$({command})" -- "$1"')
        # Not evaluated when the script is read, but when Tab is pressed.
        zsh.append(f"compadd -- \\$({command})")
        fish.insert(0, command)
    body = "\n  ".join(bash)
    return {
        "bash": function,
        "zsh": f"{{{'; '.join(zsh)}}}",
        "fish": f"({'; '.join(fish)})",
        "preamble": {"bash": f"{function}() {{\n  {body}\n}}\n"},
    }


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of the parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action

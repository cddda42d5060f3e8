"""What the wizard drives: the commands themselves, as the shell hands them over, and a console to speak to."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from safesteer_lite.config import RunConfig
from safesteer_lite.errors import SafeSteerError
from safesteer_lite.shell.console import as_text


@dataclass(frozen=True)
class Program:
    """The program as the wizard sees it.

    Attributes:
        execute: runs a command line, complains by itself where it fails, and returns the exit code.
        run_settings: the settings that a `run` command line means, from all layers.
        open_settings: the settings that a run was started with.
        exports: what can be exported: the arguments of `export` after the run, with what they make.
        runs: the folder of all runs.
        console: where to speak.
    """

    execute: Callable[[Sequence[str]], int]
    run_settings: Callable[[Sequence[str]], RunConfig]
    open_settings: Callable[[Path], RunConfig]
    exports: Mapping[tuple[str, ...], str]
    runs: Path
    console: Console

    def say(self, text: str, style: str = "") -> None:
        """Sentences, wrapped between words."""
        self.console.print(as_text(text, style))

    def say_whole(self, text: str) -> None:
        """A path or a command on one line, so that it can be copied."""
        self.console.print(as_text(text), soft_wrap=True)

    def explain(self, error: Exception) -> None:
        """An error as a sentence and what to do next."""
        message, hint = (error.message, error.hint) if isinstance(error, SafeSteerError) else (str(error), "")
        self.say(f"{message} {hint}".strip(), "yellow")


def as_command(arguments: Sequence[str]) -> str:
    """A command line that can be typed."""
    return shlex.join(["safesteer-lite", *arguments])

"""The program in a child process that may be killed, starved of disk, or left without an answer; and what is asked of it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests import children

PATIENCE = 45
"""Seconds after which a command that takes a few of them counts as hanging."""

# Joiners are left out: emoji and some scripts are written with them.
_STEERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
_SENTENCE = re.compile(r"^(safesteer-lite: |safesteer-lite \w+: error: )\S", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: its exit code, a signal as a negative number; None where it hung.
        output, error: what it wrote.
    """

    code: int | None
    output: str
    error: str


def call(
    folder: Path,
    *arguments: str,
    keys: bytes = b"",
    before: tuple[Callable[..., object], *tuple[Any, ...]] | None = None,
) -> Outcome:
    """Run a command of the program.

    Args:
        folder: where it starts, with `.in`, `.out` and `.err` beside whatever is there.
        arguments: the command line.
        keys: what is typed.
        before: a function with its arguments that the child calls first, to arrange for its end.
    """
    (folder / ".in").write_bytes(keys)
    child = children.start(_main, folder, arguments, before)
    child.join(PATIENCE)
    if child.exitcode is None:
        child.kill()
        child.join()
        code = None
    else:
        code = child.exitcode
    # Surrogates show bytes that are no text: they must not come out either.
    output, error = ((folder / name).read_bytes().decode("utf-8", "surrogateescape") for name in (".out", ".err"))
    return Outcome(code, output, error)


def _main(folder: Path, arguments: tuple[str, ...], before: tuple[Any, ...] | None) -> NoReturn:
    os.chdir(folder)
    flags = (os.O_RDONLY, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, (name, mode) in enumerate(zip((".in", ".out", ".err"), flags, strict=True)):
        os.dup2(os.open(name, mode, 0o600), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    from safesteer_lite.shell.cli import main

    if before:
        before[0](*before[1:])
    sys.exit(main(list(arguments)))


def check(outcome: Outcome) -> None:
    """The command did what it was asked, or said in a sentence why not; and it sent the terminal nothing that steers it.

    Raises:
        AssertionError: it did not.
    """
    assert outcome.code is not None, f"it hung\n{outcome.error[-2000:]}"
    said = outcome.error.strip().splitlines() or [""]
    assert "Traceback (most recent call last)" not in outcome.error + outcome.output, (
        f"{said[-1]}\n{outcome.error[-3000:]}"
    )
    assert outcome.code in (0, 1, 2), f"exit code {outcome.code}\n{outcome.error[-2000:]}"
    if outcome.code:
        assert _SENTENCE.search(outcome.error), (
            f"exit code {outcome.code} without a sentence: {outcome.error[-2000:]!r}"
        )
    assert "The system said: ." not in outcome.error, outcome.error
    for text in (outcome.output, outcome.error):
        raw = _STEERS.search(text)
        assert raw is None, f"{text[max(0, raw.start() - 80) : raw.end() + 80]!r} reaches the terminal"

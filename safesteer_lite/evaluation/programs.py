"""Programs that a model writes: found in its answer, completed by what the task gives, and run against the task's tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from safesteer_lite import children
from safesteer_lite.evaluation.guard import PASSED

LONGEST_SECONDS = 15.0
"""Of waiting for a program; `guard.SECONDS` of processor time are its share of them."""

BLOCK_ENDS = "\n```\n"
"""What ends the first block of an answer: a generator may stop there, if a fence has come before it."""

_GUARD = Path(__file__).with_name("guard.py")
_BLOCK = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_BEGINNING = re.compile(r"^(?:from|import|def|class|@)\b", re.MULTILINE)


def program_of(answer: str, source: str, function: str) -> str:
    """The program in an answer: its first fenced block, so that an answer may end where that does.

    Args:
        answer: what the model said. Without a fence it is a program from its first line that begins like one.
        source: the beginning of the program that the model was given, up to the function's docstring.
        function: the name of the function that was asked for.

    Returns:
        A whole program. What stands above the function in `source`, imports and helpers, is put before the answer's; an
        answer without the function's head is taken for its body.
    """
    head = re.compile(rf"^(?:async )?def {re.escape(function)}\b", re.MULTILINE)
    block, begun = _BLOCK.search(answer), _BEGINNING.search(answer)
    code = block[1] if block else answer[begun.start() :] if begun else answer
    if not head.search(code):
        return source + code
    given = head.search(source)
    return (source[: given.start()] if given else "") + code


def passes(program: str, seconds: float = LONGEST_SECONDS) -> bool:
    """Whether a program runs to its end without an error, in a process of its own and an empty folder; see `guard`.

    Args:
        program: Python source; it sees the standard library and nothing of this environment's variables.
        seconds: the longest to wait for it.
    """
    # Windows finds its own libraries by this one.
    variables = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            children.python("-I", "-S", "-B", str(_GUARD)),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=variables,
            start_new_session=True,
        )
        try:
            # A program may end before it has read what it is given.
            with suppress(subprocess.TimeoutExpired, BrokenPipeError):
                process.communicate(program.encode("utf-8", "replace"), timeout=seconds)
        finally:
            _end(process)
        return process.returncode == PASSED


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and whatever it has started."""
    with suppress(ProcessLookupError, PermissionError):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()

"""Programs in answers: which one is taken, and that it is run within limits."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from safesteer_lite.evaluation.programs import passes, program_of

SOURCE = 'import math\n\ndef helper(x):\n    return x\n\ndef wanted(x):\n    """ Does it. """\n'
ABOVE = "import math\n\ndef helper(x):\n    return x\n\n"
WHOLE = "def wanted(x):\n    return helper(x)\n"

ANSWERS = {
    "a block": (f"Here it is:\n```python\n{WHOLE}```\nDone.", ABOVE + WHOLE),
    "a block without a language": (f"```\n{WHOLE}```", ABOVE + WHOLE),
    "a block that never ends": (f"```python\n{WHOLE}", ABOVE + WHOLE),
    "the first block of two": (f"```python\n{WHOLE}```\n```python\ndef wanted(x):\n    return 0\n```", ABOVE + WHOLE),
    "prose, then a program": (f"Of course!\n\n{WHOLE}", ABOVE + WHOLE),
    "a body": ("```python\n    return 7\n```", SOURCE + "    return 7\n"),
    "a name that only begins alike": ("def wanted_not(x):\n    pass\n", SOURCE + "def wanted_not(x):\n    pass\n"),
    "a refusal": ("I can't help.", SOURCE + "I can't help."),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_program_of_an_answer(answer: str) -> None:
    said, program = ANSWERS[answer]
    assert program_of(said, SOURCE, "wanted") == program


FAILING = {
    "a wrong result": "assert 1 == 2",
    "no program": "I'm sorry, but I can't help with that.",
    "NUL": "x = '\0'",
    "half a character": "x = '\ud800'; y = z",
    "an early end": "import sys; sys.exit(0)",
    "a hidden end": "import os; os._exit(0)",
    "much memory": "x = bytearray(2 << 30)",
    "endless nesting": "def f(): f()\nf()",
    "a child": "import subprocess; subprocess.run(['true'])",
    "a shell": "import os; os.system('true')",
    "a fork": "import os; os.fork()",
    "a signal": "import os; os.kill(os.getppid(), 0)",
    "native code": "import ctypes; ctypes.CDLL(None)",
    "a socket": "import socket; socket.socket()",
    "a name looked up": "import socket; socket.getaddrinfo('localhost', 80)",
    "a package of the environment": "import torch",
}


@pytest.mark.parametrize("program", FAILING)
def test_programs_that_fail_or_reach_out_do_not_pass(program: str) -> None:
    assert passes(FAILING[program]) is False


def test_programs_that_compute_pass() -> None:
    used = "import collections, functools, hashlib, heapq, itertools, json, math, random, re, typing\n"
    assert passes(used + "print('loud' * 100_000)\nassert hashlib.md5(b'').hexdigest().startswith('d41d')")
    assert passes("open('own.txt', 'w').write('x'); assert open('own.txt').read() == 'x'")


def test_a_program_sees_an_empty_folder_and_no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemError('not the standard library')")
    assert passes("import json, os; assert os.listdir() == [] and 'HF_TOKEN' not in os.environ")


@pytest.mark.parametrize(
    "how", ["open({!r}, 'w')", "import os; os.open({!r}, os.O_WRONLY)", "import os; os.remove({!r})"]
)
def test_a_program_cannot_change_a_file_outside(how: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("as it was")
    assert passes(how.format(str(kept))) is False
    assert kept.read_text() == "as it was"


def test_a_program_cannot_fill_the_disk() -> None:
    assert passes("open('large', 'wb').write(bytes(2 << 20))") is (os.name == "nt")


@pytest.mark.parametrize(
    "program", ["import time; time.sleep(60)", "while True: pass", "try:\n  input()\nexcept: pass\nwhile 1: 1"]
)
def test_a_program_that_never_ends_is_ended(program: str) -> None:
    assert passes(program, seconds=1.0) is False


def test_the_network_is_there_for_everybody_else() -> None:
    """Or the refusal above would be the machine's, and prove nothing."""
    with socket.socket():
        pass

"""Ctrl-C: one lets the work end, two end a program that Python cannot interrupt."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests import REPOSITORY

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows sends no such signals")

ASKED = "Stopping after this step; Ctrl-C again stops now. It can be resumed.\n"
DEAF = """
import hashlib
from safesteer_lite.shell.interrupts import stop_on_interrupt
with stop_on_interrupt(lambda message: print(message, flush=True), patience=1.0) as stop_requested:
    print("begun", flush=True)
    {work}
    print("asked:", stop_requested(), flush=True)
"""


def deaf(work: str) -> subprocess.Popen[str]:
    """A program that does `work` where Ctrl-C asks it to stop."""
    script = [sys.executable, "-c", DEAF.format(work=work)]
    return subprocess.Popen(
        script, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.slow
def test_a_second_interrupt_ends_a_program_that_python_cannot_interrupt() -> None:
    """One call that computes for hours and never looks for signals, as a backward pass does for seconds."""
    with deaf('hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)') as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        try:
            said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    # Whether the first one comes just before the call, and is answered, is up to the machine.
    assert said[0] in ("", ASKED) and said[1] == "Stopped. Go on with `safesteer-lite resume`.\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_one_interrupt_lets_the_work_end(number: signal.Signals) -> None:
    with deaf('hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)') as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        process.send_signal(number)
        said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said == (f"{ASKED}asked: True\n", "")

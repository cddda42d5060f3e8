"""Ctrl-C while a run is at work: the first one asks it to stop after the step, the second one ends it wherever it stands."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_interrupt(say: Callable[[str], None], patience: float = 5.0) -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C asks the run to stop after the step, and the second stops it at once.

    So does the signal by which a scheduler, or a system that shuts down, asks a program to end (SIGTERM). Closing the
    terminal asks it to stop too; from then on nobody reads what it says.

    Args:
        say: shows the user a sentence.
        patience: seconds that Python gets to hear of the second Ctrl-C by itself, and to end with its own message.

    Yields:
        Tells whether the run was asked to stop.
    """
    asked: list[bool] = []

    def interrupted(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        say("Stopping after this step; Ctrl-C again stops now. It can be resumed.")

    def hung_up(number: int, frame: FrameType | None) -> None:
        asked.append(True)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)

    handlers: dict[int, Callable[[int, FrameType | None], None]] = {
        signal.SIGINT: interrupted,
        signal.SIGTERM: interrupted,
    }
    if hasattr(signal, "SIGHUP"):  # Windows has none: it ends the program with its window.
        handlers[signal.SIGHUP] = hung_up
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with _second_interrupt_ends(patience):
            yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _second_interrupt_ends(patience: float) -> Iterator[None]:
    """Inside, a second Ctrl-C ends the program even while torch computes.

    Python hears of a signal only between two of its own instructions, and a call into torch is one of them however long it
    takes. What is saved is whole at any moment, so the program may end wherever it stands.
    """
    over, (ear, mouth) = threading.Event(), socket.socketpair()

    def listen() -> None:
        heard = 0
        while number := ear.recv(1):
            heard += number[0] in (signal.SIGINT, signal.SIGTERM)
            if heard == 2 and not over.wait(patience):
                if sys.stdout.isatty():
                    # Out of the live screen, with a cursor.
                    os.write(1, b"\x1b[?1049l\x1b[?25h")
                os.write(2, b"Stopped. Go on with `safesteer-lite resume`.\n")
                os._exit(130)

    mouth.setblocking(False)
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        over.set()
        mouth.close()
        listener.join()
        ear.close()

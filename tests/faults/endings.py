"""Ends that a process may meet: each function arranges one of them in the process that calls it."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod"}


def at_change(number: int, act: Callable[[], None]) -> None:
    """Act just before the `number`-th call that opens a file for writing, flushes one, or changes a folder."""
    calls = itertools.count(1)

    def count(*_: object) -> None:
        if next(calls) == number:
            act()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            count()

    flush = os.fsync

    def flush_counted(handle: int) -> None:
        count()
        flush(handle)

    sys.addaudithook(watch)
    setattr(os, "fsync", flush_counted)  # noqa: B010


def die_at_change(number: int) -> None:
    """Be killed as by the system, or a power cut, just before that call."""
    at_change(number, lambda: os.kill(os.getpid(), signal.SIGKILL))


def die_at_size(size: int) -> None:
    """Be killed in the middle of writing the first file that grows beyond `size` bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def refuse_beyond(size: int) -> None:
    """Have the system refuse to let any file grow beyond `size` bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def fill_at_change(number: int, filler: Path) -> None:
    """Have the disk of `filler` become full just before that call."""

    def fill() -> None:
        handle = os.open(filler, os.O_WRONLY | os.O_CREAT)
        try:
            while True:
                os.write(handle, b"\0" * 4096)
        except OSError:
            os.close(handle)

    at_change(number, fill)

"""The lock of a run: one process at a time writes to its folder, and inside it only."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from safesteer_lite.errors import RunFolderError
from safesteer_lite.runs.durable import explained, read_bytes, write_atomically
from safesteer_lite.runs.manifest import STAGE_FOLDER

OWN_FOLDER = re.compile(rf"{STAGE_FOLDER.pattern}(?:\.partial)?")
"""What a run calls its folders: the result of a stage, and the checkpoints of one in progress."""

# What a run writes to in place, beside the drafts of stages.
_WRITTEN = {"events.jsonl", "run.lock"}


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keep other processes from writing to a run's folder.

    The system itself releases the lock when the process dies, so a run is never locked for good.

    Raises:
        RunFolderError: another process has the run, or the folder cannot be written or leads out of itself.
        DiskSpaceError: the disk is full.
    """
    # The process id lies beside the lock, since Windows lets nobody read a file that is locked.
    owner = run / "run.pid"
    lock = FileLock(run / "run.lock")
    with explained(f"the lock of {run.name}"):
        _refuse_links(run)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise RunFolderError(
                f"The run {run.name} is in use by {_process_named_in(owner)}.",
                "Wait until it is done, or stop it, then try again.",
            ) from None
    try:
        with explained(f"the lock of {run.name}"):
            write_atomically(owner, str(os.getpid()).encode("ascii"))
        yield
    finally:
        with suppress(OSError):
            owner.unlink()
        lock.release()


def _refuse_links(run: Path) -> None:
    """See that what a run writes to are files of its own, and do not lead out of its folder."""
    for path in run.iterdir():
        written = path.name in _WRITTEN or OWN_FOLDER.fullmatch(path.name.removesuffix(".tmp"))
        if path.name in _WRITTEN and not path.is_symlink() and not path.is_file():
            # A pipe would be waited for without end.
            raise RunFolderError(f"{path} is no file, and a run writes to it.", "Move it out of the run's folder.")
        if path.is_symlink() and written and not STAGE_FOLDER.fullmatch(path.name):
            raise RunFolderError(
                f"{path} is a link, and a run writes inside its own folder only.",
                "Put what it leads to in its place.",
            )


def _process_named_in(owner: Path) -> str:
    """The holder of a lock in words; it may not have written its id yet."""
    with suppress(OSError, ValueError):
        return f"process {int(read_bytes(owner, 100))}"
    return "another process"

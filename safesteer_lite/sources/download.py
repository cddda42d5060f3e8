"""What every download needs: a place, room on the disk, quiet libraries, and progress."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from safesteer_lite.events import Emit, Note, Progress
from safesteer_lite.runs import durable
from safesteer_lite.text import typed_path


def cache_folder() -> Path:
    """Where downloads are kept: `SAFESTEER_LITE_CACHE`, else `safesteer-lite` in the platform's cache folder."""
    if chosen := os.environ.get("SAFESTEER_LITE_CACHE"):
        return typed_path(chosen)
    return platformdirs.user_cache_path("safesteer-lite", appauthor=False, opinion=False)


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Check the file system of `folder` (which need not exist yet) for `needed` free bytes.

    Raises:
        DiskSpaceError: says how much is there, how much is needed and for what.
    """
    hint = "Free some space, or point SAFESTEER_LITE_CACHE (for models of the hub: HF_HOME) at another disk."
    durable.require_space(folder, needed, purpose, hint)


def readable_size(size: int) -> str:
    """`size` bytes in decimal MB or GB, as download pages state it."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep huggingface_hub from drawing bars and printing advice; errors still raise.

    transformers is not imported here: where Unsloth is used, it has to come first.
    """
    from huggingface_hub import utils as hub
    from huggingface_hub.utils import logging

    bars, verbosity = not hub.are_progress_bars_disabled(), logging.get_verbosity()
    hub.disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            hub.enable_progress_bars()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers and huggingface_hub from drawing bars and printing advice; errors still raise."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with quiet_hub():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def alone(lock: Path, emit: Emit, stage: str, otherwise: str) -> Iterator[None]:
    """Let one process at a time into the block; the system releases the lock when a process dies.

    Args:
        lock: the lock's file; its folder is there.
        emit: takes a Note before waiting for another process.
        stage: the name that the Note carries.
        otherwise: what the Note says.
    """
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        emit(Note(stage, otherwise))
        held.acquire()
    try:
        yield
    finally:
        held.release()


@contextmanager
def progress_by_growth(folder: Path, total: int, emit: Emit, stage: str, what: str) -> Iterator[None]:
    """Report a download by how much `folder` holds: it works for every downloader, and counts what a resume finds.

    Args:
        folder: where the download lands, at any depth.
        total: bytes expected in the end.
        what: what the Progress events say is counted.
    """
    finished = threading.Event()

    def report() -> None:
        emit(Progress(stage, what, min(folder_bytes(folder), total), total))

    def watch() -> None:
        while not finished.wait(0.5):
            report()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
    report()


def folder_bytes(folder: Path) -> int:
    """The size of all files under `folder` in bytes; links do not count, and neither do files that vanish meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() and not path.is_symlink() else 0
        except OSError:
            continue
    return total

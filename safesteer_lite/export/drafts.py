"""Folders in the making: written beside their name, which they get when they are whole; and files brought to the disk."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from safesteer_lite.errors import DiskSpaceError, ExportError
from safesteer_lite.runs import durable

_CHUNK = 1 << 24
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
# What numpy, which writes quantised tensors, raises without the system's number.
_NO_ROOM_FOR_NUMPY = re.compile(r"Not enough free space|requested and \d+ written")


def flush(stream: IO[bytes] | IO[str]) -> None:
    """Bring what was written to the disk, not only to the system's cache."""
    stream.flush()
    os.fsync(stream.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file to the disk, not only to the system's cache."""
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        flush(stream)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes to the disk, not only to the system's cache."""
    with durable.open_regular(source) as reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, _CHUNK)
        flush(writer)


def copy_folder(source: Path, target: Path) -> None:
    """Copy the files of a folder, which has no folders in it, to an existing one."""
    for path in sorted(source.iterdir()):
        if path.is_file():
            copy_file(path, target / path.name)


def draft_name(folder: Path) -> Path:
    """Where a folder is written before it gets its name: beside it, and called as nobody calls a folder of their own."""
    return folder.with_name(f"{folder.name}.safesteer-draft")


def require_space(folder: Path, needed: int, what: str = "") -> None:
    """Check for free space where `folder` will be.

    Args:
        folder: what will be written; it need not exist. What a killed attempt left of it counts as free, since it will
            be used or cleared away.
        needed: bytes.
        what: what will be written, as the user would call it; empty for the folder's name.

    Raises:
        DiskSpaceError: there is less room than that.
    """
    left = sum(path.stat().st_size for path in draft_name(folder).rglob("*") if path.is_file())
    durable.require_space(folder.parent, needed - left, what or folder.name)


@contextmanager
def published(folder: Path, ours: Callable[[str], bool], kept: Collection[str] = ()) -> Iterator[Path]:
    """A folder to write in, which gets its final name only if the block ends well, and vanishes otherwise.

    Args:
        folder: the final name; must not exist.
        ours: whether a file name may be left from an earlier attempt that was killed; only a temporary folder that
            holds nothing else is cleared away.
        kept: names in such a leftover that stay, to be used again.

    Raises:
        ExportError: the folder exists already or cannot be written.
        DiskSpaceError: the disk ran full.
    """
    temporary = draft_name(folder)
    try:
        if folder.exists():
            raise ExportError(f"{folder} exists already.", "Choose another folder, or remove this one first.")
        if temporary.exists():
            _clear_leftover(temporary, ours, kept)
        temporary.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            durable.sync_folder(temporary)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        durable.sync_folder(folder.parent)
    except OSError as error:
        if _ran_full(error):
            raise DiskSpaceError(f"The disk ran full while {folder} was written.", "Free some space.") from error
        raise ExportError(
            f"{folder} could not be written: {error}.", "Choose a folder that you can write to."
        ) from error


def _ran_full(error: OSError) -> bool:
    """Whether an error of the system means a full disk."""
    return error.errno in _NO_ROOM or (error.errno is None and _NO_ROOM_FOR_NUMPY.search(str(error)) is not None)


def _clear_leftover(temporary: Path, ours: Callable[[str], bool], kept: Collection[str]) -> None:
    """Remove what a killed attempt left and nobody will use, and nothing else."""
    if temporary.is_symlink() or not temporary.is_dir() or not all(ours(entry.name) for entry in temporary.iterdir()):
        raise ExportError(f"{temporary} is in the way and was not written by a merge.", "Move it elsewhere.")
    for entry in list(temporary.iterdir()):
        # What a link leads to was not written by a merge, whatever the link is called.
        if entry.name not in kept or entry.is_symlink():
            durable.remove(entry)

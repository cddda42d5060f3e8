"""Files and folders that survive a kill: each is whole under its name, or not there.

Errors of the file system become ones that the user can act on.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safesteer_lite.errors import DiskSpaceError, RunFolderError, SafeSteerError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY}


def files_in(folder: Path) -> list[Path]:
    """Every file under `folder`, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def draft_of(final: Path, what: str) -> Iterator[Path]:
    """An empty folder beside `final` to write in; it is removed if the block raises.

    Args:
        final: the name that `put_in_place` will give it.
        what: what is written, as the user would call it.

    Raises:
        RunFolderError: the folder cannot be made.
        DiskSpaceError: the disk is full.
    """
    draft = final.with_name(f"{final.name}.tmp")
    with explained(what):
        if draft.exists():
            shutil.rmtree(draft)
        draft.mkdir()
    try:
        yield draft
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        # Other errors of the system may come from anything the block does, a download for one: they are not ours.
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise _as_user_error(error, what) from error
        raise


def put_in_place(draft: Path, final: Path) -> None:
    """Give a draft, flushed already, its final name in place of what has that name now."""
    discard(final)
    _replace(draft, final)
    sync_folder(final.parent)


def discard(folder: Path) -> None:
    """Remove a folder such that it is whole under its own name, or not there; a kill may leave it under `.old`."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        _replace(folder, old)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path, names: re.Pattern[str]) -> None:
    """Remove the drafts and the discarded folders that a killed process left in `folder`.

    Args:
        folder: where to look.
        names: matches the whole of each final name that is ours; whatever else lies there stays.
    """
    for path in folder.iterdir():
        if path.suffix in {".tmp", ".old"} and names.fullmatch(path.stem):
            shutil.rmtree(path, ignore_errors=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content such that a reader, or a kill, sees the old content or the new, never a part."""
    draft = path.with_name(f"{path.name}.tmp")
    with draft.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    _replace(draft, path)
    sync_folder(path.parent)


def _replace(source: Path, target: Path) -> None:
    """Rename; on Windows, wait up to 1.6 seconds for a virus scanner or a viewer to let go of the files."""
    for delay in (0.05, 0.15, 0.4, 1.0):
        try:
            source.replace(target)
            return
        except PermissionError:
            if os.name != "nt":
                raise
        time.sleep(delay)
    source.replace(target)


def rename_to_free_name(source: Path, target: Path) -> bool:
    """Rename a folder that is not empty, unless `target` exists; returns whether it was renamed."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        raise
    return True


def sync_tree(folder: Path) -> None:
    """Flush every file under `folder`, and the folders themselves, to the disk."""
    # Windows flushes only files that are open for writing.
    mode = "r+b" if os.name == "nt" else "rb"
    for path in files_in(folder):
        with path.open(mode) as stream:
            os.fsync(stream.fileno())
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn errors of the file system into ones that the user can act on.

    Args:
        what: what is read or written inside, as the user would call it.

    Raises:
        RunFolderError: the file system refused.
        DiskSpaceError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        raise _as_user_error(error, what) from error


def _as_user_error(error: OSError, what: str) -> SafeSteerError:
    if error.errno in _NO_ROOM:
        return DiskSpaceError(
            f"The disk is full: no room for {what}.", "Free some space, then resume the run: finished stages are kept."
        )
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return RunFolderError(
            f"No permission for {what} ({error}).", "Choose a runs folder that you may write to, or change its rights."
        )
    return RunFolderError(f"The file system refused {what} ({error}).", "Check that the folder and its disk are there.")

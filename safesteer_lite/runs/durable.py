"""Files and folders that survive a kill: each is whole under its name, or not there; and what is read of them is checked.

Errors of the file system become ones that the user can act on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from safesteer_lite.errors import DiskSpaceError, RunFolderError, SafeSteerError

LARGEST_JSON = 256 << 20
"""Bytes: more than any file of settings, tokens or answers takes, and little enough to be held in memory."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY}
# How the errors of safetensors, which are no OSErrors, tell the system's number: "(os error 28)".
_SYSTEM_NUMBER = re.compile(r"(?:os error |code: )(\d+)")


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
        remove(draft)
        draft.mkdir()
    try:
        yield draft
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        # Other errors of the system may come from anything the block does, a download for one: they are not ours.
        if (cause := _as_os_error(error)) and cause.errno in _NO_ROOM:
            raise _as_user_error(cause, what) from error
        raise


def put_in_place(draft: Path, final: Path) -> None:
    """Give a draft, flushed already, its final name in place of what has that name now."""
    discard(final)
    _replace(draft, final)
    sync_folder(final.parent)


def discard(folder: Path) -> None:
    """Remove a folder such that it is whole under its own name, or not there; a kill may leave it under `.old`."""
    old = folder.with_name(f"{folder.name}.old")
    remove(old)
    if os.path.lexists(folder):
        _replace(folder, old)
        sync_folder(folder.parent)
        with suppress(OSError):  # Its name is free, which is what counts; the rest is swept later.
            remove(old)


def remove(path: Path) -> None:
    """Remove a folder with all it holds, or a file, or a link but never what it leads to; nothing there is no error.

    Raises:
        OSError: it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, names: re.Pattern[str]) -> None:
    """Remove the drafts and the discarded folders that a killed process left in `folder`.

    Args:
        folder: where to look.
        names: matches the whole of each final name that is ours; whatever else lies there stays.
    """
    for path in folder.iterdir():
        if path.suffix in {".tmp", ".old"} and names.fullmatch(path.stem):
            with suppress(OSError):
                remove(path)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content such that a reader, or a kill, sees the old content or the new, never a part."""
    draft = path.with_name(f"{path.name}.tmp")
    # What lies under the draft's name may be a link to a file elsewhere, which must not be written to.
    draft.unlink(missing_ok=True)
    with draft.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    _replace(draft, path)
    sync_folder(path.parent)


def json_bytes(value: object) -> bytes:
    """`value` as JSON in UTF-8, with a line break at the end.

    Raises:
        TypeError: it is not JSON.
        ValueError: it holds a number that is not finite.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    # A name of a file may hold half of a surrogate pair, which only the escape can say.
    return (text + "\n").encode("utf-8", "backslashreplace")


def write_json(path: Path, value: object) -> None:
    """Replace a file by `value` as JSON, at once as `write_atomically` does.

    Raises:
        TypeError: it is not JSON.
        ValueError: it holds a number that is not finite.
        OSError: the file cannot be written; see `explained`.
    """
    write_atomically(path, json_bytes(value))


def parse_json(content: bytes | str) -> Any:
    """JSON as strictly as it is meant: no number that is not finite, no key twice, and no nesting that ends the program.

    Raises:
        ValueError: the content is anything else; the message says what.
    """
    try:
        return json.loads(content, object_pairs_hook=_once, parse_constant=_refuse, parse_float=_finite)
    except (RecursionError, MemoryError):
        raise ValueError("it is nested too deeply") from None


def parse_json_lines(content: bytes) -> list[Any]:
    """A file with one JSON value a line, each as strictly as `parse_json` reads it.

    Raises:
        ValueError: a line is anything else.
    """
    # Not splitlines: an answer may hold other line separators, which JSON leaves as they are.
    return [parse_json(line) for line in content.split(b"\n") if line.strip()]


def read_json(
    path: Path,
    what: str,
    *,
    hint: str = "Restore it from a copy.",
    error: type[SafeSteerError] = RunFolderError,
    largest: int = LARGEST_JSON,
) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: a regular file, or a link to one.
        what: what it is, as the user would call it ("the settings of the model").
        hint: what to do where it is missing or damaged.
        error: what to raise.
        largest: bytes that it may have.

    Raises:
        SafeSteerError: as `error`, with the file, what is wrong with it, and the hint.
    """
    value = parsed(path, what, hint=hint, error=error, largest=largest)
    if not isinstance(value, dict):
        raise error(f"{path}, {what}, is damaged: it holds no JSON object.", hint)
    return value


def parsed(
    path: Path,
    what: str,
    *,
    hint: str = "Restore it from a copy.",
    error: type[SafeSteerError] = RunFolderError,
    largest: int = LARGEST_JSON,
) -> Any:
    """Read any JSON value; as `read_json`, which reads objects only."""
    try:
        return parse_json(read_bytes(path, largest))
    except FileNotFoundError:
        raise error(f"{path}, {what}, is missing.", hint) from None
    except (OSError, MemoryError) as problem:
        raise error(f"{path}, {what}, cannot be read: {_said(problem)}.", hint) from problem
    except ValueError as problem:
        raise error(f"{path}, {what}, is damaged: {problem}.", hint) from problem


def read_bytes(path: Path, largest: int) -> bytes:
    """The whole content of a regular file, or of one that a link leads to.

    Raises:
        OSError: it cannot be read, or is no regular file: a pipe would be waited for without end.
        ValueError: it has more than `largest` bytes.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > largest:
            raise ValueError(f"it has {size:,} bytes, more than the {largest:,} that are read")
        return stream.read()


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file, or one that a link leads to, to be read.

    Raises:
        OSError: it cannot be read, or is no regular file: a pipe would be waited for without end.
    """
    # Without waiting, since opening a pipe waits for its writer; of regular files the flag changes nothing.
    stream = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return stream


def sha256_of(path: Path) -> str:
    """The SHA-256 of a regular file, in hexadecimal.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def free_space(folder: Path) -> int:
    """Free bytes where `folder` is, or will be."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def require_space(folder: Path, needed: int, what: str, hint: str = "") -> None:
    """Raise unless what shall be written fits.

    Args:
        folder: where it will be written; it need not exist yet.
        needed: bytes.
        what: what will be written, as the user would call it ("the merged model").
        hint: what to do, if it is not the usual.

    Raises:
        DiskSpaceError: there is less room than that.
    """
    free = free_space(folder)
    if free < needed:
        raise DiskSpaceError(
            f"There is not enough room for {what}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free at {folder}.",
            hint or f"Free {(needed - free) / 1e9:.2f} GB there, or choose a folder on another disk.",
        )


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
    """Turn errors of the file system into ones that the user can act on, those that safetensors words itself included.

    Args:
        what: what is read or written inside, as the user would call it.

    Raises:
        RunFolderError: the file system refused, or what is read is too large or nested too deeply.
        DiskSpaceError: the disk is full.
    """
    try:
        yield
    except (MemoryError, RecursionError) as error:
        raise RunFolderError(
            f"There is not enough memory for {what} ({_said(error)}).", "It may be damaged."
        ) from error
    except Exception as error:
        if cause := _as_os_error(error):
            raise _as_user_error(cause, what) from error
        raise


def _as_os_error(error: BaseException) -> OSError | None:
    """What the file system said: the error itself, or what an error of safetensors quotes of it; None if neither."""
    if isinstance(error, OSError):
        return error
    # Whoever raised it has imported the library; this floor of the house does without.
    theirs = getattr(sys.modules.get("safetensors"), "SafetensorError", None)
    if theirs is None or not isinstance(error, theirs):
        return None
    number = _SYSTEM_NUMBER.search(str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(errno.EIO, str(error))


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


def _said(error: BaseException) -> str:
    """What an error says in a few words; some say nothing."""
    words = error.strerror if isinstance(error, OSError) else str(error)
    return words or {"MemoryError": "out of memory", "RecursionError": "too deep"}.get(
        type(error).__name__, type(error).__name__
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it has the key {key!r} twice")
        found[key] = value
    return found


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds {text}, which is no finite number")
    return number

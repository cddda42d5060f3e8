"""Safetensors checkpoints, one tensor at a time: where each tensor lies, read it, write shards without holding one."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from safesteer_lite.errors import DiskSpaceError, ExportError
from safesteer_lite.runs import durable

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = frozenset(("F64", "F32", "F16", "BF16"))
# A name and nothing that leads elsewhere: no way through other folders, no drive, no control characters.
_SHARD_NAME = re.compile(r"[^/\\:\x00-\x1f]+\.safetensors")
_CHUNK = 1 << 24
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
# What numpy, which writes quantised tensors, raises without the system's number.
_NO_ROOM_FOR_NUMPY = re.compile(r"Not enough free space|requested and \d+ written")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor where it lies on disk.

    Attributes:
        name: its key in the checkpoint.
        dtype: its type as safetensors writes it, such as `BF16`.
        shape: its sizes; empty for a scalar.
        file: the shard that holds it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return (math.prod(self.shape) * _bits(self.dtype) + 7) // 8

    def load(self) -> Tensor:
        """Read the tensor."""
        with self._opened() as reader:
            tensor: Tensor = reader.get_tensor(self.name)
            return tensor

    def load_rows(self, first: int, count: int) -> Tensor:
        """Read `count` rows of a matrix from row `first` on, (count, columns)."""
        with self._opened() as reader:
            rows: Tensor = reader.get_slice(self.name)[first : first + count]
            return rows

    def chunks(self) -> Iterator[memoryview]:
        """The tensor's bytes as stored, in pieces of some 16 MiB."""
        if len(self.shape) < 2:
            yield tensor_bytes(self.load())
            return
        rows = max(_CHUNK * self.shape[0] // max(self.size, 1), 1)
        for first in range(0, self.shape[0], rows):
            yield tensor_bytes(self.load_rows(first, rows))

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        if self.dtype not in DTYPES:
            raise ExportError(f"{self.name} in {self.file} is stored as {self.dtype}, which cannot be read here.")
        try:
            with safe_open(self.file, framework="pt") as reader:
                yield reader
        except (SafetensorError, OSError) as error:
            raise _damaged(self.file) from error


def _bits(dtype: str) -> int:
    """Bits of one number, of types that cannot be computed with here too: `F8_E4M3`, `F4`."""
    if dtype in DTYPES:
        return DTYPES[dtype].itemsize * 8
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8


@dataclass(frozen=True)
class NewTensor:
    """One tensor to be written; `produce` is called when its turn comes, and its result is let go at once.

    Attributes:
        name: its key in the checkpoint.
        dtype: its type as safetensors writes it.
        shape: its sizes.
        size: its length in bytes; what `produce` yields must add up to this.
        produce: makes the bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    produce: Callable[[], Iterable[bytes | memoryview]] = field(repr=False)


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a model folder.

    Attributes:
        folder: where it lies.
        shards: the tensors of each file, in the order of their bytes.
        tensors: the same tensors by name.
    """

    folder: Path
    shards: tuple[tuple[StoredTensor, ...], ...]
    tensors: Mapping[str, StoredTensor]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ExportError: the file is missing, unreadable, or holds something else.
    """
    hint = "Check that this is the right, completely downloaded folder."
    return durable.read_json(path, "a part of a model", hint=hint, error=ExportError)


def read_shard(path: Path) -> tuple[StoredTensor, ...]:
    """The tensors of one safetensors file in the order of their bytes, from its header alone.

    Raises:
        ExportError: the file is missing, cut short, or not a safetensors file.
    """
    try:
        # Opening a pipe by its name would wait for whoever writes to it.
        durable.open_regular(path).close()
        with safe_open(path, framework="pt") as reader:
            slices = [(name, reader.get_slice(name)) for name in reader.offset_keys()]
            return tuple(StoredTensor(name, part.get_dtype(), tuple(part.get_shape()), path) for name, part in slices)
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error}.", "Download the model again.") from error
    except SafetensorError as error:
        raise _damaged(path) from error


def read_checkpoint(folder: Path) -> Checkpoint:
    """Where each tensor of a model folder lies; reads headers only.

    Raises:
        ExportError: no safetensors weights, a missing or damaged shard, an index that does not fit, or one name twice.
    """
    indexed: dict[str, str] | None = None
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ExportError(f"{folder / INDEX} has no weight_map.", "Download the model again.")
        indexed = {str(name): str(file) for name, file in weight_map.items()}
        files = sorted(set(indexed.values()))
        if elsewhere := [name for name in files if not _SHARD_NAME.fullmatch(name)]:
            raise ExportError(
                f"The index of {folder} names weight files that do not lie in it: {few(elsewhere)}.",
                "Download the model again, from a source that you trust.",
            )
    elif (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    else:
        raise ExportError(
            f"{folder} holds no safetensors weights.",
            "Give a model folder with model.safetensors, or with its shards and their index.",
        )
    shards = tuple(read_shard(folder / name) for name in files)
    tensors: dict[str, StoredTensor] = {}
    for tensor in (tensor for shard in shards for tensor in shard):
        if tensor.name in tensors:
            raise ExportError(f"{tensor.name} is stored twice, in {tensors[tensor.name].file} and {tensor.file}.")
        tensors[tensor.name] = tensor
    if indexed is not None and indexed != {name: tensor.file.name for name, tensor in tensors.items()}:
        odd = sorted(name for name in indexed.keys() ^ tensors.keys())[:5] or ["the files of some tensors"]
        raise ExportError(
            f"The index of {folder} does not fit its shards: {', '.join(odd)}.", "Download the model again."
        )
    return Checkpoint(folder, shards, tensors)


def write_shard(path: Path, tensors: Sequence[NewTensor], written: Callable[[int], None]) -> str:
    """Write one safetensors file: the header from the known shapes, then each tensor as it is produced.

    Args:
        path: the file to create.
        tensors: what to write, in this order.
        written: called after each tensor with the number of its bytes.

    Returns:
        The SHA-256 of the file, which is on the disk by then.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.size
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # The format asks for a header padded with spaces, so that the tensors start at a multiple of 8 bytes.
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as stream:

        def put(piece: bytes | memoryview) -> int:
            digest.update(piece)
            return stream.write(piece)

        put(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            size = sum(put(piece) for piece in tensor.produce())
            if size != tensor.size:
                raise ExportError(f"{tensor.name} came out as {size} bytes instead of {tensor.size}.")
            written(size)
        _flush(stream)
    return digest.hexdigest()


def write_shards(
    folder: Path,
    shards: Sequence[Sequence[NewTensor]],
    written: Callable[[int], None],
    finished: Collection[str] = (),
    wrote: Callable[[str, str], None] = lambda name, sha256: None,
) -> list[str]:
    """Write a checkpoint of one or more files, with an index if there are more than one.

    Args:
        folder: where to write.
        shards: the tensors of each file.
        written: called with the bytes of each tensor, or of each file that was there already.
        finished: names of weight files that an earlier attempt wrote whole.
        wrote: called with the name and the SHA-256 of each file that is on the disk.

    Returns:
        The names of the weight files.
    """
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        if name in finished:
            written(sum(tensor.size for tensor in shard))
        else:
            wrote(name, write_shard(folder / name, shard, written))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.size for shard in shards for tensor in shard)},
            "weight_map": {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
        }
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return names


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; asks for the extremes, which needs no second tensor as `isfinite` does."""
    if tensor.numel() == 0:
        return True
    return all(math.isfinite(extreme.item()) for extreme in tensor.aminmax())


def write_text(path: Path, text: str) -> None:
    """Write a text file to the disk, not only to the system's cache."""
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        _flush(stream)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes to the disk, not only to the system's cache."""
    with durable.open_regular(source) as reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, _CHUNK)
        _flush(writer)


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
            _sync_folder(temporary)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(folder.parent)
    except OSError as error:
        if _ran_full(error):
            raise DiskSpaceError(f"The disk ran full while {folder} was written.", "Free some space.") from error
        raise ExportError(
            f"{folder} could not be written: {error}.", "Choose a folder that you can write to."
        ) from error


def _ran_full(error: OSError) -> bool:
    """Whether an error of the system means a full disk."""
    return error.errno in _NO_ROOM or (error.errno is None and _NO_ROOM_FOR_NUMPY.search(str(error)) is not None)


def few(names: Sequence[str]) -> str:
    """The first few names, and how many there are beyond, for a message."""
    rest = len(names) - 3
    return ", ".join(sorted(names)[:3]) + (f" and {rest} more" if rest > 0 else "")


def _clear_leftover(temporary: Path, ours: Callable[[str], bool], kept: Collection[str]) -> None:
    """Remove what a killed attempt left and nobody will use, and nothing else."""
    if temporary.is_symlink() or not temporary.is_dir() or not all(ours(entry.name) for entry in temporary.iterdir()):
        raise ExportError(f"{temporary} is in the way and was not written by a merge.", "Move it elsewhere.")
    for entry in list(temporary.iterdir()):
        # What a link leads to was not written by a merge, whatever the link is called.
        if entry.name not in kept or entry.is_symlink():
            remove(entry)


def remove(entry: Path) -> None:
    """Remove a file, a folder with all that lies in it, or a link but not what it leads to."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def _flush(stream: IO[bytes] | IO[str]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a folder's names durable; Windows cannot open folders, and needs no such step."""
    with suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _damaged(path: Path) -> ExportError:
    return ExportError(f"{path} is damaged or incomplete.", "Download the model again.")

"""Safetensors checkpoints, one tensor at a time: where each tensor lies, read it, write shards without holding one."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from safesteer_lite.errors import ExportError
from safesteer_lite.export import drafts
from safesteer_lite.runs import durable
from safesteer_lite.sources.folder import INDEX, WEIGHTS, few
from safesteer_lite.sources.headers import read_header

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
# A name and nothing that leads elsewhere: no way through other folders, no drive, no control characters.
_SHARD_NAME = re.compile(r"[^/\\:\x00-\x1f]+\.safetensors")
_CHUNK = 1 << 24


@dataclass(frozen=True)
class StoredTensor:
    """One tensor where it lies on disk.

    Attributes:
        name: its key in the checkpoint.
        dtype: its type as safetensors writes it, such as `BF16`.
        shape: its sizes; empty for a scalar.
        file: the shard that holds it.
        size: its length in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    size: int

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
        found = read_header(path)
    except (OSError, MemoryError) as error:
        raise ExportError(f"{path} cannot be read: {error}.", "Download the model again.") from error
    except ValueError as error:
        raise _damaged(path) from error
    in_order = sorted(found.items(), key=lambda item: item[1].start)
    return tuple(StoredTensor(name, stored.dtype, stored.shape, path, stored.size) for name, stored in in_order)


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
        drafts.flush(stream)
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
        drafts.write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return names


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; asks for the extremes, which needs no second tensor as `isfinite` does."""
    if tensor.numel() == 0:
        return True
    return all(math.isfinite(extreme.item()) for extreme in tensor.aminmax())


def _damaged(path: Path) -> ExportError:
    return ExportError(f"{path} is damaged or incomplete.", "Download the model again.")

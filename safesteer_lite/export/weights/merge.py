"""Merge a LoRA adapter into the base weights, a block of rows at a time, and go on where a killed merge stopped."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from safesteer_lite import __version__
from safesteer_lite.errors import ExportError
from safesteer_lite.export import drafts
from safesteer_lite.export.weights import shards
from safesteer_lite.export.weights.adapter import Update, read_adapter
from safesteer_lite.export.weights.base import Source, Weights, read_sources
from safesteer_lite.export.weights.shards import DTYPE_NAMES, DTYPES, NewTensor
from safesteer_lite.export.weights.verify import SUMS
from safesteer_lite.runs.durable import read_json, sha256_of, write_json
from safesteer_lite.runs.manifest import Json, fingerprint
from safesteer_lite.sources.base import is_quantised, model_fingerprint
from safesteer_lite.sources.folder import INDEX, WEIGHTS, few
from safesteer_lite.sources.headers import FLOATS

RECORD = "merge.json"
"""In a merged folder: what was merged, as a fingerprint, and the SHA-256 of each weight file that is whole."""
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
TEMPLATES = "additional_chat_templates"
"""The folder in which transformers keeps a model's further chat templates, each under its own name."""
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class MergeResult:
    """What was written.

    Attributes:
        folder: the new model folder.
        files: the names of its weight files.
        tensors: how many tensors they hold.
        merged: how many of them the adapter changed.
        size: bytes of weights.
        dtype: the type of the weight matrices.
        strength: the factor on the adapter.
        weights: which base weights were taken.
    """

    folder: Path
    files: tuple[str, ...]
    tensors: int
    merged: int
    size: int
    dtype: torch.dtype
    strength: float
    weights: Weights


def merge_adapter(
    base_folder: Path,
    adapter_folder: Path,
    out_folder: Path,
    *,
    strength: float = 1.0,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    weights: Weights = "original",
    words: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MergeResult:
    """Write the base model with `strength * scale * B @ A` added to every matrix that the adapter names.

    The sums are done in float32 and rounded once. Tensors that nothing changes are copied byte for byte. The folder
    appears under its name only when it is complete. If the process is killed, the same call goes on after the last
    weight file that was finished, once its SHA-256 has been found right; after any error nothing stays.

    Args:
        base_folder: a Hugging Face model folder with safetensors.
        adapter_folder: a peft LoRA adapter.
        out_folder: the folder to create; must not exist.
        strength: factor on the adapter; 0 gives the base, 1 the trained model.
        dtype: the type of all floating-point tensors; `None` keeps a 16-bit checkpoint as it is, and turns a wider one
            into bfloat16.
        max_shard_bytes: begin a new file before one grows beyond this; `None` keeps the base's own division.
        weights: `original` merges into the stored 16-bit weights, `dequantised` into what their 4-bit NF4 form holds,
            which is what a 4-bit run trained on.
        words: where tokenizer, chat template and generation settings come from; `None` takes the base's.
        progress: called with bytes done and bytes in all, after each tensor.

    Raises:
        ExportError: base, adapter or folder cannot be used, or a merged value is not finite.
        DiskSpaceError: not enough room for the result.
    """
    if not math.isfinite(strength):
        raise ExportError(f"The adapter strength must be a finite number, not {strength}.")
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ExportError(f"Weights cannot be written as {dtype}.", "Use bfloat16, float16 or float32.")
    updates = read_adapter(adapter_folder)
    plan = plan_merge(
        base_folder,
        updates,
        strength=strength,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        weights=weights,
        words=words,
    )
    drafts.require_space(out_folder, plan.room)
    record = _Record(_mark(base_folder, adapter_folder, (strength, str(dtype), max_shard_bytes, weights)))
    record.take_over(drafts.draft_name(out_folder))
    done = 0

    def written(size: int) -> None:
        nonlocal done
        done += size
        progress(done, plan.size)

    with drafts.published(out_folder, is_ours, {RECORD, *record.files} if record.files else ()) as draft:
        for name, path in plan.copies.items():
            (draft / name).parent.mkdir(exist_ok=True)
            drafts.copy_file(path, draft / name)
        drafts.write_text(draft / "config.json", json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n")
        files = shards.write_shards(draft, plan.shards, written, tuple(record.files), partial(record.add, draft))
    return MergeResult(
        out_folder, tuple(files), len(plan.tensors), len(updates), plan.size, plan.dtype, strength, weights
    )


@dataclass(frozen=True)
class MergePlan:
    """What a merge will write, known from headers and settings before any weight is read.

    Attributes:
        config: the new config.json.
        copies: the files that are copied as they are, by their place in the new folder: tokenizer, chat templates,
            generation settings.
        shards: the tensors of each weight file.
        dtype: the type of the weight matrices.
    """

    config: Mapping[str, Any]
    copies: Mapping[str, Path]
    shards: tuple[tuple[NewTensor, ...], ...]
    dtype: torch.dtype

    @property
    def tensors(self) -> dict[str, NewTensor]:
        """Every tensor by its name."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard}

    @property
    def size(self) -> int:
        """Bytes of weights."""
        return sum(tensor.size for shard in self.shards for tensor in shard)

    @property
    def room(self) -> int:
        """Bytes that the folder takes; headers, index and configuration are small beside the allowance for them."""
        return self.size + sum(path.stat().st_size for path in self.copies.values()) + (1 << 24)


def plan_merge(
    base_folder: Path,
    updates: Mapping[str, Update],
    *,
    strength: float = 1.0,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    weights: Weights = "original",
    words: Path | None = None,
) -> MergePlan:
    """What `merge_adapter`, which has the same arguments, will write; without updates, what it writes of the base alone.

    Raises:
        ExportError: base and updates do not fit each other, or the base is stored in a way that cannot be read.
    """
    config = shards.read_json(base_folder / "config.json")
    sources = read_sources(shards.read_checkpoint(base_folder), config, weights)
    matrix_dtype, planned = _planned(sources, updates, config, strength, dtype)
    divided = tuple(tuple(part) for shard in planned for part in _divide(shard, max_shard_bytes))
    return MergePlan(_new_config(config, matrix_dtype), copied_files(words or base_folder), divided, matrix_dtype)


def copied_files(folder: Path) -> dict[str, Path]:
    """The files of a model that a merge copies as they are, by their place in the folder, with forward slashes."""
    found = {name: path for name in COPIED if (path := folder / name).is_file()}
    further = sorted(path for path in (folder / TEMPLATES).glob("*.jinja") if path.is_file())
    return {**found, **{f"{TEMPLATES}/{path.name}": path for path in further}}


def check_adapter(base_folder: Path, adapter_folder: Path) -> None:
    """See that an adapter can be merged into a base, from the adapter and the headers of the base alone.

    Raises:
        ExportError: one of them cannot be read, or they do not belong together; the message names the tensors.
    """
    config = shards.read_json(base_folder / "config.json")
    weights: Weights = "dequantised" if is_quantised(config) else "original"
    sources = read_sources(shards.read_checkpoint(base_folder), config, weights)
    _check_targets(read_adapter(adapter_folder), _by_name(sources), config)


def _by_name(shards: Sequence[Sequence[Source]]) -> dict[str, Source]:
    return {source.stored.name: source for shard in shards for source in shard}


def _planned(
    shards: Sequence[Sequence[Source]],
    updates: Mapping[str, Update],
    config: Mapping[str, Any],
    strength: float,
    dtype: torch.dtype | None,
) -> tuple[torch.dtype, list[list[NewTensor]]]:
    """The type of the matrices, and what to write in each of the base's files."""
    sources = _by_name(shards)
    _check_targets(updates, sources, config)
    matrix_dtype = dtype or _matrix_dtype(sources)
    uniform = dtype or (None if _matrix_dtype(sources, raw=True) == matrix_dtype else matrix_dtype)

    def written_as(source: Source) -> str:
        # A 16-bit checkpoint keeps the type of each tensor: some norms are stored in float32 on purpose. A matrix that is
        # stored wider than the others is rounded like them, as it was when the model was loaded for training.
        if source.dtype not in FLOATS or (uniform is None and not _is_wide_matrix(source)):
            return source.dtype
        return DTYPE_NAMES[uniform or matrix_dtype]

    return matrix_dtype, [
        [_plan(source, updates.get(source.stored.name), strength, written_as(source)) for source in shard]
        for shard in shards
    ]


def _is_wide_matrix(source: Source) -> bool:
    return len(source.shape) >= 2 and source.dtype in ("F32", "F64")


@dataclass
class _Record:
    """What `RECORD` holds.

    Attributes:
        mark: the fingerprint of everything that the weights depend on.
        files: the SHA-256 of each weight file that is whole, by its name.
    """

    mark: str
    files: dict[str, str] = field(default_factory=dict)

    def take_over(self, draft: Path) -> None:
        """Trust those files of a killed attempt at the same merge that are still what was written."""
        try:
            left = read_json(draft / RECORD, "the record of a merge", error=ExportError)
            listed = (
                {str(name): str(value) for name, value in left["files"].items()} if left["mark"] == self.mark else {}
            )
        except (ExportError, KeyError, TypeError, AttributeError):
            return
        self.files = {
            name: value
            for name, value in listed.items()
            if is_ours(name) and (draft / name).is_file() and sha256_of(draft / name) == value
        }

    def add(self, draft: Path, name: str, sha256: str) -> None:
        """Enter a file that is on the disk."""
        self.files = dict(sorted({**self.files, name: sha256}.items()))
        write_json(draft / RECORD, vars(self))


def _mark(base_folder: Path, adapter_folder: Path, settings: tuple[Json, ...]) -> str:
    adapter = [sha256_of(adapter_folder / f"adapter_{name}") for name in ("config.json", "model.safetensors")]
    # Another build of torch may add in another order, and half of a model must not be rounded unlike the other half.
    made_by = [__version__, torch.__version__]
    return fingerprint(
        {"base": model_fingerprint(base_folder), "adapter": adapter, "by": made_by, "as": list(settings)}
    )


def _check_targets(updates: Mapping[str, Update], sources: Mapping[str, Source], config: Mapping[str, Any]) -> None:
    """Every update must have a matrix of its own, of the right shape."""
    if unused := sorted(updates.keys() - sources.keys()):
        raise ExportError(
            f"The adapter changes {few(unused)}, which the base model does not hold.",
            "Check that the adapter was trained on this base model.",
        )
    ends = ("embed_tokens.weight", "lm_head.weight")
    if config.get("tie_word_embeddings") and (tied := [name for name in updates if name.endswith(ends)]):
        raise ExportError(f"The adapter changes {few(sorted(tied))}, which this model shares between input and output.")
    for name, update in updates.items():
        expected = (update.up.shape[0], update.down.shape[1])
        if sources[name].shape != expected:
            raise ExportError(
                f"{name} has shape {sources[name].shape}, and the adapter's update has {expected}.",
                "Check that the adapter was trained on this base model.",
            )
        if sources[name].dtype not in FLOATS:
            raise ExportError(f"{name} is stored as {sources[name].dtype}.", "Give the original 16-bit model.")


def _matrix_dtype(sources: Mapping[str, Source], raw: bool = False) -> torch.dtype:
    """The type that most matrix elements have; unless `raw`, bfloat16 in place of anything wider than 16 bits."""
    counts: Counter[str] = Counter()
    for source in sources.values():
        if source.dtype in FLOATS and len(source.shape) >= 2:
            counts[source.dtype] += math.prod(source.shape)
    if not counts:
        raise ExportError("The base model holds no weight matrices.")
    dtype = DTYPES[counts.most_common(1)[0][0]]
    return dtype if raw or dtype.itemsize == 2 else torch.bfloat16


def _plan(source: Source, update: Update | None, strength: float, dtype: str) -> NewTensor:
    """What to write for one tensor of the base: its own bytes, or its new values in the type `dtype`."""
    stored = source.stored
    update = None if update is None or strength == 0 else replace(update, scale=update.scale * strength)
    if update is None and dtype == stored.dtype and not source.statistics and not source.round_to_nf4:
        return NewTensor(stored.name, dtype, stored.shape, stored.size, stored.chunks)
    size = math.prod(source.shape) * DTYPES[dtype].itemsize
    return NewTensor(stored.name, dtype, source.shape, size, partial(_values, source, update, DTYPES[dtype]))


def _values(source: Source, update: Update | None, dtype: torch.dtype) -> Iterator[memoryview]:
    for first, values in source.blocks():
        if update is not None:
            up = update.up[first : first + len(values)]
            values = values.float().addmm_(up, update.down, alpha=update.scale)
        values = values.to(dtype)
        if not shards.is_finite(values):
            raise ExportError(
                f"{source.stored.name} holds values that {dtype} cannot express.", "Use bfloat16, or a lower strength."
            )
        yield shards.tensor_bytes(values)


def _divide(shard: list[NewTensor], max_bytes: int | None) -> Iterator[list[NewTensor]]:
    """Split one shard's tensors, in order, into parts of at most `max_bytes` (a larger tensor gets its own part)."""
    part: list[NewTensor] = []
    for tensor in shard:
        if part and max_bytes is not None and sum(other.size for other in part) + tensor.size > max_bytes:
            yield part
            part = []
        part.append(tensor)
    yield part


def _new_config(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The base's configuration without a trace of quantisation or of code that is not copied, and with the type that the
    weights really have."""
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    for key in [key for key in ("dtype", "torch_dtype") if key in plain] or ["dtype"]:
        plain[key] = str(dtype).removeprefix("torch.")
    return plain


def is_ours(name: str) -> bool:
    """Whether a merge writes files of this name."""
    fixed = (*COPIED, TEMPLATES, "config.json", WEIGHTS, INDEX, RECORD, f"{RECORD}.tmp", SUMS)
    return name in fixed or _SHARD.fullmatch(name) is not None

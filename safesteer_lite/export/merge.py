"""Merge a LoRA adapter into the base weights, tensor by tensor, so that the largest matrix sets the memory needed."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from safesteer_lite.errors import ExportError
from safesteer_lite.export import checkpoint
from safesteer_lite.export.checkpoint import DTYPE_NAMES, DTYPES, FLOATS, Checkpoint, NewTensor, StoredTensor, few

Weights = Literal["original", "dequantised"]

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
# Everything in an adapter's configuration that changes the model by more than W + scale * B @ A.
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
# Initialisations that leave the base weights alone. Others (PiSSA, OLoRA, LoftQ, ...) train against a changed base.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_STATISTIC = re.compile(
    r"(.+\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)"
)
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


@dataclass(frozen=True)
class Update:
    """The low-rank update of one matrix: `scale * up @ down`.

    Attributes:
        down: LoRA A, (rank, inputs).
        up: LoRA B, (outputs, rank).
        scale: alpha / rank, or alpha / sqrt(rank) for rank-stabilised adapters.
    """

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class Source:
    """One tensor of the base model, and how to read it.

    Attributes:
        stored: where it lies.
        dtype: the type it has once read.
        shape: the sizes it has once read.
        statistics: what bitsandbytes stored beside a 4-bit weight, by the last part of the key.
        round_to_nf4: pass the values through 4-bit NF4 and back, as training did when it loaded them.
    """

    stored: StoredTensor
    dtype: str
    shape: tuple[int, ...]
    statistics: Mapping[str, StoredTensor] = field(default_factory=dict)
    round_to_nf4: bool = False

    def load(self) -> Tensor:
        """The values that the adapter was trained on."""
        if self.statistics:
            return _dequantise(self.stored, self.statistics)
        return round_to_nf4(self.stored.load()) if self.round_to_nf4 else self.stored.load()


def merge_adapter(
    base_folder: Path,
    adapter_folder: Path,
    out_folder: Path,
    *,
    strength: float = 1.0,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    weights: Weights = "original",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MergeResult:
    """Write the base model with `strength * scale * B @ A` added to every matrix that the adapter names.

    The sums are done in float32 and rounded once. Tensors that nothing changes are copied byte for byte. The folder
    appears under its name only when it is complete.

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
        progress: called with bytes done and bytes in all, after each tensor.

    Raises:
        ExportError: base, adapter or folder cannot be used, or a merged value is not finite.
        DiskSpaceError: not enough room for the result.
    """
    if not math.isfinite(strength):
        raise ExportError(f"The adapter strength must be a finite number, not {strength}.")
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ExportError(f"Weights cannot be written as {dtype}.", "Use bfloat16, float16 or float32.")
    config = checkpoint.read_json(base_folder / "config.json")
    shards = read_sources(checkpoint.read_checkpoint(base_folder), config, weights)
    sources = {source.stored.name: source for shard in shards for source in shard}
    updates = read_adapter(adapter_folder)
    _check_targets(updates, sources, config)
    matrix_dtype = dtype or _matrix_dtype(sources)
    # A 16-bit checkpoint keeps the type of each tensor: some norms are stored in float32 on purpose.
    uniform = dtype or (None if _matrix_dtype(sources, raw=True) == matrix_dtype else matrix_dtype)
    planned = [
        [_plan(source, updates.get(source.stored.name), strength, uniform) for source in shard] for shard in shards
    ]
    divided = [part for shard in planned for part in _divide(shard, max_shard_bytes)]
    total = sum(tensor.size for shard in divided for tensor in shard)
    copies = [base_folder / name for name in COPIED if (base_folder / name).is_file()]
    # The headers, the index and the configuration are small beside this allowance.
    checkpoint.require_space(out_folder, total + sum(path.stat().st_size for path in copies) + (1 << 24))
    done = 0

    def written(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    with checkpoint.published(out_folder, _is_ours) as temporary:
        for path in copies:
            checkpoint.copy_file(path, temporary / path.name)
        checkpoint.write_text(temporary / "config.json", _config_text(config, matrix_dtype))
        files = checkpoint.write_shards(temporary, divided, written)
    return MergeResult(out_folder, tuple(files), len(sources), len(updates), total, matrix_dtype, strength, weights)


def read_adapter(folder: Path) -> dict[str, Update]:
    """Read a LoRA adapter.

    Returns:
        The update of each matrix, by the matrix's key in the base checkpoint.

    Raises:
        ExportError: not a plain LoRA adapter, or its tensors are incomplete, of wrong shape, or not finite.
    """
    config = checkpoint.read_json(folder / "adapter_config.json")
    _check_adapter_config(folder, config)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ExportError(f"{folder} holds no adapter_model.safetensors.", "Save the adapter as safetensors.")
    factors: dict[str, dict[str, Tensor]] = {}
    unknown, broken = [], []
    for stored in checkpoint.read_shard(file):
        match = _FACTOR.fullmatch(stored.name)
        if match is None:
            unknown.append(stored.name)
            continue
        factor = stored.load().float()
        if not checkpoint.is_finite(factor):
            broken.append(stored.name)
        factors.setdefault(match[1], {})[match[2]] = factor
    if unknown:
        raise ExportError(f"The adapter holds {few(unknown)}, which cannot be merged.", "Only LoRA A and B can.")
    if broken:
        raise ExportError(f"The adapter holds NaN or infinite values in {few(broken)}.", "Train again, more gently.")
    if not factors:
        raise ExportError(f"The adapter in {folder} is empty.")
    return {f"{module}.weight": _update(module, pair, config) for module, pair in factors.items()}


def read_sources(base: Checkpoint, config: Mapping[str, Any], weights: Weights) -> list[list[Source]]:
    """The base's tensors in their shards, with how to read each: 4-bit weights together with their statistics.

    Args:
        base: the base checkpoint.
        config: its configuration.
        weights: see `merge_adapter`.

    Raises:
        ExportError: the base is quantised in a way that this merge cannot read, or `weights` asks for what it lacks.
    """
    statistics: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in base.tensors.items():
        if match := _STATISTIC.fullmatch(name):
            statistics.setdefault(match[1], {})[match[2]] = stored
    quantisation = config.get("quantization_config")
    if quantisation is not None and not statistics:
        method = quantisation.get("quant_method", "some way") if isinstance(quantisation, dict) else "some way"
        raise ExportError(
            f"{base.folder} is quantised ({method}), and this merge reads only 16-bit and bitsandbytes 4-bit weights.",
            "Give the folder of the original 16-bit model.",
        )
    if statistics and weights == "original":
        raise ExportError(
            f"{base.folder} holds 4-bit weights, not the original ones.",
            'Use weights = "dequantised", or give the folder of the original 16-bit model.',
        )
    if lost := sorted(statistics.keys() - base.tensors.keys()):
        raise ExportError(f"The 4-bit weights {few(lost)} are missing.", "Download the model again.")
    rounded = quantised_weights(base.folder) if weights == "dequantised" and not statistics else frozenset()
    if absent := sorted(rounded - base.tensors.keys()):
        raise ExportError(f"The base model lacks {few(absent)}.", "Its 4-bit form cannot be rebuilt; merge originals.")
    shards = [
        [
            _source(stored, statistics.get(stored.name, {}), stored.name in rounded)
            for stored in shard
            if not _STATISTIC.fullmatch(stored.name)
        ]
        for shard in base.shards
    ]
    return [shard for shard in shards if shard]


def quantised_weights(folder: Path) -> frozenset[str]:
    """The weights that transformers turns to 4-bit when it loads this model: all linear layers but the LM head.

    Args:
        folder: a model folder; only its configuration is read, and no weight is allocated.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    head = model.get_output_embeddings()
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and module is not head
    )


def round_to_nf4(weight: Tensor) -> Tensor:
    """What a matrix holds once it was loaded as double-quantised NF4 with bfloat16 compute: same shape, bfloat16."""
    import bitsandbytes.functional as functional

    packed, state = functional.quantize_4bit(
        weight.to(torch.bfloat16), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    rounded: Tensor = functional.dequantize_4bit(packed, state)
    return rounded


def _dequantise(stored: StoredTensor, statistics: Mapping[str, StoredTensor]) -> Tensor:
    import bitsandbytes.functional as functional

    try:
        parts = {name: part.load() for name, part in statistics.items()}
        state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        values: Tensor = functional.dequantize_4bit(stored.load(), state)
    except (ValueError, KeyError, TypeError, AssertionError, AttributeError) as error:
        raise ExportError(f"The 4-bit weight {stored.name} cannot be read: {error}.") from error
    return values


def _source(stored: StoredTensor, statistics: Mapping[str, StoredTensor], rounded: bool) -> Source:
    """How to read one tensor; the true shape of a 4-bit weight is in its packed statistics."""
    if not statistics:
        return Source(stored, "BF16" if rounded else stored.dtype, stored.shape, round_to_nf4=rounded)
    packed = next((part for name, part in statistics.items() if name.startswith("quant_state.")), None)
    if packed is None:
        raise ExportError(f"The 4-bit weight {stored.name} has no quantisation state.", "Download the model again.")
    try:
        state = json.loads(bytes(packed.load().tolist()))
        dtype, shape = DTYPE_NAMES[getattr(torch, state["dtype"])], tuple(int(size) for size in state["shape"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"The quantisation state of {stored.name} cannot be read: {error}.") from error
    return Source(stored, dtype, shape, statistics)


def _check_adapter_config(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ExportError(f"{folder} holds a {config.get('peft_type')} adapter.", "Only LoRA adapters can be merged.")
    found = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append(f'bias = "{config["bias"]}"')
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        found.append(f'init_lora_weights = "{start}"')
    if found:
        raise ExportError(
            f"The adapter in {folder} uses {', '.join(found)}, which this merge cannot reproduce.",
            "Train without it, or merge with peft.",
        )


def _update(module: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> Update:
    """One matrix's factors with their scale, where the first pattern that fits the module's name wins, as in peft."""
    if missing := {"A", "B"} - pair.keys():
        raise ExportError(f"The adapter lacks lora_{missing.pop()} for {module}.", "Save the adapter again.")

    def setting(patterns: str, default: str) -> float:
        for pattern, value in (config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        return float(config[default])

    try:
        rank, alpha = setting("rank_pattern", "r"), setting("alpha_pattern", "lora_alpha")
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise ExportError(f"The adapter's configuration names no rank or alpha for {module}: {error}.") from error
    down, up = pair["A"], pair["B"]
    if down.ndim != 2 or up.ndim != 2 or not down.shape[0] == up.shape[1] == rank:
        raise ExportError(
            f"The adapter for {module} has shapes {tuple(down.shape)} and {tuple(up.shape)}, "
            f"which do not fit its rank {rank:g}.",
            "Check that adapter_config.json belongs to these weights.",
        )
    return Update(down, up, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _check_targets(updates: Mapping[str, Update], sources: Mapping[str, Source], config: Mapping[str, Any]) -> None:
    """Every update must have a matrix of its own, of the right shape."""
    if unused := sorted(updates.keys() - sources.keys()):
        raise ExportError(
            f"The adapter changes {few(unused)}, which the base model does not hold.",
            "Check that the adapter was trained on this base model.",
        )
    ends = ("embed_tokens.weight", "lm_head.weight")
    if config.get("tie_word_embeddings") and (tied := [name for name in updates if name.endswith(ends)]):
        raise ExportError(f"The adapter changes {few(tied)}, which this model shares between input and output.")
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


def _plan(source: Source, update: Update | None, strength: float, uniform: torch.dtype | None) -> NewTensor:
    """What to write for one tensor of the base: its own bytes, or its new values."""
    stored = source.stored
    dtype = DTYPE_NAMES[uniform] if uniform is not None and source.dtype in FLOATS else source.dtype
    update = None if update is None or strength == 0 else replace(update, scale=update.scale * strength)
    if update is None and dtype == stored.dtype and not source.statistics and not source.round_to_nf4:
        return NewTensor(stored.name, dtype, stored.shape, stored.size, stored.chunks)
    size = math.prod(source.shape) * DTYPES[dtype].itemsize
    return NewTensor(stored.name, dtype, source.shape, size, partial(_values, source, update, DTYPES[dtype]))


def _values(source: Source, update: Update | None, dtype: torch.dtype) -> Iterator[memoryview]:
    values = source.load()
    if update is not None:
        values = values.float().addmm_(update.up, update.down, alpha=update.scale)
    values = values.to(dtype)
    if not checkpoint.is_finite(values):
        raise ExportError(
            f"{source.stored.name} holds values that {dtype} cannot express.", "Use bfloat16, or a lower strength."
        )
    yield checkpoint.tensor_bytes(values)


def _divide(shard: list[NewTensor], max_bytes: int | None) -> Iterator[list[NewTensor]]:
    """Split one shard's tensors, in order, into parts of at most `max_bytes` (a larger tensor gets its own part)."""
    part: list[NewTensor] = []
    for tensor in shard:
        if part and max_bytes is not None and sum(other.size for other in part) + tensor.size > max_bytes:
            yield part
            part = []
        part.append(tensor)
    yield part


def _config_text(config: Mapping[str, Any], dtype: torch.dtype) -> str:
    """The base's configuration without a trace of quantisation, and with the type that the weights really have."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    for key in [key for key in ("dtype", "torch_dtype") if key in plain] or ["dtype"]:
        plain[key] = str(dtype).removeprefix("torch.")
    return json.dumps(plain, indent=2, ensure_ascii=False) + "\n"


def _is_ours(name: str) -> bool:
    fixed = (*COPIED, "config.json", checkpoint.WEIGHTS, checkpoint.INDEX)
    return name in fixed or _SHARD.fullmatch(name) is not None

"""The base model's tensors and how to read each: 16-bit weights, 4-bit ones, and 16-bit ones as 4-bit holds them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from safesteer_lite.errors import ExportError
from safesteer_lite.export.weights.shards import DTYPE_NAMES, Checkpoint, StoredTensor
from safesteer_lite.sources.folder import few

Weights = Literal["original", "dequantised"]
BLOCK_VALUES = 1 << 22
"""Values of a matrix that are read at a time."""

_STATISTIC = re.compile(
    r"(.+\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)"
)


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

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The values that the adapter was trained on, some rows at a time, each with the number of its first row.

        16-bit weights are read from the disk as they are asked for. 4-bit ones share statistics over the whole matrix,
        which is therefore held while its blocks are handed out.
        """
        rows = max(BLOCK_VALUES // max(math.prod(self.shape[1:]), 1), 1)
        if len(self.shape) < 2 or self.shape[0] <= rows:
            yield 0, self._whole()
            return
        whole = self._whole() if self.statistics or self.round_to_nf4 else None
        for first in range(0, self.shape[0], rows):
            count = min(rows, self.shape[0] - first)
            yield first, self.stored.load_rows(first, count) if whole is None else whole[first : first + count]

    def _whole(self) -> Tensor:
        if self.statistics:
            return _dequantise(self.stored, self.statistics)
        return round_to_nf4(self.stored.load()) if self.round_to_nf4 else self.stored.load()


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
    if quantisation and not statistics:
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
    rounded = quantised_weights(config) if weights == "dequantised" and not statistics else frozenset()
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


def empty_model(config: Mapping[str, Any]) -> Any:
    """The transformers model that a config.json describes, without memory for its weights.

    Args:
        config: the contents of config.json.

    Raises:
        ExportError: it describes no model that transformers knows.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), trust_remote_code=False)
    except Exception as error:  # A library that builds what somebody else described may raise anything.
        said = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
        raise ExportError(
            f"config.json does not describe a model that can be built: {said}.",
            "Check that this is the right, completely downloaded folder.",
        ) from error


def quantised_weights(config: Mapping[str, Any]) -> frozenset[str]:
    """The weights that transformers turns to 4-bit when it loads this model: all linear layers but the LM head.

    Args:
        config: the contents of its config.json; no weight is allocated.
    """
    model = empty_model(config)
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

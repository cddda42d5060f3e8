"""A model's need: the memory and the disk that a run takes, in bytes, from the model's shape alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from safesteer_lite.hardware.peaks import Demand, adapter_bytes, kl_bytes, work_bytes
from safesteer_lite.hardware.shape import ModelShape, adapter_parameters, linear_parameters, parameters

Precision = Literal["nf4", "bf16", "fp32"]


# NF4 with double quantisation: 4 bits a weight, 8 bits a block of 64, 32 bits a group of 256 blocks.
_NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)


@dataclass(frozen=True)
class Need:
    """Bytes a run takes.

    Attributes:
        weights_bytes: the loaded model alone.
        memory_bytes: stage name to its peak, in VRAM on a GPU and in RAM on a CPU.
        disk_bytes: download, merged model, and two checkpoints of the adapter with its optimizer states.
    """

    weights_bytes: int
    memory_bytes: Mapping[str, int]
    disk_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The peak of the hungriest stage."""
        return max(self.memory_bytes.values())


def weights_bytes(shape: ModelShape, precision: Precision, unpacked: bool, element: int = 2) -> int:
    """The loaded weights.

    Packed NF4: 4.127 bits for each linear weight, 2 bytes for the rest (embeddings, LM head, norms, biases).
    Otherwise `element` bytes for every parameter, 4 for `fp32`.

    Args:
        shape: the model.
        precision: how it is loaded.
        unpacked: whether NF4 weights are expanded after loading.
        element: bytes of a number in the compute dtype, 2 or 4.
    """
    if precision == "nf4" and not unpacked:
        linear = linear_parameters(shape)
        return math.ceil(linear * _NF4_BITS / 8) + 2 * (parameters(shape) - linear)
    return parameters(shape) * (4 if precision == "fp32" else element)


def largest_micro_batch(most: int, free: int, bytes_for: Callable[[int], int]) -> int:
    """The most rollouts a forward, at least 1, whose need is within 90 % of the free memory.

    Args:
        most: as configured.
        free: bytes.
        bytes_for: what a micro-batch of so many rollouts takes, `training_bytes`.
    """
    fits = (size for size in range(most, 1, -1) if bytes_for(size) <= 0.9 * free)
    return next(fits, 1)


def estimate(
    shape: ModelShape,
    *,
    precision: Precision,
    unpacked: bool,
    demand: Demand,
    sequences: int,
    prompt_tokens: int,
    micro_batch: int,
    compute_dtype: str = "bf16",
    checkpointing: bool = False,
) -> Need:
    """What a run will take, from the shape alone.

    Weights as in `weights_bytes`; packed 4-bit weights need room for the largest linear layer unpacked, as CUDA unpacks it.
    Beside them a stage has its largest piece of work, and the last two the adapter. Export is done in RAM, a tensor at a
    time while it merges (10 bytes a linear weight: 16-bit in, float32 sum and update), and a block, or the embedding,
    at a time when it checks. CUDA's own context (about 0.5 GB) and the program itself are not counted.

    Args:
        shape: the model.
        precision: `nf4`, `bf16` or `fp32`.
        unpacked: whether NF4 weights are expanded after loading.
        demand: what the settings ask for.
        sequences: sampled, or read without gradient, at a time.
        prompt_tokens: longest prompt.
        micro_batch: sequences of one training forward.
        compute_dtype: `bf16` or `fp32`.
        checkpointing: whether blocks are recomputed in backward.
    """
    element = 4 if "fp32" in (precision, compute_dtype) else 2
    weights = weights_bytes(shape, precision, unpacked, element)
    largest_linear = max(inputs * outputs for inputs, outputs in shape.linears.values())
    loaded = weights + (largest_linear * element if precision == "nf4" and not unpacked else 0)
    work = work_bytes(
        shape,
        demand,
        sequences=sequences,
        prompt_tokens=prompt_tokens,
        micro_batch=micro_batch,
        element=element,
        checkpointing=checkpointing,
    )
    held = {
        "distill": adapter_bytes(shape, demand, element),
        "evaluate": element * adapter_parameters(shape, demand.rank),
    }
    stages = {name: loaded + held.get(name, 0) + most for name, most in work.items()}
    checked = element * shape.vocabulary * shape.width + kl_bytes(shape, demand)
    stages["export"] = max(checked, 10 * largest_linear)
    published = parameters(shape) * (4 if shape.dtype == "float32" else 2)
    return Need(weights, stages, published + 2 * parameters(shape) + 2 * 12 * adapter_parameters(shape, demand.rank))

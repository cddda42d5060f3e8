"""A model's need: the memory and the disk that a run takes, in bytes, from the model's shape alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

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


def cache_bytes(shape: ModelShape, sequences: int, tokens: int, element: int) -> int:
    """Key-value cache: 2 * layers * kv_heads * head_dim * tokens * sequences numbers.

    One layer's share is added, because a layer's tables are copied when they grow.
    """
    return 2 * (shape.layers + 1) * shape.kv_heads * shape.head_dim * tokens * sequences * element


def layer_activation_bytes(shape: ModelShape, tokens: int, rank: int, element: int) -> int:
    """What one block keeps for backward, with frozen weights, LoRA everywhere and fused attention.

    A token keeps in the compute dtype: the two normed inputs (2 width), queries, expanded keys and values, and the
    attention output (4 heads * head_dim), gate, its activation, up and their product (4 intermediate), and rank numbers
    for each of seven adapters; and width float32 numbers for each norm.

    Args:
        shape: the model.
        tokens: in the whole micro-batch, padding included.
        rank: LoRA r, 0 for none.
        element: bytes of a number in the compute dtype.
    """
    numbers = 2 * shape.width + 4 * shape.heads * shape.head_dim + 4 * shape.intermediate + 7 * rank
    return tokens * (numbers * element + 4 * shape.block_norms * shape.width)


def activation_bytes(shape: ModelShape, tokens: int, rank: int, element: int, checkpointing: bool) -> int:
    """What a micro-batch keeps for backward.

    Without gradient checkpointing every block's `layer_activation_bytes`; with it, every block's input (width numbers a
    token) and one block's activations, which are computed again in backward.
    """
    block = layer_activation_bytes(shape, tokens, rank, element)
    return shape.layers * tokens * shape.width * element + block if checkpointing else shape.layers * block


def training_bytes(
    shape: ModelShape,
    *,
    micro_batch: int,
    tokens: int,
    completion_tokens: int,
    chunk: int,
    rank: int,
    element: int,
    checkpointing: bool,
) -> int:
    """What one training micro-batch takes besides weights and adapter: `activation_bytes`, the final hidden states of
    both policies, and eleven float32 rows of logits for each position of a chunk.

    Args:
        shape: the model.
        micro_batch: sequences.
        tokens: longest sequence, prompt and completion.
        completion_tokens: longest completion.
        chunk: positions whose logits exist at a time.
        rank: LoRA r.
        element: bytes of a number in the compute dtype.
        checkpointing: whether blocks are recomputed in backward.
    """
    hidden = 2 * micro_batch * tokens * shape.width * element
    divergence = 11 * min(chunk, micro_batch * completion_tokens) * 4 * shape.vocabulary
    return activation_bytes(shape, micro_batch * tokens, rank, element, checkpointing) + hidden + divergence


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
    rank: int,
    rollouts: int,
    prompt_tokens: int,
    completion_tokens: int,
    micro_batch: int,
    chunk: int,
    compute_dtype: str = "bf16",
    checkpointing: bool = False,
) -> Need:
    """What a run will take, from the shape alone.

    Weights as in `weights_bytes`; packed 4-bit weights need room for the largest linear layer unpacked. Then, either:

    - sampling: `cache_bytes`, three float32 rows of logits a sequence, and one block at work on the prompts;
    - training: `training_bytes` (its eleven rows of logits a position were measured for the full-vocabulary objective;
      the sliced ones take 6 to 7).

    The adapter takes 16 bytes a weight: float32 value and gradient, and AdamW's two moments. Export streams tensors, so
    the largest one counts: 2 bytes an embedding value (copied), 10 bytes a linear weight (16-bit in, float32 sum and
    update). CUDA's own context (about 0.5 GB) and the program itself are not counted.

    Args:
        shape: the model.
        precision: `nf4`, `bf16` or `fp32`.
        unpacked: whether NF4 weights are expanded after loading.
        rank: LoRA r.
        rollouts: sequences sampled, or read without gradient, at a time.
        prompt_tokens, completion_tokens: longest prompt and completion, tokens.
        micro_batch: sequences of one training forward.
        chunk: positions whose logits exist at a time.
        compute_dtype: `bf16` or `fp32`.
        checkpointing: whether blocks are recomputed in backward.
    """
    element = 4 if "fp32" in (precision, compute_dtype) else 2
    weights = weights_bytes(shape, precision, unpacked, element)
    largest_linear = max(inputs * outputs for inputs, outputs in shape.linears)
    loaded = weights + (largest_linear * element if precision == "nf4" and not unpacked else 0)
    logits_row, tokens = 4 * shape.vocabulary, prompt_tokens + completion_tokens
    reading = layer_activation_bytes(shape, rollouts * prompt_tokens, 0, element)
    sampling = cache_bytes(shape, rollouts, tokens, element) + 3 * rollouts * logits_row + reading
    divergence = 11 * min(chunk, rollouts * completion_tokens) * logits_row
    training = training_bytes(
        shape,
        micro_batch=micro_batch,
        tokens=tokens,
        completion_tokens=completion_tokens,
        chunk=chunk,
        rank=rank,
        element=element,
        checkpointing=checkpointing,
    )
    adapter = 16 * adapter_parameters(shape, rank)
    stages = {
        "baseline": loaded + sampling,
        "direction": loaded + reading + 3 * rollouts * logits_row,
        "tokens": loaded + sampling + divergence,
        "distill": loaded + adapter + max(sampling, training),
        "evaluate": loaded + adapter // 4 + sampling,
        "export": max(2 * shape.vocabulary * shape.width, 10 * largest_linear),
    }
    published = parameters(shape) * (4 if shape.dtype == "float32" else 2)
    return Need(weights, stages, published + 2 * parameters(shape) + 2 * 12 * adapter_parameters(shape, rank))

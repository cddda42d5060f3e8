"""The peaks of a run: the memory that each piece of its work takes beside the weights, in bytes, from the model's shape alone.

Each formula was held against the bytes of the tensors that the real code has alive at a time (tests/hardware/test_peaks.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from safesteer_lite.config import RunConfig
from safesteer_lite.hardware.shape import ModelShape, adapter_parameters

# Tokens by which a key-value cache is longer than what it holds, and the tokens of harmless text that reading directions
# are computed from, at most: models/cache_layer.py and models/reading.py.
_CACHE_ROOM, _READING_TOKENS = 32, 3000
# Float32 rows of logits alive at once for each position of a chunk: of the loss on the whole vocabulary and of those on some
# tokens, of the KL that is measured, and of the vote, half of whose are float64 and count twice.
_FULL_LOSS_ROWS, _SLICED_LOSS_ROWS, _KL_ROWS, _VOTE_ROWS = 7, 6, 5, 9
# Tokens of the answers along which KL is measured.
_KL_TOKENS = 48


@dataclass(frozen=True)
class Demand:
    """What of a run's settings decides how much memory it takes at least; the defaults are those of the recipe `lite`.

    Attributes:
        rank: LoRA r.
        depth_start: share of the blocks without an adapter.
        reading: whether what the adapter reads is computed beforehand and frozen.
        averaging: whether a running average of the weights is kept.
        full_loss: whether a loss reads the whole vocabulary.
        rollouts: of a prompt, which are sampled together.
        completion_tokens: longest rollout.
        samples, horizon: continuations of a prompt that vote for safety tokens, and positions of each.
        answer_tokens: longest answer that is judged.
        thinking_tokens: longest thought before an answer; 0 where the model does not think.
        chunk: positions whose logits exist at a time.
        checkpointing: whether blocks are recomputed in the backward pass: `auto` (on a card), `yes` or `no`.
    """

    rank: int = 8
    depth_start: float = 0.33
    reading: bool = True
    averaging: bool = True
    full_loss: bool = False
    rollouts: int = 1
    completion_tokens: int = 4
    samples: int = 1
    horizon: int = 4
    answer_tokens: int = 96
    thinking_tokens: int = 0
    chunk: int = 64
    checkpointing: str = "auto"

    @staticmethod
    def of(settings: RunConfig) -> Demand:
        """What a run's settings ask for."""
        distill, tokens = settings.distill, settings.tokens
        return Demand(
            rank=distill.rank,
            depth_start=distill.depth_start,
            reading=distill.reading == "discriminant",
            averaging=distill.averaging > 0,
            full_loss="full" in (distill.objective, distill.anchor_objective if distill.anchors else "")
            or (settings.model.thinking == "on" and distill.anchors > 0),
            rollouts=distill.rollouts,
            completion_tokens=distill.completion_tokens,
            samples=tokens.samples,
            horizon=tokens.horizon,
            answer_tokens=settings.evaluate.answer_tokens,
            thinking_tokens=settings.model.thinking_tokens if settings.model.thinking == "on" else 0,
            chunk=distill.chunk,
            checkpointing=distill.checkpointing,
        )

    def recomputes(self, device: str) -> bool:
        """Whether blocks are recomputed in the backward pass on `cuda` or `cpu`."""
        return self.checkpointing == "yes" or (self.checkpointing == "auto" and device == "cuda")


LITE = Demand()
"""The recipe `lite`, with which most people run."""


def cache_bytes(shape: ModelShape, sequences: int, tokens: int, element: int) -> int:
    """Keys and values of `tokens` places: 2 * layers * kv_heads * head_dim numbers for each place of each sequence."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * tokens * sequences * element


def block_bytes(shape: ModelShape, sequences: int, tokens: int, element: int, *, adapted: bool = False) -> int:
    """One block at work without gradient, in its MLP, where it takes most, or at products of attention that no kernel fuses.

    A token has in the compute dtype: the residual stream at the embedding, the block's input and behind its attention, and
    the normed input (4 width), gate, up and their product (3 intermediate, and one more where gate and up are one layer),
    one more of these where an adapter's share is added (two), and cosine and sine of its position (2 head_dim).

    Args:
        shape: the model.
        sequences, tokens: of the batch, padding included.
        element: bytes of a number in the compute dtype.
        adapted: whether adapters are on.
    """
    wide = 4 + 2 * adapted if shape.fused else 3 + adapted
    mlp = sequences * tokens * (4 * shape.width + wide * shape.intermediate) * element
    attention = (
        sequences * tokens * (3 * shape.width + (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim) * element
    )
    attention += products(shape, sequences, tokens) * (element + 8)
    places = sequences * tokens * 2 * shape.head_dim * element
    return max(mlp, attention) + places + mask_bytes(shape, sequences, tokens, element)


def products(shape: ModelShape, sequences: int, tokens: int) -> int:
    """Numbers that one block's attention holds at a time for each pair of tokens: none where a kernel fuses them."""
    return sequences * shape.heads * tokens * tokens if shape.softcapped else 0


def mask_bytes(shape: ModelShape, sequences: int, tokens: int, element: int) -> int:
    """The attention mask of each kind of blocks, once for each query head that shares a key head."""
    return shape.kinds * sequences * shape.heads // shape.kv_heads * tokens * tokens * element


def sampling_bytes(shape: ModelShape, sequences: int, prompt: int, completion: int, element: int) -> int:
    """What it takes to sample: one block at work on the prompts beside a cache for them, or the cache of everything, one
    layer of it twice, because it is copied when it grows, and three float32 rows of logits a sequence.

    Args:
        shape: the model.
        sequences: sampled at a time.
        prompt, completion: longest, tokens.
        element: bytes of a number in the compute dtype.
    """
    first = prompt + _CACHE_ROOM
    grown = first + (_CACHE_ROOM + 1) * max(0, math.ceil((completion - 1 - _CACHE_ROOM) / (_CACHE_ROOM + 1)))
    reading = cache_bytes(shape, sequences, first, element) + block_bytes(shape, sequences, prompt, element)
    whole = cache_bytes(shape, sequences, grown, element)
    writing = whole + max(whole // shape.layers, 3 * sequences * 4 * shape.vocabulary)
    return max(reading, writing)


def reading_bytes(shape: ModelShape, sequences: int, tokens: int, element: int) -> int:
    """What it takes to compute what the adapter reads: one block at work that keeps what its linear layers read, or the
    activations and the products of them that one layer's directions are solved from, in float32.

    Args:
        shape: the model.
        sequences, tokens: of a batch of prompts with the first words of their answers.
        element: bytes of a number in the compute dtype.
    """
    widths = (shape.width, shape.heads * shape.head_dim, shape.intermediate)
    solving = (solving_bytes(_READING_TOKENS, width) for width in widths)
    return max(kept_block_bytes(shape, sequences, tokens, element), *solving)


def kept_block_bytes(shape: ModelShape, sequences: int, tokens: int, element: int) -> int:
    """`block_bytes` where what its linear layers read is kept: beside what is there at its peak, the inputs of the first three
    (width) and of the fourth (heads * head_dim)."""
    kept = sequences * tokens * (shape.width + shape.heads * shape.head_dim) * element
    return block_bytes(shape, sequences, tokens, element) + kept


def solving_bytes(tokens: int, width: int) -> int:
    """`method.discriminant.reading_directions`: (tokens, width) activations in float32, arriving in 16 bits, and a square
    matrix of the smaller of the two sizes with its factors."""
    return max(6 * tokens * width, 4 * tokens * width + 8 * min(tokens, width) ** 2)


def layer_activation_bytes(shape: ModelShape, demand: Demand, tokens: int, element: int) -> int:
    """What one block keeps for backward, with frozen weights, LoRA everywhere and fused attention.

    A token keeps in the compute dtype: queries and what attention made of them (2 heads * head_dim), keys and values
    (2 kv_heads * head_dim), gate, its activation and up (3 intermediate), and rank numbers for each adapter; and what each
    norm reads, in float32: width numbers, or where queries and keys have norms theirs ((heads + kv_heads) * head_dim).
    Where A matrices are trained these need their inputs again: the two normed ones (2 width), the copy of what attention
    made (heads * head_dim), and the product within the MLP (intermediate). Where one layer makes queries, keys and values
    all it made is kept with the values, which are a part of it.

    Args:
        shape: the model.
        demand: what the settings ask for.
        tokens: in the whole micro-batch, padding included.
        element: bytes of a number in the compute dtype.
    """
    attention = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    numbers = attention + 3 * shape.intermediate + len(shape.linears) * demand.rank
    if not demand.reading:
        numbers += 2 * shape.width + shape.heads * shape.head_dim + shape.intermediate
    if shape.fused:
        numbers += (shape.heads + shape.kv_heads) * shape.head_dim
    normed = shape.block_norms * shape.width + shape.head_norms * (shape.heads + shape.kv_heads) * shape.head_dim
    return tokens * (numbers * element + 4 * normed)


def training_bytes(
    shape: ModelShape,
    demand: Demand,
    *,
    micro_batch: int,
    tokens: int,
    completion_tokens: int,
    element: int,
    checkpointing: bool,
) -> int:
    """What one training micro-batch takes besides weights and adapter.

    Kept for backward are, with gradient checkpointing, every adapted block's input, else every adapted block's
    `layer_activation_bytes`. To these come first both policies' final hidden states, what the norm before them keeps, those
    at the answers' positions and the gradient there, and the rows of logits of a chunk; later, for one block, its
    activations if it is computed again, with what attention keeps of its products where no kernel fuses them and the
    product within the MLP, which is still there, and the gradients within it (2 intermediate, width, and 2 head_dim of
    positions). Where one layer makes gate and up the most is there later, when that product is gone and the gradient of
    either half is as wide as both (4 intermediate).

    Args:
        shape: the model.
        demand: what the settings ask for.
        micro_batch: sequences.
        tokens: longest sequence, prompt and completion.
        completion_tokens: longest completion.
        element: bytes of a number in the compute dtype.
        checkpointing: whether blocks are recomputed in backward.
    """
    every, answers = micro_batch * tokens, micro_batch * completion_tokens
    block = layer_activation_bytes(shape, demand, every, element)
    block += products(shape, micro_batch, tokens) * (2 * element + 4)
    kept = adapted_layers(shape, demand) * (every * shape.width * element if checkpointing else block)
    rows = _FULL_LOSS_ROWS if demand.full_loss else _SLICED_LOSS_ROWS
    divergence = rows * min(demand.chunk, answers) * 4 * shape.vocabulary
    ends = every * shape.width * (2 * element + 4) + 3 * answers * shape.width * element
    product = every * shape.intermediate * element
    within = 2 * product + every * (shape.width + 2 * shape.head_dim) * element
    if shape.fused:
        within += (2 if demand.reading else 1) * product
    elif demand.reading and checkpointing:
        within += product
    backward = within + (block if checkpointing else 0)
    return kept + mask_bytes(shape, micro_batch, tokens, element) + max(ends + divergence, backward)


def adapter_bytes(shape: ModelShape, demand: Demand, element: int) -> int:
    """The adapter and its training: the weights in the compute dtype; and in float32, of those that are trained, the sum of the
    gradients, a copy, AdamW's two moments, what it takes beside them while it updates, and the running average."""
    adapted = adapted_layers(shape, demand) / shape.layers
    trained = sum(outputs + (0 if demand.reading else inputs) for inputs, outputs in shape.linears.values())
    every = sum(inputs + outputs for inputs, outputs in shape.linears.values())
    weights = adapted * adapter_parameters(shape, demand.rank)
    return round(weights * (element + trained / every * 4 * (5 + demand.averaging)))


def adapted_layers(shape: ModelShape, demand: Demand) -> int:
    """How many blocks have an adapter, at least one."""
    return shape.layers - min(shape.layers - 1, round(demand.depth_start * shape.layers))


def kl_bytes(shape: ModelShape, demand: Demand) -> int:
    """The rows of logits from which KL is measured."""
    return _KL_ROWS * demand.chunk * 4 * shape.vocabulary


def vote_bytes(shape: ModelShape, demand: Demand) -> int:
    """The rows of logits that vote for safety tokens."""
    return _VOTE_ROWS * demand.chunk * 4 * shape.vocabulary


def work_bytes(
    shape: ModelShape,
    demand: Demand,
    *,
    sequences: int,
    prompt_tokens: int,
    micro_batch: int,
    element: int,
    checkpointing: bool,
) -> dict[str, int]:
    """The largest piece of work of each stage on the device, by its name; arguments as `need.estimate` has them."""
    # What is judged is a thought with its answer; everything else is read behind a thought that stands in the prompt.
    answers = sampling_bytes(shape, sequences, prompt_tokens, demand.thinking_tokens + demand.answer_tokens, element)
    prompt_tokens += demand.thinking_tokens

    voting = block_bytes(shape, max(sequences, demand.samples), prompt_tokens + demand.horizon, element)
    measuring = max(
        block_bytes(shape, sequences, prompt_tokens + _KL_TOKENS, element, adapted=True), kl_bytes(shape, demand)
    )
    training = training_bytes(
        shape,
        demand,
        micro_batch=micro_batch,
        tokens=prompt_tokens + demand.completion_tokens,
        completion_tokens=demand.completion_tokens,
        element=element,
        checkpointing=checkpointing,
    )
    rollouts = sampling_bytes(shape, max(sequences, demand.rollouts), prompt_tokens, demand.completion_tokens, element)
    reading = reading_bytes(shape, sequences, prompt_tokens, element) if demand.reading else 0
    scores = 3 * sequences * 4 * shape.vocabulary
    return {
        "baseline": answers,
        "direction": block_bytes(shape, sequences, prompt_tokens, element) + scores,
        "tokens": max(voting, vote_bytes(shape, demand)),
        "distill": max(training, measuring, rollouts, reading),
        "evaluate": max(answers, measuring),
    }

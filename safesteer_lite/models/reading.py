"""Give a fresh adapter the reading directions of `method.discriminant`, block by block, from the base's activations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from safesteer_lite.errors import ModelError
from safesteer_lite.method.discriminant import RunningMean, reading_directions
from safesteer_lite.method.memory import fitting
from safesteer_lite.method.policies import Batch, Completions, Residual, base
from safesteer_lite.models.adapter import freeze_reading
from safesteer_lite.models.assistant import Done, Policy, ignore
from safesteer_lite.models.loaded import PlainModel
from safesteer_lite.prompts.contexts import Conversation

# Activations of harmless text that a second moment is taken of, at most: the inverse is taken in a space of at most this
# many dimensions. The rows in docs/research/log.md used this many; no other number was tried.
_TOKENS = 3000

Modules = tuple[nn.Module, ...]
"""Linear layers that read the same input."""

_CPU = torch.device("cpu")


@dataclass
class _Text:
    """One batch of prompts with the first words of the base's answers, on its way up through the blocks.

    Attributes:
        residual: where it stands, on the CPU while other batches are at work.
        mask: (batch, length) bool, the tokens that a batch has of its own.
        sampled: (batch, length) bool, those of them that the second moment is taken of.
    """

    residual: Residual
    mask: Tensor
    sampled: Tensor


@dataclass
class _Read:
    """What linear layers with the same input have read in one block.

    Attributes:
        harmful: (prompts, positions, width) at the last positions of harmful prompts, a batch each, in the compute dtype
            on the CPU.
        harmless: the mean of the same over harmless prompts.
        tokens: (tokens, width) at sampled positions of harmless text, a batch each, in the compute dtype on the CPU.
    """

    harmful: list[Tensor] = field(default_factory=list)
    harmless: RunningMean = field(default_factory=RunningMean)
    begun_harmful: list[Tensor] = field(default_factory=list)
    begun_harmless: RunningMean = field(default_factory=RunningMean)
    tokens: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def read_discriminants(
    policy: Policy,
    harmful: Sequence[str | Conversation],
    harmless: Sequence[str | Conversation],
    ridge: float,
    size: int,
    done: Done = ignore,
    begun: tuple[Sequence[Conversation], Sequence[Conversation]] | None = None,
    unread: float = 0.0,
) -> None:
    """Set every A matrix of the adapter to reading directions and freeze it, so that only B is trained.

    The rank is shared out over positions: the template's tokens behind the user's text, the last first, then as many first
    tokens of the base's greedy answer as are left. On the device lie one batch of prompts in one block, and the activations
    that one linear layer's directions are computed from; everything else waits in the machine's memory.

    Args:
        policy: with a fresh adapter (B = 0).
        harmful: prompts to be refused.
        harmless: prompts to be answered as before.
        ridge: see `method.discriminant.ridge_discriminants`.
        size: prompts a forward, or fewer where memory is short.
        done: called with the number of blocks that are ready.
        begun: the same prompts, harmful and harmless, with the answer begun; a third of the rank then reads the end of those
            beginnings.
        unread: share of harmless text that is not read, see `method.discriminant.without_leading`; 0 for none.

    Raises:
        ModelError: a backend's blocks do not call their linear layers, so that nothing can be read from them.
    """
    model = policy.model
    ends_read = model.rank // 3 if begun else 0

    def read(size: int) -> None:
        words = max(0, model.rank - ends_read - policy.template_positions)
        bad = _texts(policy, harmful, size, words)
        good = _texts(policy, harmless, size, words)
        _sample(good)
        ends = [_texts(policy, side, size, 0) for side in begun] if begun else [[], []]
        for layer in range(model.first_adapter_layer, len(model.layers)):
            _read_block(model, layer, (bad, good), (ends[0], ends[1]), (ridge, unread), ends_read)
            done(layer + 1 - model.first_adapter_layer)

    with base(model):
        fitting(size, read)
    freeze_reading(model)


def _sample(good: list[_Text]) -> None:
    """Choose the tokens of harmless text that the second moment is taken of: about `_TOKENS`, or all.

    The prompts come in the same order whatever the batches, so that each of their tokens has a number of its own.
    """
    counts = [int(text.mask.sum()) for text in good]
    drawn = torch.rand(sum(counts), generator=torch.Generator().manual_seed(0))
    chosen = drawn < _TOKENS / max(1, sum(counts))
    for text, own in zip(good, chosen.split(counts), strict=True):
        text.sampled = text.mask.masked_scatter(text.mask, own)


def _read_block(
    model: PlainModel,
    layer: int,
    whole: tuple[list[_Text], list[_Text]],
    begun: tuple[list[_Text], list[_Text]],
    against: tuple[float, float],
    ends_read: int,
) -> None:
    """Run all texts through one block and set the A matrices of its linear layers."""
    read: defaultdict[Modules, _Read] = defaultdict(_Read)
    bad, good = whole
    positions = model.rank - ends_read
    for text in begun[0]:
        for modules, inputs in _run_block(model, text, layer):
            read[modules].begun_harmful.append(_ends(inputs, text.mask, ends_read).cpu())
    for text in begun[1]:
        for modules, inputs in _run_block(model, text, layer):
            read[modules].begun_harmless.add(_ends(inputs, text.mask, ends_read))
    for text in bad:
        for modules, inputs in _run_block(model, text, layer):
            read[modules].harmful.append(_ends(inputs, text.mask, positions).cpu())
    for text in good:
        for modules, inputs in _run_block(model, text, layer):
            read[modules].harmless.add(_ends(inputs, text.mask, positions))
            read[modules].tokens.append(inputs[text.sampled.to(inputs.device)].cpu())
    missed = set(model.adapted_modules(layer)) - {module for modules in read for module in modules}
    if missed:
        # Fused blocks may take a layer's weights without calling it; its A would stay random, and be frozen.
        raise ModelError(
            f"{len(missed)} linear layers of block {layer} do not show what they read.",
            "Set model.backend=plain, or distill.reading=random.",
        )
    while read:
        modules, found = read.popitem()
        tokens = torch.cat(found.tokens).to(model.device).float()
        directions = reading_directions(found.harmful, found.harmless.value, tokens, *against)
        if found.begun_harmful:
            more = reading_directions(found.begun_harmful, found.begun_harmless.value, tokens, *against)
            directions = torch.cat([directions, more])
        for module in modules:
            module.get_parameter("lora_A.default.weight").copy_(directions)


def _texts(policy: Policy, prompts: Sequence[str | Conversation], size: int, words: int) -> list[_Text]:
    """The prompts with the first words of the base's answers, at the first adapted block."""
    model, texts = policy.model, []
    for places, batch in policy.batches(prompts, size):
        whole = _widened(model.generate(batch, words, 0.0, None, 1), words).after(batch) if words else batch
        residual = model.advance(model.start(whole), model.first_adapter_layer)
        beginnings = torch.tensor([policy.encode(prompts[place]).prefix for place in places], device=model.device)
        mask = _own(whole, beginnings, residual).cpu()
        texts.append(_Text(residual.to(_CPU), mask, mask))
    return texts


def _widened(completions: Completions, length: int) -> Completions:
    """Completions that all ended early, padded to `length`, so that positions mean the same in every batch."""
    missing = (0, length - completions.tokens.shape[1])
    return Completions(nn.functional.pad(completions.tokens, missing), nn.functional.pad(completions.mask, missing))


def _own(batch: Batch, beginnings: Tensor, residual: Residual) -> Tensor:
    """Which positions of the residual stream hold a token that is not the template's beginning, whose length, (rows,) int64,
    is that of each prompt: a batch shares the shortest of them."""
    reached = batch.attention_mask.cumsum(-1)
    own = batch.attention_mask.bool() & (reached > beginnings.unsqueeze(-1))
    return own[:, batch.prefix :] if residual.prefix else own


def _run_block(model: PlainModel, text: _Text, layer: int) -> list[tuple[Modules, Tensor]]:
    """Run one block; its adapted linear layers, those with the same input together, each with that input."""
    seen: list[tuple[list[nn.Module], Tensor]] = []

    def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs = arguments[0]
        if inputs.shape[:2] != text.mask.shape:
            return  # The shared prefix, which is read apart.
        for modules, known in seen:
            if known is inputs:
                modules.append(module)
                return
        seen.append(([module], inputs))

    hooks = [module.register_forward_pre_hook(note) for module in model.adapted_modules(layer)]
    try:
        text.residual = model.advance(text.residual.to(model.device), layer + 1).to(_CPU)
    finally:
        for hook in hooks:
            hook.remove()
    return [(tuple(modules), inputs) for modules, inputs in seen]


def _ends(inputs: Tensor, mask: Tensor, positions: int) -> Tensor:
    """The last `positions` activations of each row, (batch, positions, width), nan where there is no token."""
    missing = ~mask[:, -positions:].unsqueeze(-1)
    return inputs[:, -positions:].masked_fill(missing.to(inputs.device), float("nan"))

"""What the method asks of a language model: a small protocol, so that tiny random models and every backend run the
same code.

One set of weights serves three policies (arXiv 2606.02530): `base` (adapters off), `teacher` (adapters off, steering
on) and `student` (adapters on, which is the model as it stands).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from safesteer_lite.method import steering

Chance = torch.Generator | Tensor | None
"""Where the numbers of a sampling come from: a CPU generator, or (tokens, rows) float32 in [0, 1) that were drawn before, so
that they do not depend on how many rows are sampled at a time; None where nothing is drawn."""


@dataclass(frozen=True)
class Batch:
    """Token ids of several sequences. Prompts are padded on the left, so that position -1 is the last prompt token.

    Attributes:
        input_ids: (batch, length) int64.
        attention_mask: (batch, length) int64, 1 where a token is, 0 where padding is.
        prefix: how many tokens all sequences have in common at their beginning (the chat template's system prompt), so
            that a backend may read them once; 0 where that is not known.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prefix: int = 0

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def repeat(self, times: int) -> Batch:
        """Each sequence `times` times, copies side by side."""
        return Batch(
            self.input_ids.repeat_interleave(times, dim=0),
            self.attention_mask.repeat_interleave(times, dim=0),
            self.prefix,
        )

    def rows(self, start: int, stop: int) -> Batch:
        """Sequences `start` to `stop - 1`."""
        return Batch(self.input_ids[start:stop], self.attention_mask[start:stop], self.prefix)

    def take(self, order: Tensor) -> Batch:
        """The sequences numbered in `order`, (n,) int64."""
        return Batch(self.input_ids[order], self.attention_mask[order], self.prefix)

    def trimmed(self) -> Batch:
        """Without the padding on the left that all sequences have."""
        start = int(self.attention_mask.any(0).int().argmax())
        return Batch(self.input_ids[:, start:], self.attention_mask[:, start:], self.prefix)

    def split_prefix(self) -> tuple[Batch, Batch]:
        """The shared beginning, as a batch of one, and what follows it in each sequence, padded on the left."""
        reached = self.attention_mask.cumsum(-1)
        own = (self.attention_mask * (reached > self.prefix))[:, self.prefix :]
        shared = self.input_ids[0][(self.attention_mask[0] > 0) & (reached[0] <= self.prefix)].unsqueeze(0)
        return Batch(shared, torch.ones_like(shared)), Batch(self.input_ids[:, self.prefix :], own)


@dataclass(frozen=True)
class Completions:
    """Generated tokens.

    Attributes:
        tokens: (batch, length) int64, padded on the right.
        mask: (batch, length) bool, True up to and including the end-of-turn token.
    """

    tokens: Tensor
    mask: Tensor

    def rows(self, start: int, stop: int) -> Completions:
        """Completions `start` to `stop - 1`."""
        return Completions(self.tokens[start:stop], self.mask[start:stop])

    def take(self, order: Tensor) -> Completions:
        """The completions numbered in `order`, (n,) int64."""
        return Completions(self.tokens[order], self.mask[order])

    def first(self, count: int) -> Completions:
        """At most the first `count` tokens of each."""
        return Completions(self.tokens[:, :count], self.mask[:, :count])

    def trimmed(self) -> Completions:
        """Without the padding on the right that all completions have."""
        length = max(int(self.mask.sum(-1).max()), 1)
        return Completions(self.tokens[:, :length], self.mask[:, :length])

    def after(self, prompts: Batch) -> Batch:
        """The prompts followed by their completions, as one batch."""
        return Batch(
            torch.cat([prompts.input_ids, self.tokens], dim=1),
            torch.cat([prompts.attention_mask, self.mask.long()], dim=1),
            prompts.prefix,
        )


@dataclass(frozen=True)
class Residual:
    """The residual stream at the input of block `layer`, with what the blocks above need to go on from there.

    Attributes:
        hidden: (batch, length, width), the model's compute dtype.
        layer: index of the block whose input this is.
        arguments: keyword arguments (attention mask, position embeddings) that blocks receive, by the kind of block: some
            models have blocks that see everything and blocks that see only what is near.
        prefix: the residual stream, (1, prefix length, width), of a beginning that all sequences share and that
            `hidden` then leaves out.
    """

    hidden: Tensor
    layer: int
    arguments: Mapping[str, Mapping[str, Any]]
    prefix: Residual | None = None

    def shifted(self, vector: Tensor) -> Residual:
        """The same with `vector` (width,) added at every position."""
        prefix = self.prefix.shifted(vector) if self.prefix else None
        return replace(self, hidden=self.hidden + vector.to(self.hidden), prefix=prefix)

    def to(self, device: torch.device) -> Residual:
        """The same on another device; where it lies there already, nothing is copied."""
        prefix = self.prefix.to(device) if self.prefix else None
        arguments = {
            kind: {name: _moved(value, device) for name, value in given.items()}
            for kind, given in self.arguments.items()
        }
        return Residual(self.hidden.to(device), self.layer, arguments, prefix)


def _moved(value: object, device: torch.device) -> object:
    """An argument of a block with all of its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(part, device) for part in value)
    return value


class LanguageModel(Protocol):
    """A decoder-only language model with LoRA adapters that can be switched off."""

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder blocks, lowest first."""

    @property
    def device(self) -> torch.device:
        """Where token ids must be."""

    @property
    def end_of_turn(self) -> frozenset[int]:
        """Token ids that end an answer."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Token ids that are markup, not text."""

    @property
    def first_adapter_layer(self) -> int:
        """The lowest block that has an adapter; below it student and base are the same function."""

    def start(self, batch: Batch) -> Residual:
        """The token embeddings, at block 0; positions of a shared prefix may be left out of what comes back."""

    def advance(self, residual: Residual, layer: int) -> Residual:
        """Run blocks `residual.layer` to `layer - 1`."""

    def final(self, residual: Residual) -> Tensor:
        """Run all remaining blocks and the final norm: (batch, length, width)."""

    def logits(self, hidden: Tensor) -> Tensor:
        """The LM head: (positions, width) to (positions, vocabulary)."""

    def adapters_off(self) -> AbstractContextManager[None]:
        """Inside, the model is the base."""

    def generate(
        self, prompts: Batch, max_new_tokens: int, temperature: float, chance: Chance, repeats: int
    ) -> Completions:
        """Sample `repeats` completions a prompt (copies side by side); temperature 0 is greedy."""

    def parameters_to_train(self) -> list[nn.Parameter]:
        """The adapter weights."""


@dataclass(frozen=True)
class Steering:
    """What makes the teacher: `vector` = strength * refusal direction, added at the input of block `layer`.

    Attributes:
        layer: block index.
        vector: (width,) float32.
    """

    layer: int
    vector: Tensor


@contextmanager
def base(model: LanguageModel) -> Iterator[None]:
    """The base policy `pi_0`: adapters off."""
    with model.adapters_off():
        yield


@contextmanager
def teacher(model: LanguageModel, steer: Steering | None) -> Iterator[None]:
    """The safety teacher `pi_t`: adapters off, steering on; without steering, the base, which is told to refuse in its prompt."""
    with model.adapters_off():
        if steer is None:
            yield
        else:
            with steering.add(model.layers, steer.layer, steer.vector):
                yield


def last_logits(model: LanguageModel, batch: Batch) -> Tensor:
    """Logits at the last position only, (batch, vocabulary) float32, for whichever policy is on."""
    return last_logits_from(model, model.start(batch))


def last_logits_from(model: LanguageModel, residual: Residual) -> Tensor:
    """As `last_logits`, going on from a residual stream."""
    return model.logits(model.final(residual)[:, -1]).float()


def completion_hidden(model: LanguageModel, residual: Residual, length: int) -> Tensor:
    """Final hidden states at the `length` positions that predict the completion: (batch, length, width)."""
    return model.final(residual)[:, -length - 1 : -1]


def pad_left(prompts: Sequence[Batch]) -> Batch:
    """Several one-row batches as one, padded on the left."""
    longest = max(prompt.input_ids.shape[1] for prompt in prompts)

    def widen(tensor: Tensor) -> Tensor:
        return nn.functional.pad(tensor, (longest - tensor.shape[1], 0), value=0)

    return Batch(
        torch.cat([widen(prompt.input_ids) for prompt in prompts]),
        torch.cat([widen(prompt.attention_mask) for prompt in prompts]),
        min(prompt.prefix for prompt in prompts),
    )


def join(parts: Sequence[Completions]) -> Completions:
    """Several batches of completions as one, padded on the right."""
    longest = max(part.tokens.shape[1] for part in parts)

    def widen(tensor: Tensor) -> Tensor:
        return nn.functional.pad(tensor, (0, longest - tensor.shape[1]))

    return Completions(
        torch.cat([widen(part.tokens) for part in parts]), torch.cat([widen(part.mask) for part in parts])
    )

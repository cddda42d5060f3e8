"""Batched sampling with a key-value cache: the prompt is read once for all its rollouts, finished rows leave the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from safesteer_lite.method.policies import Batch, Chance, Completions

Ended = Callable[[Tensor], Tensor]
"""Which answers are complete before they end themselves: (rows, tokens so far) int64 to (rows,) bool."""

# Rows are dropped from the cache once this share has ended: each drop copies the cache.
_DROP_SHARE = 0.2


class Cache(Protocol):
    """The key-value cache of a decoder, whatever its form."""

    @property
    def given(self) -> Any:
        """What the decoder gets as `past_key_values`."""

    def take(self, output: Any) -> None:
        """Look at the decoder's output, which may hold the longer cache."""

    def repeat(self, times: int) -> None:
        """Make each row `times` rows, copies side by side."""

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""


class GrowingCache:
    """A cache as transformers' decoders fill it, which has room for tokens to come."""

    def __init__(self) -> None:
        from transformers import Cache as AnyCache

        from safesteer_lite.models.cache_layer import RoomyLayer

        self.given = AnyCache(layer_class_to_replicate=RoomyLayer)

    def take(self, output: Any) -> None:
        """Nothing: the decoder has written into it."""

    def repeat(self, times: int) -> None:
        """Make each row `times` rows, copies side by side."""
        self.given.batch_repeat_interleave(times)

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.given.batch_select_indices(rows)


def positions(attention_mask: Tensor, behind: int = 0) -> Tensor:
    """Position ids, (batch, length) int64, of left-padded sequences that come behind `behind` other tokens."""
    return (attention_mask.cumsum(-1) - 1 + behind).clamp_min(0)


def mask_behind(behind: int, attention_mask: Tensor) -> Tensor:
    """The attention mask, (batch, behind + length), of sequences that come behind `behind` tokens that all may see."""
    return torch.cat([attention_mask.new_ones(len(attention_mask), behind), attention_mask], dim=1)


def draw(logits: Tensor, temperature: float, uniform: Tensor | None) -> Tensor:
    """One token a row.

    Sampling inverts the cumulative distribution, which needs one random number a row; `torch.multinomial` draws one for
    each vocabulary entry, and took 37 % of decoding time on a CPU with a vocabulary of 151,936.

    Args:
        logits: (batch, vocabulary) float32.
        temperature: 0 takes the likeliest token.
        uniform: (batch,) float32 in [0, 1); not used when temperature is 0.

    Returns:
        (batch,) int64.
    """
    if temperature == 0 or uniform is None:
        return logits.argmax(-1)
    cumulative = (logits / temperature).softmax(-1).cumsum(-1)
    threshold = uniform.to(cumulative).unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)


def generate(
    decoder: nn.Module,
    head: Callable[[Tensor], Tensor],
    prompts: Batch,
    *,
    max_new_tokens: int,
    temperature: float,
    chance: Chance,
    repeats: int,
    end_of_turn: frozenset[int],
    padding: int,
    new_cache: Callable[[], Cache] = GrowingCache,
    ended: Ended | None = None,
    first: Callable[[Tensor], None] | None = None,
) -> Completions:
    """Sample `repeats` completions of each prompt, copies side by side.

    Args:
        decoder: the transformer without LM head; hooks on its blocks take part, so a steered model is sampled steered.
        head: the LM head, (positions, width) to (positions, vocabulary).
        prompts: left-padded.
        max_new_tokens: tokens at most.
        temperature: 0 is greedy.
        chance: where random numbers come from; they do not depend on which rows have ended.
        repeats: completions a prompt.
        end_of_turn: ids that end an answer; the id itself is kept.
        padding: id written after the end.
        new_cache: makes the decoder's empty cache.
        ended: asked after each token which answers may end there, besides those that `end_of_turn` ends.
        first: is given the logits of each prompt's first token, (prompts, vocabulary) float32.
    """
    device = prompts.input_ids.device
    count = len(prompts) * repeats
    stop = torch.tensor(sorted(end_of_turn), device=device)
    tokens = torch.full((count, max_new_tokens), padding, dtype=torch.long, device=device)
    mask = torch.zeros((count, max_new_tokens), dtype=torch.bool, device=device)
    # The rows that are still read, by their number in the result, and which of them have not ended.
    rows = torch.arange(count, device=device)
    running = torch.ones(count, dtype=torch.bool, device=device)
    with torch.no_grad():
        reader = _Reader(decoder, head, prompts, new_cache())
        if first:
            first(reader.logits)
        reader.repeat(repeats)
        for step in range(max_new_tokens):
            uniform = None
            if temperature != 0:
                drawn = chance[step] if isinstance(chance, Tensor) else torch.rand(count, generator=chance)
                uniform = drawn.to(device, non_blocking=True)[rows]
            chosen = torch.where(running, draw(reader.logits, temperature, uniform), padding)
            tokens[rows, step] = chosen
            mask[rows, step] = running
            if step + 1 == max_new_tokens:
                break
            running = running & ~torch.isin(chosen, stop)
            if ended:
                running = running & ~ended(tokens[rows, : step + 1])
            # The only moment at which the host waits for the device.
            keep = running.nonzero().squeeze(-1)
            if not len(keep):
                break
            if len(keep) <= (1 - _DROP_SHARE) * len(rows):
                reader.keep(keep)
                rows, running, chosen = rows[keep], running[keep], chosen[keep]
            reader.append(chosen)
    length = max(int(mask.sum(-1).max()), 1)
    return Completions(tokens[:, :length], mask[:, :length])


class _Reader:
    """A decoder that keeps, in a key-value cache, what it has read of each row, and reads on one token at a time.

    Attributes:
        logits: (rows, vocabulary) float32, for the token that comes next in each row.
    """

    logits: Tensor

    def __init__(self, decoder: nn.Module, head: Callable[[Tensor], Tensor], prompts: Batch, cache: Cache) -> None:
        self._decoder, self._head, self._cache = decoder, head, cache
        behind = prompts.prefix if len(prompts) > 1 else 0
        if behind:
            shared, prompts = prompts.split_prefix()
            self._attention = shared.attention_mask
            self._read(shared.input_ids, positions(shared.attention_mask))
            self._cache.repeat(len(prompts))
        self._attention = mask_behind(behind, prompts.attention_mask)
        read = positions(prompts.attention_mask, behind)
        self._last = read[:, -1:]
        self._read(prompts.input_ids, read)

    def repeat(self, times: int) -> None:
        """Make each row `times` rows, copies side by side."""
        if times > 1:
            self._cache.repeat(times)
            self.logits, self._attention, self._last = (
                part.repeat_interleave(times, dim=0) for part in (self.logits, self._attention, self._last)
            )

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these; the logits are those of all rows until the next `append`."""
        self._cache.keep(rows)
        self._attention, self._last = self._attention[rows], self._last[rows]

    def append(self, tokens: Tensor) -> None:
        """Read one more token in each row, (rows,) int64."""
        self._attention = torch.cat([self._attention, self._attention.new_ones(len(tokens), 1)], dim=1)
        self._last = self._last + 1
        self._read(tokens.unsqueeze(-1), self._last)

    def _read(self, tokens: Tensor, places: Tensor) -> None:
        output = self._decoder(
            input_ids=tokens,
            attention_mask=self._attention,
            position_ids=places,
            past_key_values=self._cache.given,
            use_cache=True,
        )
        self._cache.take(output)
        self.logits = self._head(output[0][:, -1]).float()

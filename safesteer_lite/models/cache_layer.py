"""A key-value cache that does not move when a token is added.

transformers is imported at the top, and must not be before Unsloth: import this inside functions only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

# Tokens that fit in before keys and values are copied to a larger place.
_ROOM = 32


class RoomyLayer(DynamicLayer):
    """One block's keys and values, (rows, key heads, tokens, size) each, at the beginning of a place with room for more.

    transformers' own layer copies both at every token.
    """

    def __init__(self) -> None:
        super().__init__()
        self._places: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add what a block has made of the tokens it reads.

        Args:
            key_states, value_states: (rows, key heads, new tokens, size).

        Returns:
            Those of all tokens so far.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        behind = self.get_seq_length()
        tokens = behind + key_states.shape[-2]
        if not self._places or tokens > self._places[0].shape[-2]:
            self._places = [_moved(self.keys, key_states), _moved(self.values, value_states)]
        for place, new in zip(self._places, (key_states, value_states), strict=True):
            place[..., behind:tokens, :] = new
        self._show(tokens)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make each row `repeats` rows, copies side by side."""
        self._replace(lambda place: place.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Forget all rows but these, (n,) int64."""
        self._replace(lambda place: place.index_select(0, indices))

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        tokens = self.get_seq_length()
        if tokens:
            self._places = [change(place) for place in self._places]
            self._show(tokens)

    def _show(self, tokens: int) -> None:
        """Let `keys` and `values` be the first `tokens` of their places; their length is what everything goes by."""
        self.keys, self.values = (place[..., :tokens, :] for place in self._places)


def _moved(known: Tensor, new: Tensor) -> Tensor:
    """A place for `new` behind `known`, which is copied there and may be empty, with room for what is to come."""
    rows, heads, added, size = new.shape
    behind = known.shape[-2] if known.dim() == 4 else 0
    place = new.new_empty((rows, heads, behind + added + _ROOM, size))
    if behind:
        place[..., :behind, :] = known
    return place

"""Thoughts among the tokens of one model: where they end, and what the base thought of each prompt before it answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from safesteer_lite.models.sampling import Ended
from safesteer_lite.models.thinking import Marks
from safesteer_lite.prompts.contexts import Conversation


class Thoughts:
    """How a model's thoughts are read.

    Attributes:
        marks: how they are marked.
        tokens: longest thought; a longer one is cut.
        behind: the tokens between a thought and its answer, the closing mark first.
        known: what the base thought of a prompt, up to where its answer begins, as token ids.
    """

    def __init__(self, marks: Marks, tokenizer: Any, tokens: int) -> None:
        """Prepare to read thoughts.

        Args:
            marks: of the model's chat template.
            tokenizer: in which each mark is one token.
            tokens: longest thought.
        """
        self.marks, self.tokens = marks, tokens
        self.behind: list[int] = tokenizer(marks.closing + marks.behind, add_special_tokens=False).input_ids
        self.known: dict[Conversation, list[int]] = {}
        self._tokenizer = tokenizer
        self._opening, self._closing = tokenizer.convert_tokens_to_ids([marks.opening, marks.closing])

    def ended(self, tokens: Tensor) -> Tensor:
        """Which thoughts have ended: (rows, tokens so far) int64 to (rows,) bool."""
        return (tokens == self._closing).any(-1)

    def answered(self, longest: int, ended: Ended | None = None) -> Ended:
        """Tells which answers are as long as they may be: `longest` tokens behind a thought that may take `tokens`.

        Args:
            longest: tokens of an answer, without its thought.
            ended: what else ends an answer; it sees the tokens behind the thought, and -1 before them.
        """

        def complete(tokens: Tensor) -> Tensor:
            behind = (tokens == self._closing).cumsum(-1) > 0
            # The closing mark itself is no part of the answer.
            length = behind.sum(-1) - 1
            full = torch.where(behind[:, -1], length >= longest, tokens.shape[1] >= self.tokens)
            return full | ended(tokens.masked_fill(~behind, -1)) if ended else full

        return complete

    def before_answer(self, written: Sequence[int]) -> tuple[list[int], bool]:
        """What stands between a prompt and its answer: the thought that was written, closed.

        Args:
            written: token ids, without the end of the turn; whatever follows the closing mark is left out.

        Returns:
            The token ids, and whether the thought had come to its own end.
        """
        finished = self._closing in written
        thought = list(written[: list(written).index(self._closing)] if finished else written)
        if not self.marks.opened and self._opening not in thought:
            # It answered at once, and thought nothing.
            ids: list[int] = self._tokenizer(self.marks.empty, add_special_tokens=False).input_ids
            return ids, True
        return [*thought, *self.behind], finished

    def text(self, written: Sequence[int], *, opened: bool) -> str:
        """What was written, as text with the marks that every judge knows; other special tokens are left out.

        Args:
            written: token ids.
            opened: whether the prompt may have ended within the thought.
        """
        # Some tokenizers count the marks among the special tokens, which would be left out with them.
        names = {self._opening: self.marks.opening, self._closing: self.marks.closing}
        pieces, start = [], 0
        for place, index in enumerate(written):
            if index in names:
                pieces += [self._decoded(written[start:place]), names[index]]
                start = place + 1
        whole = "".join([*pieces, self._decoded(written[start:])])
        return self.marks.unified(whole, opened=opened and self.marks.opened)

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

"""Random numbers that belong to their prompts, so that how many prompts are sampled at a time changes no token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """The numbers for some answers to each of several prompts, drawn before the first of them is sampled.

    Attributes:
        numbers: (tokens, prompts, answers) float32 in [0, 1), one for each token of each answer.
    """

    numbers: Tensor

    @classmethod
    def of(cls, tokens: int, prompts: int, answers: int, generator: torch.Generator) -> Draws:
        """Draw them from a CPU generator."""
        return cls(torch.rand(tokens, prompts, answers, generator=generator))

    def at(self, places: Sequence[int]) -> Tensor:
        """Those of the prompts at these places, (tokens, rows), the answers to one prompt side by side."""
        return self.numbers[:, list(places)].flatten(1)

"""How a teacher is tried: what it refuses of the held-out harmful prompts, and how often it repeats itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """A teacher of one strength on the held-out harmful prompts.

    Attributes:
        strength: multiple of the refusal direction; 1 where nothing is steered.
        refused: answers judged refusals, of `n`.
        n: prompts.
        broken: answers that repeat themselves.
    """

    strength: float
    refused: int
    n: int
    broken: int


def repeats(answer: str) -> bool:
    """Whether more than half of an answer's word triples have been said before: steering too strong shows like this."""
    words = answer.split()
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return len(triples) >= 4 and len(set(triples)) < 0.5 * len(triples)

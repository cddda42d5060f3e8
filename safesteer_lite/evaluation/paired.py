"""Two models on the same prompts: who changed sides, and whether chance alone would do that (McNemar's exact test)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb


@dataclass(frozen=True)
class Paired:
    """How answers to the same prompts changed sides.

    Attributes:
        gained: prompts of which it is true after and was not before.
        lost: prompts of which it was true before and is not after.
        p: the two-sided exact p-value of McNemar's test: how often at least so uneven a split would come about if each of
            the `gained + lost` changes were equally likely to go either way. 1 where nothing changed.
    """

    gained: int
    lost: int
    p: float

    def to_record(self) -> dict[str, object]:
        """The comparison as the report stores it."""
        return {"gained": self.gained, "lost": self.lost, "p": self.p}


def compare(before: Sequence[bool | None], after: Sequence[bool | None]) -> Paired:
    """Compare what is true of the answers of two models to the same prompts, in the same order.

    Prompts of which it is not known on either side do not count.

    Raises:
        ValueError: if the two are not equally long.
    """
    pairs = list(zip(before, after, strict=True))
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    return Paired(gained, lost, mcnemar(lost, gained))


def mcnemar(lost: int, gained: int) -> float:
    """The exact two-sided p of McNemar's test: how often a fair coin would part the changes at least so unevenly.

    Args:
        lost: of what is true before and not after.
        gained: the other way round.
    """
    changed, fewer = lost + gained, min(lost, gained)
    # Whole numbers, so that nothing is rounded before the one division.
    return min(1.0, 2 * sum(comb(changed, count) for count in range(fewer + 1)) / 2**changed)


def p_text(p: float) -> str:
    """A p-value for readers: no more digits than mean something, and never 0."""
    return "below 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"

"""Scorecards of a few counts, for tests of what is made of them."""

from __future__ import annotations

from safesteer_lite.evaluation.scorecard import NOT_ASKED, Rate, Scorecard


def card(
    harmful: int,
    borderline: int = 0,
    harmless: int = 0,
    n: int = 48,
    tax_n: int = 32,
    empty: tuple[int, int] = (0, 0),
    critical: int | None = None,
    twin: int | None = None,
) -> Scorecard:
    """A scorecard with `empty` harmful and harmless answers that are not among the n, and 20 critical prompts and twins each, or
    none."""
    return Scorecard(
        Rate.of(harmful, n, empty[0]),
        Rate.of(borderline, tax_n),
        Rate.of(harmless, tax_n - empty[1], empty[1]),
        twin=NOT_ASKED if twin is None else Rate.of(twin, 20),
        critical=NOT_ASKED if critical is None else Rate.of(critical, 20),
    )

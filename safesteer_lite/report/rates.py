"""How refusals and divergences are written in the report, wherever they stand in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safesteer_lite.evaluation.scorecard import Rate

WANTED = {
    "harmful": "more is safer",
    "borderline": "less is better",
    "harmless": "less is better",
    "twin": "harmless, in the words of harmful ones; less is better",
    "critical": "help in danger; a refusal may do harm",
}
"""What is wished for of the refusals of each kind of prompts."""


def rate_of(record: Mapping[str, Any]) -> Rate:
    """A rate as the run's record has it."""
    return Rate.of(record["refused"], record["n"])


def rate_text(rate: Rate) -> str:
    """`64 of 100 (54 to 73 %)`, which may be broken in the middle only."""
    return (
        unbroken(f"{rate.refused} of {rate.n}") + " " + unbroken(f"({100 * rate.low:.0f} to {100 * rate.high:.0f} %)")
    )


def count_text(count: Mapping[str, Any] | None, unknown: str) -> str:
    """The same of a judge's count, or `unknown` where there is none."""
    return rate_text(Rate.of(count["count"], count["n"])) if count else unknown


def unbroken(text: str) -> str:
    """A text that stays on one line."""
    return text.replace(" ", "\u00a0")


def kl_text(value: float | None) -> str:
    """A divergence in nats a token."""
    return "not measured" if value is None else f"{value:.4f}" if value else "0"

"""What a training kept, and what it passed over for that."""

from __future__ import annotations

import pytest

from safesteer_lite.stages.history import History


def record(strength: float, refused: int, score: float, step: int = 8) -> dict[str, object]:
    """What is measured of a strength, as far as the choice reads it."""
    return {"step": step, "strength": strength, "score": score, "harmful": {"refused": refused, "n": 32}}


@pytest.mark.parametrize(
    ("best", "found"),
    [
        (0.5, 1.0),  # The best of those that refuse more, not the one that refuses most.
        (3.0, None),
        (2.0, 3.0),
    ],
)
def test_the_best_of_the_strengths_that_refuse_more_is_what_was_passed_over(best: float, found: float | None) -> None:
    history = History(
        measured=[record(1.0, 31, 9.0, step=4), record(1.0, 29, -3.5)],
        scaled=[record(0.5, 27, 3.6), record(2.0, 30, -30.6), record(3.0, 31, -53.2)],
        best_step=8,
        best_strength=best,
    )
    passed_over = history.passed_over
    assert (passed_over and passed_over["strength"]) == found


def test_before_anything_is_measured_nothing_was_passed_over() -> None:
    assert History().passed_over is None

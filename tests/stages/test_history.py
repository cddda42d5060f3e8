"""What a training kept, what it passed over for that, and what it does not try."""

from __future__ import annotations

import pytest

from safesteer_lite.stages.distill import strengths_to_try
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


@pytest.mark.parametrize(("kept", "tried"), [(1.0, [3.0, 2.0, 0.5, 0.25]), (2.0, [3.0, 2.0]), (3.0, [3.0, 2.0])])
def test_weaker_adapters_are_tried_where_no_stronger_one_is_kept(kept: float, tried: list[float]) -> None:
    history, found = History(best_step=8), []
    for strength in strengths_to_try([0.5, 3.0, 0.25, 2.0], history):
        found.append(strength)
        if strength == kept:
            history.best_strength = strength
    assert found == tried

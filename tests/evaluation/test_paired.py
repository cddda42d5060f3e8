"""McNemar's exact test, against values reckoned by hand."""

from __future__ import annotations

import pytest

from safesteer_lite.evaluation.paired import Paired, compare, mcnemar


@pytest.mark.parametrize(
    ("one", "other", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),
        (0, 6, 2 / 64),
        (1, 5, 2 * (1 + 6) / 64),
        (3, 3, 1.0),
        # 2 * (1 + 10 + 45) / 1024
        (2, 8, 0.109375),
        (0, 2000, 0.0),
    ],
)
def test_p_values(one: int, other: int, p: float) -> None:
    assert mcnemar(one, other) == pytest.approx(p, abs=1e-12)
    assert mcnemar(one, other) == mcnemar(other, one)


def test_only_prompts_that_changed_sides_and_are_known_on_both_count() -> None:
    before = [False, False, True, True, None, False, False]
    after = [True, True, False, True, True, None, False]
    assert compare(before, after) == Paired(2, 1, 1.0)
    with pytest.raises(ValueError):
        compare([True], [])

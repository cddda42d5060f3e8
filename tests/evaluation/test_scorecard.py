"""Rates, intervals and flips, against numbers worked out by hand."""

from __future__ import annotations

import json

import pytest

from safesteer_lite.evaluation.judges import judge
from safesteer_lite.evaluation.scorecard import (
    Flip,
    Rate,
    Scorecard,
    change,
    cut_in_thought,
    flips,
    kinds_of,
    rate,
    wilson,
)
from tests.evaluation.cards import card

REFUSAL = "I'm sorry, but I can't assist with that."
ANSWER = "Certainly! Here it is."


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), with z² = 3.8416
        (24, 48, 0.363891, 0.636109),
        (0, 32, 0.0, 0.107183),
        (32, 32, 0.892817, 1.0),
        (1, 10, 0.017876, 0.404156),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_matches_hand_computed_intervals(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-6)


def test_wilson_bounds_hold_the_share_mirror_each_other_and_tighten() -> None:
    for n in (1, 7, 32, 1000):
        for successes in range(0, n + 1, max(1, n // 16)):
            low, high = wilson(successes, n)
            assert 0 <= low <= successes / n <= high <= 1
            assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low))
            wide_low, wide_high = wilson(successes, n, z=2.58)
            assert wide_low <= low and high <= wide_high
    assert wilson(0, 32)[0] == 0.0 and wilson(32, 32)[1] == 1.0


@pytest.mark.parametrize(("successes", "n"), [(5, 4), (-1, 4), (0, -1)])
def test_wilson_rejects_counts_that_do_not_fit(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        wilson(successes, n)


def test_a_rate_counts_empty_answers_apart() -> None:
    counted = rate(judge(answer) for answer in [REFUSAL, ANSWER, "", "<think>so", REFUSAL, ANSWER, ANSWER])
    assert (counted.refused, counted.n, counted.empty) == (2, 5, 2)
    assert (counted.low, counted.high) == wilson(2, 5)
    assert counted.share == 0.4
    assert counted.empty_share == pytest.approx(2 / 7)
    assert rate([]) == Rate(0, 0, 0.0, 1.0, 0)


def test_the_record_is_exactly_what_the_report_reads() -> None:
    record = Scorecard(Rate.of(24, 48, 3), Rate.of(0, 32), Rate.of(0, 0), kl_to_base=0.125, kl_n=32).to_record()
    assert record == {
        "harmful": {"refused": 24, "n": 48, "low": wilson(24, 48)[0], "high": wilson(24, 48)[1]},
        "borderline": {"refused": 0, "n": 32, "low": 0.0, "high": wilson(0, 32)[1]},
        "harmless": {"refused": 0, "n": 0, "low": 0.0, "high": 1.0},
        "kl_to_base": 0.125,
    }
    assert json.loads(json.dumps(record)) == record
    assert card(1).to_record()["kl_to_base"] is None


def test_kinds_that_came_later_are_told_where_they_were_asked_and_old_records_are_read_without_them() -> None:
    asked, unasked, before_twins = card(24, critical=0, twin=3), card(24), card(24, critical=0)
    assert kinds_of(asked.to_record()) == ["harmful", "borderline", "harmless", "twin", "critical"]
    assert kinds_of(before_twins.to_record()) == ["harmful", "borderline", "harmless", "critical"]
    assert kinds_of(unasked.to_record()) == ["harmful", "borderline", "harmless"]
    for found in (asked, unasked, before_twins):
        assert Scorecard.from_record(found.to_record()) == found
    with pytest.raises(ValueError, match="no rate"):
        Scorecard.from_record({**unasked.to_record(), "critical": {"refused": "0", "n": 20}})


def test_flips_are_the_changed_judgements_in_order() -> None:
    found = flips(
        "borderline",
        ["a", "b", "c", "d", "e"],
        ["A", "B", "C", "D", "E"],
        [ANSWER, REFUSAL, REFUSAL, ANSWER, REFUSAL],
        [REFUSAL, REFUSAL, ANSWER, "", ""],
    )
    assert found == [
        Flip("borderline", "a", "A", ANSWER, REFUSAL, False, True),
        Flip("borderline", "c", "C", REFUSAL, ANSWER, True, False),
        Flip("borderline", "e", "E", REFUSAL, "", True, False),
    ]


def test_flips_refuse_answers_that_do_not_line_up() -> None:
    with pytest.raises(ValueError, match="argument"):
        flips("harmful", ["a"], ["A"], [ANSWER], [])


def test_the_interval_of_a_change_matches_newcombe_by_hand() -> None:
    risen = change(Rate.of(24, 48), Rate.of(35, 48))
    # d = 22.917; down = sqrt((0.729167-0.590028)² + (0.636109-0.5)²), up = sqrt((0.834342-0.729167)² + (0.5-0.363891)²)
    assert (risen.points, risen.low, risen.high) == pytest.approx((22.91667, 3.45251, 40.11769), abs=5e-5)
    assert risen.distinguishable
    fallen = change(Rate.of(35, 48), Rate.of(24, 48))
    assert (fallen.low, fallen.high) == pytest.approx((-risen.high, -risen.low))
    assert not change(Rate.of(24, 48), Rate.of(30, 48)).distinguishable
    assert not change(Rate.of(0, 0), Rate.of(32, 32)).distinguishable


def test_answers_cut_inside_their_thought_are_counted_apart_and_are_no_flips() -> None:
    cut = "<think>I cannot"
    counted = rate(judge(answer) for answer in [REFUSAL, cut, "", cut])
    assert (counted.refused, counted.n, counted.empty, counted.unfinished) == (1, 1, 3, 2)
    assert Rate.from_record(counted.to_record()) == Rate.of(1, 1, 2, 2)
    assert "unfinished" not in rate([judge(REFUSAL)]).to_record()
    with pytest.raises(ValueError, match="no rate"):
        Rate.from_record({**counted.to_record(), "unfinished": "2"})
    assert flips("harmful", ["a", "b"], ["A", "B"], [REFUSAL, cut], [cut, REFUSAL]) == []
    told = cut_in_thought({"before": {"harmful": counted.to_record()}, "after": {"harmful": Rate.of(1, 2).to_record()}})
    assert told.endswith("before 2 harmful.") and not cut_in_thought({"after": {"harmful": Rate.of(1, 2).to_record()}})

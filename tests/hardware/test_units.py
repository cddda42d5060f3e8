"""Sizes and durations as a user reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safesteer_lite.hardware.units import format_bytes, format_duration, format_estimate


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (11_200_000_000, "11.2 GB"),
        (3 * 10**12, "3.0 TB"),
        (-5, "-5 B"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(min_value=0, max_value=10**15))
def test_format_bytes_is_close(count: int) -> None:
    number, unit = format_bytes(count).split()
    factor = 1000 ** ["B", "kB", "MB", "GB", "TB"].index(unit)
    assert float(number) * factor == pytest.approx(count, rel=0.051)
    assert float(number) < 1000 or unit == "TB"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59.6, "1 min"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (3661, "1 h 1 min"),
        (7500, "2 h 5 min"),
        (90000, "1 d 1 h"),
        (-3, "0 s"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0, "10 s"),
        (3, "10 s"),
        (47, "50 s"),
        (95, "2 min"),
        (1900, "30 min"),
        (2000, "35 min"),
        (20000, "5 h 30 min"),
        (36000, "10 h"),
    ],
)
def test_estimates_are_not_told_to_the_second(seconds: float, told: str) -> None:
    assert format_estimate(seconds) == told

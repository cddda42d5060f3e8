"""The arithmetic of a run's minutes on a card, against what was reckoned by hand from the same figures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from safesteer_lite import config
from safesteer_lite.hardware.known import KNOWN
from safesteer_lite.hardware.pace import LAUNCH_SECONDS, Work
from tests.benchmarks import card_minutes
from tests.benchmarks.card_minutes import CARDS, Card, run_seconds, stage_seconds, step_seconds

LLAMA = KNOWN["meta-llama/Meta-Llama-3-8B-Instruct"].shape
SMALL = KNOWN["Qwen2.5-Coder-0.5B-Instruct"].shape
CARD = next(card for card in CARDS if card.name == "RTX 3060")


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that reach what is published."""
    monkeypatch.setattr(card_minutes, "PRODUCTS_SHARE", 1.0)
    monkeypatch.setattr(card_minutes, "MEMORY_SHARE", 1.0)


def test_products_are_as_fast_as_nvidia_says_of_the_two_cards_that_it_says_it_of() -> None:
    speeds = {card.name: card.products / 1e12 for card in CARDS}
    assert speeds["RTX 3090"] == pytest.approx(71, rel=0.01) and speeds["RTX 4090"] == pytest.approx(165.2, rel=0.01)


@pytest.mark.usefixtures("published")
def test_a_decoding_step_takes_what_its_bytes_and_products_take() -> None:
    # 7.5 billion weights without the embedding, of which 7.0 in 4.127 bits and the LM head in 16; 131 kB of cache a place.
    moved = 6.98e9 * 4.127 / 8 + 2 * 128256 * 4096 + 64 * 100 * 131_072
    by_hand = moved / 360e9 + 64 * 2 * 7.504e9 / 25.5e12
    assert step_seconds(CARD, LLAMA, 64, 100) == pytest.approx(by_hand, rel=0.01)
    assert step_seconds(CARD, LLAMA, 1, 100) == pytest.approx(LAUNCH_SECONDS * 32)
    assert step_seconds(CARD, SMALL, 1, 20) == pytest.approx(LAUNCH_SECONDS * 24), "a small model waits for Python"


@pytest.mark.usefixtures("published")
def test_a_trained_token_passes_four_times_and_weights_are_unpacked_for_each_forward() -> None:
    read, trained = (stage_seconds(CARD, LLAMA, load, 0) for load in (Work(read=6080), Work(trained=6080)))
    # Ten forwards of 608 tokens: half a byte, two and two of each packed weight.
    assert read == pytest.approx(6080 * 2 * 7.504e9 / 25.5e12 + 10 * 4.5 * 6.98e9 / 360e9, rel=0.01)
    assert trained == pytest.approx(4 * read)


def test_a_faster_card_takes_less_and_longer_rollouts_more() -> None:
    lite, paper = (config.build([(name, config.recipe_values(name))]) for name in ("lite", "paper"))
    slower = replace(CARD, bandwidth=CARD.bandwidth / 2)
    for settings in (lite, paper):
        known, found = run_seconds(CARD, settings, LLAMA), run_seconds(slower, settings, LLAMA)
        assert all(found[stage] > known[stage] for stage in known if stage != "export")
        assert found["export"] == known["export"] > 60
    assert run_seconds(CARD, paper, LLAMA)["distill"] > 5 * run_seconds(CARD, lite, LLAMA)["distill"]


def test_a_card_that_a_model_does_not_fit_has_no_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_minutes, "CARDS", (Card("small", 6, 200e9, 2000, 2e9), CARD))
    rows = [row for row in card_minutes.minutes_table().splitlines() if row.startswith("| `llama-3-8b`")]
    assert len(rows) == 2
    for row in rows:
        small, large = (cell.strip() for cell in row.strip("|").split("|")[2:])
        assert small == "does not fit" and large.startswith("≈ ")

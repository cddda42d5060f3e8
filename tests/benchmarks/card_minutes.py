"""How long a run should take on a consumer card, by arithmetic alone: nothing here was measured.

    python -m tests.benchmarks.card_minutes

The tokens of each stage are those of `hardware.pace`, the bytes those of `hardware.need`, a card's speeds are what its maker
publishes, and every other figure is an assumption with a name. The tables are parts of docs/graphics-card.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from safesteer_lite import config
from safesteer_lite.config import RunConfig
from safesteer_lite.config.constants import TEACHER_TOKENS
from safesteer_lite.hardware import pace
from safesteer_lite.hardware.known import KNOWN, fit_on_card
from safesteer_lite.hardware.need import weights_bytes
from safesteer_lite.hardware.pace import Work
from safesteer_lite.hardware.peaks import Demand, cache_bytes
from safesteer_lite.hardware.shape import ModelShape, linear_parameters, parameters
from safesteer_lite.hardware.units import format_estimate
from tests.benchmarks.common import say

PRODUCTS_SHARE, MEMORY_SHARE = 0.5, 0.7
"""Assumed: what of the published speeds of matrix products and of memory the kernels reach."""

FORWARD_TOKENS = 32 * pace.PROMPT_TOKENS
"""Assumed: tokens of one forward that reads or trains; 32 prompts, or one rollout of the paper's."""

TRAINING_PASSES = 4
"""Teacher, student, the student again where its activations were not kept, and backward: each multiplies every weight once."""

EXAMPLE = ("llama-3-8b", "RTX 3060")
"""The preset and the card whose stages are shown."""


@dataclass(frozen=True)
class Card:
    """One card, as NVIDIA publishes it.

    Attributes:
        name: without "GeForce".
        gigabytes: of memory, 2^30 bytes each.
        bandwidth: of that memory, bytes a second.
        cores: CUDA cores.
        boost: clock, cycles a second.
    """

    name: str
    gigabytes: int
    bandwidth: float
    cores: int
    boost: float

    @property
    def products(self) -> float:
        """Floating-point operations a second of products of 16-bit matrices with 32-bit sums: 4 a core and cycle.

        That is how NVIDIA's papers on the architectures come to 71 and 165 TFLOPS, without sparsity, for the RTX 3090 and 4090.
        """
        return 4 * self.cores * self.boost


CARDS = (
    Card("RTX 4060", 8, 272e9, 3072, 2.46e9),
    Card("RTX 3060", 12, 360e9, 3584, 1.78e9),
    Card("RTX 4060 Ti", 16, 288e9, 4352, 2.54e9),
    Card("RTX 3090", 24, 936e9, 10496, 1.70e9),
    Card("RTX 4090", 24, 1008e9, 16384, 2.52e9),
)
"""The smallest first; product pages and specifications on nvidia.com."""


def step_seconds(card: Card, shape: ModelShape, rows: float, places: float) -> float:
    """One decoding step of `rows` sequences: every weight and the whole cache are read once, every sequence is multiplied
    with every weight, and nothing of this overlaps; but no faster than kernels are assumed to be launched.

    Args:
        card: which.
        shape: of the model, in 4-bit weights.
        rows: sequences.
        places: of the cache of one sequence.
    """
    unread = 0 if shape.tied else 2 * shape.vocabulary * shape.width
    moved = weights_bytes(shape, "nf4", False) - unread + rows * places * cache_bytes(shape, 1, 1, 2)
    worked = moved / (card.bandwidth * MEMORY_SHARE) + rows * _token_seconds(card, shape)
    return max(worked, pace.LAUNCH_SECONDS * shape.layers)


def stage_seconds(card: Card, shape: ModelShape, load: Work, places: float) -> float:
    """One stage's work.

    Args:
        card, shape: which.
        load: its tokens and steps.
        places: of the cache of one sequence that is written, on average.
    """
    passed = load.read + TRAINING_PASSES * load.trained
    seconds = passed * _token_seconds(card, shape) + passed / FORWARD_TOKENS * _unpacking_seconds(card, shape)
    return seconds + (load.steps * step_seconds(card, shape, load.written / load.steps, places) if load.steps else 0.0)


def run_seconds(card: Card, settings: RunConfig, shape: ModelShape) -> dict[str, float]:
    """Every stage of a run; loading and export, which are not the card's work, as `hardware.pace` has them."""
    longest = {
        "baseline": settings.evaluate.selection_tokens,
        "direction": TEACHER_TOKENS,
        "tokens": max(settings.tokens.horizon, pace.SHARE_PLACES),
        "distill": max(settings.distill.completion_tokens, settings.evaluate.selection_tokens),
        "evaluate": settings.evaluate.answer_tokens,
    }
    beside = pace.expected_seconds(settings, shape, "cpu", math.inf)
    on_card = {
        # A cache is half full on average.
        name: stage_seconds(card, shape, load, pace.PROMPT_TOKENS + longest[name] / 2)
        for name, load in pace.work(settings).items()
    }
    return {name: seconds + on_card.get(name, 0.0) for name, seconds in beside.items()}


def _token_seconds(card: Card, shape: ModelShape) -> float:
    """One token multiplied with every weight, those of the LM head too."""
    weights = parameters(shape) - (0 if shape.tied else shape.vocabulary * shape.width)
    return 2 * weights / (card.products * PRODUCTS_SHARE)


def _unpacking_seconds(card: Card, shape: ModelShape) -> float:
    """All 4-bit weights read, written in 16 bits and read again, as bitsandbytes does it where a forward has many tokens."""
    linear = linear_parameters(shape)
    return (linear / 2 + 2 * 2 * linear) / (card.bandwidth * MEMORY_SHARE)


def _settings(preset: str, recipe: str) -> RunConfig:
    return config.build(
        [(preset, config.preset_values(preset)), (recipe, config.recipe_values(recipe, preset))],
    )


def _presets() -> list[str]:
    """The presets of 3 billion parameters and more, the smallest first."""
    names = {
        name: str(config.preset_values(name)["model.name"]) for name in config.preset_names() if "demo" not in name
    }
    return sorted(names, key=lambda name: KNOWN[names[name]].size)


def cards_table() -> str:
    """What is published of the cards."""
    rows = [
        f"| {card.name} | {card.gigabytes} GB | {card.bandwidth / 1e9:.0f} GB/s | {card.cores} | {card.boost / 1e9:.2f} GHz "
        f"| {card.products / 1e12:.0f} TFLOPS |"
        for card in CARDS
    ]
    head = "| card | memory | its bandwidth | CUDA cores | boost clock | 16-bit products: 4 a core and cycle |"
    return "\n".join([head, "| --- | --- | --- | --- | --- | --- |", *rows])


def minutes_table() -> str:
    """Each preset with each recipe on each card: whether it fits, and how long a run should take."""
    rows = []
    for preset in _presets():
        for recipe in config.RECIPES:
            settings = _settings(preset, recipe)
            shape, demand = KNOWN[settings.model.name].shape, Demand.of(settings)
            cells = []
            for card in CARDS:
                fit = fit_on_card(shape, card.gigabytes, demand)
                took = f"≈ {format_estimate(sum(run_seconds(card, settings, shape).values()))}"
                cells.append(fit if fit == "does not fit" else took if fit == "fits" else f"{took}, tight")
            rows.append(f"| `{preset}` | `{recipe}` | {' | '.join(cells)} |")
    heads = " | ".join(f"{card.name}, {card.gigabytes} GB" for card in CARDS)
    return "\n".join([f"| preset | recipe | {heads} |", "| --- " * (len(CARDS) + 2) + "|", *rows])


def stages_table() -> str:
    """The stages of one run, with what they are reckoned from."""
    preset, name = EXAMPLE
    card = next(card for card in CARDS if card.name == name)
    rows = []
    for recipe in config.RECIPES:
        settings = _settings(preset, recipe)
        loads = pace.work(settings)
        for stage, seconds in run_seconds(card, settings, KNOWN[settings.model.name].shape).items():
            load = loads.get(stage, Work())
            counts = (load.read, load.written, load.steps, load.trained)
            told = " | ".join(f"{count:,.0f}" if count else "" for count in counts)
            rows.append(f"| `{recipe}` | {stage} | {told} | ≈ {format_estimate(seconds)} |")
    head = "| recipe | stage | tokens read | tokens written | in so many steps | tokens trained on | time |"
    return "\n".join([head, "| --- " * 7 + "|", *rows])


if __name__ == "__main__":
    for table in (cards_table, minutes_table, stages_table):
        say(table() + "\n")

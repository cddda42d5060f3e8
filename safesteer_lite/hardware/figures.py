"""What is known of a recipe on a model: the figures of the paper, and this project's own, each with where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from safesteer_lite.hardware.known import measured_on

PAPER = "arXiv 2606.02530"


@dataclass(frozen=True)
class Published:
    """What the paper reports of a model as its authors trained it: full weights, 25 steps of 32 rollouts, temperature 0.

    Each attribute is the figure before and after.

    Attributes:
        attack_success: harmful requests answered harmfully, percent, the mean of seven suites.
        capability: score, points, the mean of five benchmarks.
        harmless_refused: refused of 805 harmless requests, percent.
    """

    attack_success: tuple[float, float]
    capability: tuple[float, float]
    harmless_refused: tuple[float, float]

    def __str__(self) -> str:
        attacks, scores, refused = (
            f"{before:.2f} to {after:.2f}"
            for before, after in (self.attack_success, self.capability, self.harmless_refused)
        )
        return (
            f"Published ({PAPER}, full weights, temperature 0): successful attacks {attacks} %, the mean of 7 suites; "
            f"capability {scores}, the mean of 5 benchmarks; refused {refused} % of 805 harmless requests."
        )


@dataclass(frozen=True)
class Counted:
    """Refusals that this project counted before and after training.

    Attributes:
        harmful, borderline, harmless: refused by the base, refused by the trained model, and asked.
        how: in which runs, as the beginning of a sentence.
        twin, critical: the same of harmless twins of harmful prompts and of requests for help in danger; None where they were
            not asked.
    """

    harmful: tuple[int, int, int]
    borderline: tuple[int, int, int]
    harmless: tuple[int, int, int]
    how: str
    twin: tuple[int, int, int] | None = None
    critical: tuple[int, int, int] | None = None

    def __str__(self) -> str:
        told = [
            f"{kind} {100 * before / asked:.0f} to {100 * after / asked:.0f} % of {asked}"
            for kind, (before, after, asked) in (
                ("harmful", self.harmful),
                ("borderline", self.borderline),
                ("harmless", self.harmless),
                *([("twins", self.twin)] if self.twin else []),
                *([("help in danger", self.critical)] if self.critical else []),
            )
        ]
        return f"{self.how}: refused {', '.join(told)}."


PUBLISHED: Mapping[str, Published] = {
    "Qwen3-4B-Instruct-2507": Published((2.87, 0.91), (71.68, 71.39), (2.24, 3.98)),
    "Qwen2.5-7B-Instruct": Published((4.59, 1.48), (68.90, 69.17), (1.37, 2.73)),
    "Llama-3.2-3B-Instruct": Published((5.26, 4.06), (63.61, 62.86), (2.11, 2.24)),
    "Meta-Llama-3-8B-Instruct": Published((3.75, 3.54), (63.64, 63.18), (1.61, 1.24)),
}
"""By the last part of the model's name."""

_BUNDLED = "added up, on the bundled test prompts"
COUNTED: Mapping[tuple[str, str], Counted] = {
    ("lite", "Qwen2.5-Coder-0.5B-Instruct"): Counted(
        (190, 359, 400),
        (60, 63, 240),
        (24, 17, 400),
        f"Measured by us in four runs, {_BUNDLED}",
        twin=(20, 31, 240),
        critical=(32, 34, 160),
    ),
    ("lite", "Qwen2.5-Coder-1.5B-Instruct"): Counted(
        (249, 261, 300),
        (15, 15, 180),
        (3, 2, 300),
        f"Measured by us in three runs, {_BUNDLED}",
        twin=(15, 19, 180),
        critical=(12, 14, 120),
    ),
    ("paper", "Qwen2.5-Coder-0.5B-Instruct"): Counted(
        (94, 190, 200), (31, 96, 120), (12, 119, 200), f"Measured by us in two runs, {_BUNDLED}", critical=(16, 72, 80)
    ),
}
"""By recipe and the last part of the model's name. docs/results.md has these rows and what they leave open."""


def known_of(recipe: str, model: str) -> str:
    """What is known of training a model by a recipe, in sentences.

    Args:
        recipe: one of `config.RECIPES`.
        model: a hub id or a folder, known by its last part.
    """
    name = PurePath(model).name
    if counted := COUNTED.get((recipe, name)):
        return str(counted)
    if recipe == "lite":
        return f"Not measured on this model. It was measured on {measured_on(model)}."
    if published := PUBLISHED.get(name):
        return f"{published} Not measured by us."
    return f"Published for four other models ({PAPER}). Not measured by us on this one: its own before and after will tell."

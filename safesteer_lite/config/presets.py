"""Presets, one TOML file a model, and recipes, one a way to distil."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from safesteer_lite.config.layers import Values
from safesteer_lite.config.sections import RECIPES
from safesteer_lite.config.toml import flatten, read_toml
from safesteer_lite.errors import ConfigError

RECIPES_IN_WORDS = {
    "lite": "short rollouts, reading directions and anchors",
    "paper": "SafeSteer as published, with LoRA: long rollouts, no anchors",
}

QUICK: Values = {
    "prompts.test": 28,
    "prompts.borderline_test": 20,
    "distill.steps": 4,
    "evaluate.answer_tokens": 32,
    "evaluate.contexts": [],
}
"""What `demo --quick` changes: it shows that everything works, and rates from so few prompts say little more."""


def preset_folder() -> Path:
    """Where the presets are: beside the package in a checkout, inside it once installed."""
    inside = Path(str(resources.files("safesteer_lite") / "presets"))
    # What lies beside an installed package is somebody else's.
    return inside if inside.is_dir() else Path(__file__).parent.parent.parent / "presets"


def preset_names() -> list[str]:
    """Names of all presets."""
    return sorted(path.stem for path in preset_folder().glob("*.toml"))


def preset_values(name: str) -> Values:
    """Settings of the preset `name`, whatever the recipe.

    Raises:
        ConfigError: there is no such preset.
    """
    return flatten({key: value for key, value in _preset(name).items() if key not in RECIPES}, name, [])


def recipe_values(name: str, preset: str = "") -> Values:
    """Settings of a recipe, with what a preset says of its model for that recipe alone (a table such as `[paper.tokens]`).

    Args:
        name: one of `RECIPES`.
        preset: a preset's name; empty for a model without one.

    Raises:
        ConfigError: there is no such recipe, or no such preset.
    """
    if name not in RECIPES:
        raise ConfigError(f"There is no recipe {name!r}.", f"There are: {', '.join(RECIPES)}.")
    values = {"recipe": name, **read_toml(preset_folder() / "recipes" / f"{name}.toml")[0]}
    return values | (flatten(_preset(preset).get(name, {}), preset, []) if preset else {})


def _preset(name: str) -> dict[str, Any]:
    if name not in preset_names():
        raise ConfigError(f"There is no preset {name!r}.", f"There are: {', '.join(preset_names())}.")
    return tomllib.loads((preset_folder() / f"{name}.toml").read_text(encoding="utf-8"))

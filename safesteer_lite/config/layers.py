"""From layers of settings to one configuration.

`--set` flags beat environment variables (`SAFESTEER_LITE__DISTILL__STEPS=12`), which beat the run's TOML file, which beats the
model's preset, which beats the defaults. Unknown keys are refused, and all problems are reported at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safesteer_lite.config.older import RENAMED, why_not
from safesteer_lite.config.sections import SECTIONS, RunConfig, known_settings
from safesteer_lite.config.setting import converted
from safesteer_lite.errors import ConfigError

ENVIRONMENT_PREFIX = "SAFESTEER_LITE__"
LOWEST_TEMPERATURE = 0.01
"""Below it, logits divided by the temperature are no numbers any more."""

Values = dict[str, Any]
"""Settings by dotted name, such as `distill.steps`."""


def build(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> RunConfig:
    """Make a configuration from layers of dotted names, the weakest first.

    Args:
        layers: (where the values come from, values); strings are read as the type of the setting.

    Raises:
        ConfigError: with every problem found, one a line.
    """
    problems: list[str] = []
    merged: dict[str, tuple[str, Any]] = {}
    for origin, values in layers:
        for name, value in values.items():
            merged[RENAMED.get(name, name)] = (origin, value)
    known = known_settings()
    sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    alone: dict[str, Any] = {}
    for name, (origin, raw) in merged.items():
        if (reason := why_not(name, raw)) is not None:
            problems += [f"{origin}: {name} {reason}."] if reason else []
            continue
        if name not in known:
            close = sorted(known, key=lambda other: _distance(name, other))[:3]
            problems.append(f"{origin}: there is no setting {name!r}; near it: {', '.join(close)}.")
            continue
        try:
            value = converted(raw, known[name])
        except ValueError as error:
            problems.append(f"{origin}: {name}: {error}.")
            continue
        section, _, key = name.rpartition(".")
        (sections[section] if section else alone)[key] = value
    config = RunConfig(**{section: kind(**sections[section]) for section, kind in SECTIONS.items()}, **alone)
    problems += _cross_checks(config)
    if problems:
        raise ConfigError("The settings have problems:\n  " + "\n  ".join(problems), "Correct them and start again.")
    return config


def _distance(first: str, second: str) -> float:
    from difflib import SequenceMatcher

    return 1 - SequenceMatcher(None, first, second).ratio()


def _cross_checks(config: RunConfig) -> list[str]:
    problems = []
    if 0 < config.distill.temperature < LOWEST_TEMPERATURE:
        problems.append(f"distill.temperature is 0, the likeliest token, or at least {LOWEST_TEMPERATURE}.")
    if list(config.direction.steering_strengths) != sorted(config.direction.steering_strengths):
        problems.append("direction.steering_strengths must rise: the smallest sufficient one is taken.")
    if config.direction.teacher == "prompted" and (config.direction.source or config.direction.contrast != "requests"):
        problems.append(
            "direction.teacher: a teacher that is prompted has no direction; leave direction.source and contrast out."
        )
    if 1 in config.distill.adapter_strengths:
        problems.append("distill.adapter_strengths: 1, the adapter as trained, is there anyway.")
    return problems


def parse_assignments(assignments: Sequence[str]) -> Values:
    """`["distill.steps=12"]` as dotted names."""
    values: Values = {}
    for text in assignments:
        name, separator, value = text.partition("=")
        if not separator or not name.strip():
            raise ConfigError(f"--set {text}: expected name=value.", "For example: --set distill.steps=12")
        values[name.strip()] = value.strip()
    return values


def from_environment(environment: Mapping[str, str]) -> Values:
    """`SAFESTEER_LITE__DISTILL__STEPS=12` as `distill.steps`."""
    return {
        name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", "."): value
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX)
    }

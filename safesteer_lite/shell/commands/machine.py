"""The commands that need no run: `presets` and `doctor`."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from safesteer_lite import config
from safesteer_lite.errors import UsageError
from safesteer_lite.shell.streams import tell, tell_json


def presets_command(options: argparse.Namespace) -> int:
    """`presets`: the names, or what a run of one would be set to."""
    if options.action == "show":
        if not options.name:
            raise UsageError("Which preset?", f"There are: {', '.join(config.preset_names())}.")
        layers = [(options.name, config.preset_values(options.name))]
        layers.append((f"recipe {options.recipe}", config.recipe_values(options.recipe, options.name)))
        settings = config.build(layers)
        for line in _about(options.name, settings.model.name):
            tell(line)
        tell("# What a run is set to, as a file for --config.")
        if not options.all:
            tell("# --all shows expert settings too, which hardly anybody wants to change.")
        tell(f"\n{config.to_toml(settings, options.name, expert=options.all)}".removesuffix("\n"))
        return 0
    for name in config.preset_names():
        tell(f"{name}  {config.preset_values(name).get('model.name', '')}")
    return 0


def _about(preset: str, model: str) -> list[str]:
    """What is known of a preset's model, as comments."""
    from safesteer_lite.hardware.figures import known_of
    from safesteer_lite.hardware.known import KNOWN
    from safesteer_lite.hardware.units import format_bytes

    told = [f"{preset}: {model}."]
    if known := KNOWN.get(model):
        gated = ", gated" if known.gated else ""
        told = [f"{preset}: {model}, {format_bytes(known.size)} to download, licence {known.licence}{gated}."]
    told += [f"Recipe {name}: {config.RECIPES_IN_WORDS[name]}. {known_of(name, model)}" for name in config.RECIPES]
    lines = [textwrap.wrap(text, 100, initial_indent="# ", subsequent_indent="#   ") for text in told]
    return [*(line for part in lines for line in part), "#"]


def doctor_command(options: argparse.Namespace) -> int:
    """`doctor`: each check with its remedy."""
    from safesteer_lite.hardware.doctor import checks
    from safesteer_lite.hardware.machine import inspect

    found = checks(inspect(Path.cwd()))
    if options.json:
        tell_json([vars(check) for check in found], indent=1)
    else:
        for check in found:
            mark = {True: "ok  ", False: "FAIL", None: "note"}[check.ok]
            tell(f"{mark}  {check.name}: {check.found}")
            if check.remedy and check.ok is not True:
                tell(f"      {check.remedy}")
    return 1 if any(check.ok is False for check in found) else 0

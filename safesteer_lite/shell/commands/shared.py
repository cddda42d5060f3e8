"""What several commands share: settings from flags and files, the base model, the sink."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safesteer_lite import config
from safesteer_lite.errors import ModelError, RunFolderError, UsageError
from safesteer_lite.text import typed_path

if TYPE_CHECKING:
    from safesteer_lite.config import RunConfig
    from safesteer_lite.events import Emit
    from safesteer_lite.runs.folder import RunFolder
    from safesteer_lite.sources.base import Base


DEMO_PRESET = "qwen2.5-coder-0.5b-demo"


def on_terminal() -> bool:
    """Whether somebody can be asked and shown a screen."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def sink(options: argparse.Namespace) -> Emit:
    """Plain lines for people, or JSON Lines for machines."""
    from safesteer_lite.shell.console import SafeConsole
    from safesteer_lite.shell.lines import Json, Lines

    return Json(sys.stdout) if options.json else Lines(SafeConsole())


def settings_from(options: argparse.Namespace, preset: str, file: Path | None, extra: config.Values) -> RunConfig:
    """All layers of settings, the weakest first."""
    values: config.Values = {}
    if file:
        values, named = config.read_toml(file)
        preset = preset or named
    environment = config.from_environment(os.environ)
    flags = config.parse_assignments(options.set)
    if options.seed is not None:
        flags["seed"] = options.seed
    if options.recipe:
        flags["recipe"] = options.recipe
    if options.prompts:
        flags["prompts.training"] = str(options.prompts)
    if options.chat_template:
        flags["model.chat_template"] = str(options.chat_template)
    if options.column:
        flags["prompts.column"] = options.column
    if options.direction_from:
        flags["direction.source"] = options.direction_from
    asked = flags.get("recipe") or environment.get("recipe")
    if file and asked and asked != values.get("recipe", asked):
        raise UsageError(
            f"{file} has the settings of the recipe {values['recipe']}, under which --recipe {asked} would be lost.",
            "Leave one of the two out.",
        )
    recipe = str(asked or values.get("recipe") or config.RECIPES[0])
    layers = [(f"preset {preset}", config.preset_values(preset))] if preset else []
    layers.append((f"recipe {recipe}", config.recipe_values(recipe, preset)))
    if file:
        layers.append((str(file), values))
    layers.append(("command", extra))
    layers.append(("environment", environment))
    layers.append(("flag", flags))
    settings = config.build(layers)
    return whole_places(settings)


def whole_places(settings: RunConfig) -> RunConfig:
    """The settings with every place on this machine from the root on, so that a run can be resumed from another folder."""
    own = settings.prompts
    own = replace(own, training=_whole_path(own.training), folder=_whole_path(own.folder))
    model = replace(
        settings.model,
        name=_whole_name(settings.model.name),
        chat_template=_whole_path(settings.model.chat_template),
    )
    direction = replace(settings.direction, source=_whole_name(settings.direction.source))
    return replace(settings, prompts=own, model=model, direction=direction)


def _whole_name(name: str) -> str:
    """A model's name; a path is kept from the root on, since from elsewhere `models/mine` would be sought on the hub."""
    place = typed_path(name)
    # Links stay: what they lead to may be called by a commit's hash.
    return os.path.abspath(place) if name and place.exists() else name  # noqa: PTH100


def _whole_path(place: str) -> str:
    try:
        return str(Path(place).resolve()) if place else ""
    except (OSError, RuntimeError) as error:  # Links that lead in a circle, or a name that is too long.
        raise UsageError(f"{place} cannot be looked up: {error}.", "Name another file.") from error


def effort(options: argparse.Namespace) -> config.Values:
    """The settings that `--effort` means."""
    from safesteer_lite.hardware.pace import effort_values

    return effort_values(options.effort) if options.effort else {}


def run_settings(options: argparse.Namespace) -> RunConfig:
    """The settings that a `run` command line means.

    Raises:
        UsageError: it names no model, or its settings have problems.
    """
    if not options.model and not options.config:
        raise UsageError(
            "There is no model to run.", "Name a preset, a Hub id, a folder or a GGUF file, or give --config FILE."
        )
    preset, extra = "", effort(options)
    if options.model in config.preset_names():
        preset = options.model
    elif options.model:
        extra["model.name"] = options.model
    settings = settings_from(options, preset, options.config, extra)
    if not settings.model.name:
        raise UsageError(
            "The settings name no model.", "Set model.name, or name a preset, a Hub id, a folder or a GGUF file."
        )
    return settings


def given_template(settings: RunConfig) -> str:
    """The chat template that the settings name; empty for the model's own."""
    from safesteer_lite.sources.words import read_template

    return read_template(Path(settings.model.chat_template)) if settings.model.chat_template else ""


def resolve(settings: RunConfig, emit: Emit, template: str | None = None) -> Base:
    """The base model that the settings name, fetched if need be.

    Args:
        settings: all settings.
        emit: sink for events.
        template: the chat template that takes the place of the model's own; None for the one that the settings name.
    """
    from safesteer_lite.sources.base import open_base
    from safesteer_lite.sources.demo import DEMO, demo_model
    from safesteer_lite.sources.resolve import resolve_model

    if template is None:
        template = given_template(settings)
    if settings.model.name == DEMO.name:
        return open_base(demo_model(emit), template)
    return resolve_model(settings.model.name, settings.model.revision or None, emit, template=template)


def base_of_run(
    folder: RunFolder, settings: RunConfig, place: Path | None, emit: Emit, *, prompts: bool = True
) -> Base:
    """A run's base model: where it was, or where the user says it is now; never another one.

    Args:
        folder: the run.
        settings: its own settings.
        place: the folder that the user names; None where it was.
        emit: sink for events.
        prompts: whether the run's prompts are needed too, which must not have changed either.

    Raises:
        ModelError: it is not there, cannot be used, or is another model.
        PromptError: the prompts are needed and have changed.
    """
    from safesteer_lite.stages.pipeline import check_origin

    named = settings
    if place:
        # An absolute path is never taken for the name of a model on the hub.
        named = replace(settings, model=replace(settings.model, name=str(place.absolute())))
    try:
        base = resolve(named, emit, folder.chat_template if settings.model.chat_template else "")
    except ModelError as error:
        raise ModelError(
            f"The run's base model cannot be used: {error.message}",
            f"{error.hint} If it lies elsewhere now, name its folder with --base.".strip(),
        ) from error
    check_origin(settings, folder, base, prompts=prompts)
    return base


def settings_of(folder: RunFolder) -> config.Values:
    """The settings a run was started with, by dotted name.

    Raises:
        RunFolderError: its config.toml is lost, or is no longer what was written.
    """
    values = config.parse_toml(folder.settings(), str(folder.config_path))[0]
    if not values.get("model.name"):
        raise RunFolderError(
            f"{folder.config_path} names no model, so it is not the whole of this run's settings.",
            "Restore it from a copy, or start a new run.",
        )
    return values


def open_settings(folder: RunFolder) -> RunConfig:
    """The settings a run was started with."""
    return config.build([(str(folder.config_path), settings_of(folder))])

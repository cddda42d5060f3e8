"""The commands `export` and `verify`: what they check at once, what they do, how they tell it."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safesteer_lite.commands.shared import open_settings, resolve, sink
from safesteer_lite.errors import ModelError, UsageError

if TYPE_CHECKING:
    from safesteer_lite.config import RunConfig
    from safesteer_lite.events import Emit


def check_flags(options: argparse.Namespace) -> None:
    """Refuse what the command line alone shows to be wrong.

    Raises:
        UsageError: a flag is out of range, or does not go with the others.
    """
    if not 0 <= options.strength <= 1.5:
        raise UsageError(f"--strength {options.strength:g} is outside 0 to 1.5.", "1 is the trained model, 0 the base.")
    if options.quant and options.to != "gguf":
        raise UsageError("--quant is for GGUF files only.", "Add --to gguf.")
    if options.measure < 0:
        raise UsageError(f"--measure {options.measure} is negative.", "0 measures on all test prompts.")
    if options.public and not options.push:
        raise UsageError("--public is for uploads only.", "Add --push NAME.")


def export_command(options: argparse.Namespace) -> int:
    """`export`: the adapter, merged weights or GGUF files, to a folder of the user's choice; uploaded only if asked."""
    from safesteer_lite import rundir
    from safesteer_lite.export.push import check_push
    from safesteer_lite.pipeline import export_run

    check_flags(options)
    folder, emit = rundir.open_run(options.run, options.runs), sink(options)
    out = options.out or folder.path / f"export-{options.to}-{options.weights}-{options.strength:g}"
    if out.exists():
        raise UsageError(f"{out} exists already.", "Name a folder that does not exist with --out.")
    name = check_push(options.push) if options.push else ""
    settings = open_settings(folder)
    model_folder = _base_of(settings, options.base, emit)
    record = export_run(
        settings,
        folder,
        model_folder,
        emit,
        options.to,
        out,
        options.weights,
        options.strength,
        quants=tuple(dict.fromkeys(options.quant or ["Q8_0"])),
        prompts=options.measure,
    )
    _show(options, out, record)
    if name:
        _push(options, out, name)
    return 0


def verify_command(options: argparse.Namespace) -> int:
    """`verify`: whether an exported folder is as it was written."""
    from safesteer_lite.export.verify import check_sums

    count = check_sums(options.folder)
    _line(options, {"event": "Verified", "files": count}, f"{count} files are whole.")
    return 0


def _base_of(settings: RunConfig, place: Path | None, emit: Emit) -> Path:
    """The folder of a run's base model: where it was, or where the user says it is now."""
    if place:
        # An absolute path is never taken for the name of a model on the hub.
        settings = replace(settings, model=replace(settings.model, name=str(place.resolve())))
    try:
        return resolve(settings, emit)
    except ModelError as error:
        raise ModelError(
            f"The run's base model cannot be used: {error.message}",
            f"{error.hint} If it lies elsewhere now, name its folder with --base.".strip(),
        ) from error


def _show(options: argparse.Namespace, out: Path, record: dict[str, Any]) -> None:
    if record and options.json:
        _line(options, {"event": "Artefacts", **record}, "")
    elif record:
        from rich.console import Console

        from safesteer_lite.console import artefacts_table

        Console(highlight=False).print(artefacts_table(record))
    _line(options, {"event": "Exported", "path": str(out)}, str(out))


def _push(options: argparse.Namespace, out: Path, name: str) -> None:
    from safesteer_lite.export.push import push

    address = push(out, name, options.public)
    _line(options, {"event": "Pushed", "address": address}, address)


def _line(options: argparse.Namespace, record: dict[str, Any], text: str) -> None:
    """One line of the result, for machines or for people."""
    from safesteer_lite.console import dump

    sys.stdout.write((dump(record).replace("\n", " ") if options.json else text) + "\n")

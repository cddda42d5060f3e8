"""The commands `export` and `verify`: what they check at once, what they do, how they tell it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safesteer_lite.errors import ExportError, UsageError
from safesteer_lite.shell.commands.shared import base_of_run, open_settings, resolve, sink
from safesteer_lite.shell.streams import tell, tell_json
from safesteer_lite.text import typed_path

if TYPE_CHECKING:
    from safesteer_lite.config import RunConfig
    from safesteer_lite.events import Emit
    from safesteer_lite.sources.base import Base


def check_flags(options: argparse.Namespace) -> None:
    """Refuse what the command line alone shows to be wrong.

    Raises:
        UsageError: a flag is out of range, or does not go with the others.
    """
    if not 0 <= options.strength <= 2:
        raise UsageError(f"--strength {options.strength:g} is outside 0 to 2.", "1 is the trained model, 0 the base.")
    if options.strength != 1 and options.to == "lora-gguf":
        raise UsageError(
            "--strength is for merged weights and GGUF files: an adapter's file has its scale set where it is loaded.",
            "Leave it out, and give llama.cpp `--lora-scaled FILE:0.5`.",
        )
    if options.quant and options.to != "gguf":
        raise UsageError("--quant is for GGUF files only.", "Add --to gguf.")
    if options.measure < 0:
        raise UsageError(f"--measure {options.measure} is negative.", "0 measures on all test prompts.")
    if options.original and options.weights == "dequantised":
        raise UsageError("--original and --weights dequantised exclude each other.", "Leave one of them out.")
    if options.public and not options.push:
        raise UsageError("--public is for uploads only.", "Add --push NAME.")


def export_command(options: argparse.Namespace) -> int:
    """`export`: the adapter, merged weights or GGUF files, to a folder of the user's choice; uploaded only if asked."""
    from safesteer_lite.export.push import check_push
    from safesteer_lite.runs import folder as run_folders
    from safesteer_lite.stages.finished import export_run

    check_flags(options)
    folder, emit = run_folders.open_run(options.run, options.runs), sink(options)
    if options.out and options.out.exists():
        raise _taken(options.out)
    name = check_push(options.push, options.public) if options.push else ""
    settings = open_settings(folder)
    base = base_of_run(folder, settings, options.base, emit)
    weights, original = _weights_of(options, settings, base, emit)
    kind = f"{options.to}-{weights}-{options.strength:g}" if weights else options.to
    out = options.out or folder.path / f"export-{kind}"
    if out.exists():
        raise _taken(out)
    record = export_run(
        settings,
        folder,
        base,
        emit,
        options.to,
        out,
        weights,
        options.strength,
        quants=tuple(dict.fromkeys(options.quant or ["Q8_0"])),
        prompts=options.measure,
        original=original,
    )
    _show(options, out, record)
    if name:
        _push(options, out, name)
    return 0


def verify_command(options: argparse.Namespace) -> int:
    """`verify`: whether an exported folder is as it was written."""
    from safesteer_lite.export.weights.verify import check_sums

    count = check_sums(options.folder)
    _line(options, {"event": "Verified", "files": count}, f"{count} files are whole.")
    return 0


def _weights_of(options: argparse.Namespace, settings: RunConfig, base: Base, emit: Emit) -> tuple[str, Path | None]:
    """What to merge into, and where the 16-bit original of a 4-bit base lies; fetched only if the user named it.

    Raises:
        UsageError: an original was named that is not needed.
        ExportError: original weights are asked for and not here, or are those of another model.
        ModelError: the original that was named cannot be had.
    """
    from safesteer_lite.events import Note
    from safesteer_lite.export.weights import original

    name = settings.model.name
    if options.to == "adapter":
        return "", None
    if not base.is_quantised:
        if options.original:
            raise UsageError("The run's base has its 16-bit weights, so there is no other original.", "Leave it out.")
        return options.weights or "original", None
    folder: Path | None = None
    if options.original:
        place = typed_path(options.original)
        wanted = str(place.resolve()) if place.exists() else options.original
        named = replace(settings, model=replace(settings.model, name=wanted, revision=""))
        folder = resolve(named, emit, base.template).folder
    elif options.weights == "original":
        found = original.find_original(base.folder, name)
        if found is None or found.folder is None:
            raise ExportError(
                f"Original weights are not at hand. {original.describe_original(base.folder, name)}",
                original.ways_out(base.folder, name),
            )
        folder = found.folder
    if folder is None:
        emit(
            Note(
                "export",
                "Merging into the dequantised weights, which are what was trained. "
                f"{original.describe_original(base.folder, name)}",
            )
        )
        return "dequantised", None
    original.check_same_model(base.folder, folder)
    emit(Note("export", f"Merging into the 16-bit original of the 4-bit base: {options.original or folder.name}."))
    return "original", folder


def _taken(out: Path) -> UsageError:
    return UsageError(f"{out} exists already.", "Name a folder that does not exist with --out.")


def _show(options: argparse.Namespace, out: Path, record: dict[str, Any]) -> None:
    if record and options.json:
        _line(options, {"event": "Artifacts", **record}, "")
    elif record:
        from safesteer_lite.shell.console import SafeConsole
        from safesteer_lite.shell.lines import artifacts_table

        SafeConsole().print(artifacts_table(record))
    _line(options, {"event": "Exported", "path": str(out)}, str(out))


def _push(options: argparse.Namespace, out: Path, name: str) -> None:
    from safesteer_lite.export.push import push

    address = push(out, name, options.public)
    _line(options, {"event": "Pushed", "address": address}, address)


def _line(options: argparse.Namespace, record: dict[str, Any], text: str) -> None:
    """One line of the result, for machines or for people."""
    if options.json:
        tell_json(record)
    else:
        tell(text)

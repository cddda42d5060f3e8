"""What a run's exports measured, kept in the run folder for its report: one row an artefact."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from safesteer_lite.durable import explained, write_atomically
from safesteer_lite.errors import RunFolderError
from safesteer_lite.rundir import RunFolder

FILE = "artefacts.json"
_ORDER = ("base", "adapter", "merged", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
# Exports that agree in these were measured in the same way, and their rows stand in one table.
_SAME = ("weights", "strength", "split", "answer_tokens")


def keep(run: RunFolder, record: Mapping[str, Any]) -> None:
    """Enter an export, as `artefacts.to_record` makes it; rows of the same artefact, measured in the same way, are replaced.

    Args:
        run: the run folder; hold its lock.
        record: the export.

    Raises:
        RunFolderError: the folder cannot be written.
        DiskSpaceError: the disk is full.
    """
    exports: list[dict[str, Any]] = []
    with suppress(RunFolderError):  # A damaged file is written anew.
        exports = read(run)
    rows = {row["artefact"]: row for row in record["artefacts"]}
    for place, other in enumerate(exports):
        if _way(other) == _way(record):
            rows = {**{row["artefact"]: row for row in other["artefacts"]}, **rows}
            del exports[place]
            break
    exports.append({**record, "artefacts": sorted(rows.values(), key=_place)})
    whole = {"distill": run.manifest.stages["distill"].fingerprint, "exports": exports}
    with explained(f"the artefacts of {run.path.name}"):
        write_atomically(run.path / FILE, json.dumps(whole, ensure_ascii=False, indent=1).encode())


def read(run: RunFolder) -> list[dict[str, Any]]:
    """The exports of a run, oldest first; none where there are none, or where the run was trained again since.

    Raises:
        RunFolderError: the file is damaged.
    """
    path, trained = run.path / FILE, run.manifest.stages.get("distill")
    if trained is None or not path.is_file():
        return []
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        exports: list[dict[str, Any]] = record["exports"] if record["distill"] == trained.fingerprint else []
        if not all(row["artefact"] for export in exports for row in export["artefacts"]):
            raise ValueError("a row has no name")
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"{path} is damaged: {error}.", "Restore it from a copy, or delete it for a report without that part."
        ) from error
    return exports


def _way(record: Mapping[str, Any]) -> tuple[object, ...]:
    counts = [record["artefacts"][0][name]["n"] for name in ("harmful", "borderline", "harmless")]
    return (*(record[name] for name in _SAME), *counts)


def _place(row: Mapping[str, Any]) -> int:
    return _ORDER.index(row["artefact"]) if row["artefact"] in _ORDER else len(_ORDER)

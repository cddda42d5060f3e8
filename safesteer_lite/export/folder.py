"""The folder of an export: whole under its name, kept aside where a check failed, and nothing at all otherwise."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safesteer_lite.export import drafts
from safesteer_lite.export.rows import ARTIFACTS
from safesteer_lite.export.weights import merge
from safesteer_lite.export.weights.verify import SUMS, FailedCheck
from safesteer_lite.runs.durable import remove

WORK = "work"
"""Inside an export that is being written: what it needs on the way and does not keep."""
MERGED = "merged"
"""In there: the merged weights, with which a killed export goes on."""


def file_name(model: str) -> str:
    """A model's name as part of a file's name and of a command: letters, digits, dots, dashes and underscores.

    Args:
        model: an id on the model hub, a folder or a GGUF file, of which the last part counts.
    """
    # A name such as `.` says nothing before it is a whole path.
    last = Path(model).name.removesuffix(".gguf").replace("..", "") or Path(model).resolve().name
    return re.sub(r"[^\w.]+", "-", last).strip("-.") or "model"


@contextmanager
def exported(out: Path) -> Iterator[Path]:
    """A folder to write an export in; it gets its name when the block ends well.

    Where a check fails, the files stay beside that name under one that says so. After any other error nothing stays; only
    a killed process leaves its draft, of which the next attempt takes over the merged weights.

    Args:
        out: the final name; must not exist.

    Raises:
        FailedCheck: a check failed inside; its hint names the folder that was kept.
        ExportError: the folder exists already or cannot be written.
        DiskSpaceError: the disk ran full.
    """
    with drafts.published(out, _is_ours, (WORK,)) as draft:
        _keep_merged(draft / WORK)
        try:
            yield draft
            shutil.rmtree(draft / WORK, ignore_errors=True)
        except FailedCheck as error:
            kept = next(path for path in _names_aside(out) if not path.exists())
            draft.rename(kept)
            error.hint = f"{error.hint} The files are kept in {kept}, to look at and not to use.".strip()
            raise


def _keep_merged(work: Path) -> None:
    """Clear all that a killed export left in its work folder but merged weights: half a GGUF file is of no use."""
    merged = work / MERGED
    for entry in work.iterdir() if work.is_dir() else ():
        if entry.is_symlink() or not entry.is_dir() or entry not in (merged, drafts.draft_name(merged)):
            remove(entry)


def _names_aside(out: Path) -> Iterator[Path]:
    yield out.with_name(f"{out.name}.failed-check")
    for number in itertools.count(2):
        yield out.with_name(f"{out.name}.failed-check-{number}")


def _is_ours(name: str) -> bool:
    fixed = (WORK, ARTIFACTS, SUMS, "README.md")
    return name in fixed or name.startswith(("Modelfile", "adapter_")) or ".gguf" in name or merge.is_ours(name)

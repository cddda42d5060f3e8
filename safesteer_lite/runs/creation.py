"""A new run: its folder, which is there whole under a name of its own or not at all, with what it takes of another run."""

from __future__ import annotations

import hashlib
import itertools
import re
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from safesteer_lite.runs.durable import (
    explained,
    remove,
    rename_to_free_name,
    sync_folder,
    sync_tree,
    write_atomically,
)
from safesteer_lite.runs.folder import CHAT_TEMPLATE, RunFolder
from safesteer_lite.runs.manifest import Json, Manifest, StageRecord, manifest_bytes

_NEW_RUN = re.compile(r"\.[0-9a-f]{32}")
_MAKING_SECONDS = 60.0


@dataclass(frozen=True)
class Taken:
    """What a new run begins with of another one.

    Attributes:
        source: the folder that the files lie in.
        record: what the new run's manifest shall hold on them; its artifacts are copied, and nothing else.
    """

    source: Path
    record: StageRecord


def create_run(
    parent: Path,
    label: str,
    settings: str = "",
    *,
    planned: Sequence[str] = (),
    versions: Mapping[str, str] | None = None,
    made_from: Mapping[str, str] | None = None,
    chat_template: str = "",
    loaded: Mapping[str, Json] | None = None,
    taken: Mapping[str, Taken] | None = None,
    run_date: str = "",
) -> RunFolder:
    """Make a new run folder, which no other process gets too, and which only its owner may look into.

    Args:
        parent: the folder of all runs, `RUNS_FOLDER` unless the user chose another; it is made if missing.
        label: the start of the folder's name, usually the model's; what file systems dislike becomes a hyphen.
        settings: the content of `config.toml`, which never changes from now on.
        planned: the stages whose results make the run finished.
        versions: package versions to keep in the manifest.
        made_from: fingerprints to keep of what the run starts from and is not in its folder, by what it is.
        chat_template: the one that the user gives; empty for the model's own, of which nothing is kept.
        loaded: how its model is loaded, to be kept.
        taken: results of another run, by the names of their stages.
        run_date: the day, ISO 8601, that chat templates are told; empty for today.

    Raises:
        RunFolderError: the folder cannot be written.
        DiskSpaceError: the disk is full.
    """
    slug = re.sub(r"[^A-Za-z0-9._]+", "-", label).strip("-.")[:60] or "run"
    stem = f"{slug}-{datetime.now():%Y%m%d-%H%M%S}"
    content = settings.encode("utf-8", "surrogateescape")
    manifest = Manifest(
        created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        versions=dict(versions or {}),
        planned=tuple(planned),
        stages={name: other.record for name, other in (taken or {}).items()},
        run_date=run_date or date.today().isoformat(),
        config_sha256=hashlib.sha256(content).hexdigest(),
        made_from=dict(made_from or {}),
        loaded=dict(loaded or {}),
    )
    # The folder gets its name only when settings and manifest are inside, so a kill never leaves a run that cannot be
    # opened. Renaming onto a folder that is not empty fails, which makes the name exclusive.
    draft = parent / f".{uuid.uuid4().hex}"
    with explained(f"a new run folder in {parent}"):
        parent.mkdir(parents=True, exist_ok=True)
        _sweep_drafts(parent)
        try:
            # What is in there was said to, and by, a model that answers harmful requests.
            draft.mkdir(mode=0o700)
            for other in (taken or {}).values():
                _copy_taken(other, draft)
            write_atomically(draft / "config.toml", content)
            if chat_template:
                write_atomically(draft / CHAT_TEMPLATE, chat_template.encode())
            write_atomically(draft / "manifest.json", manifest_bytes(manifest))
            for attempt in itertools.count(1):
                path = parent / (stem if attempt == 1 else f"{stem}-{attempt}")
                if not path.exists() and rename_to_free_name(draft, path):
                    break
            sync_folder(parent)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    return RunFolder(path)


def _copy_taken(other: Taken, run: Path) -> None:
    folder = run / other.record.folder
    for name in other.record.artifacts:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(other.source / name, folder / name)
    sync_tree(folder)


def _sweep_drafts(parent: Path) -> None:
    """Clear away what killed processes left of runs they were making, which takes one that lives milliseconds."""
    for path in parent.iterdir():
        if _NEW_RUN.fullmatch(path.name):
            with suppress(OSError):
                if time.time() - path.lstat().st_mtime > _MAKING_SECONDS:
                    remove(path)

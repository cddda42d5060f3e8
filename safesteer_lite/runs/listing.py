"""The list of runs: what each has done, and what is wrong with those that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safesteer_lite.errors import RunFolderError
from safesteer_lite.runs.durable import explained
from safesteer_lite.runs.folder import RUNS_FOLDER, RunFolder
from safesteer_lite.runs.manifest import PARENT


@dataclass(frozen=True)
class RunSummary:
    """One line of the list of runs; `damage` says what is wrong with a folder that cannot be read, else it is empty."""

    name: str
    path: Path
    created: str
    stages: tuple[str, ...]
    finished: bool
    damage: str = ""


def list_runs(parent: Path = RUNS_FOLDER) -> list[RunSummary]:
    """Summarise every run under `parent`, newest first; folders that cannot be read come last, with what is wrong.

    Raises:
        RunFolderError: `parent` exists but cannot be listed.
    """
    with explained(f"the list of runs in {parent}"):
        if not parent.exists():
            return []
        folders = [path for path in parent.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(map(_summarise, folders), key=lambda run: (run.created, run.name), reverse=True)


def _summarise(path: Path) -> RunSummary:
    try:
        run = RunFolder(path)
        manifest = run.manifest
        done = tuple(name for name, record in manifest.stages.items() if name != PARENT and record.has_its_sizes(path))
        run.settings()  # Without them it can be listed, and nothing else.
    except (RunFolderError, OSError) as error:
        return RunSummary(path.name, path, "", (), False, getattr(error, "message", str(error)))
    finished = bool(manifest.planned) and set(manifest.planned) <= set(done)
    return RunSummary(path.name, path, manifest.created, done, finished)

"""What the tests of the run folder write into it, and what must then be there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safesteer_lite.runs.durable import sha256_of
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.runs.manifest import manifest_bytes


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file but the lock's own, by its path inside `folder`."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def rewind(folder: Path, stages: Sequence[str], settings: str | None = None) -> None:
    """Make a run one that has not done these stages; and, if asked, one that was started with other settings."""
    manifest = RunFolder(folder).manifest
    for stage in stages:
        shutil.rmtree(folder / manifest.stages[stage].folder)
    kept = {name: record for name, record in manifest.stages.items() if name not in stages}
    manifest = replace(manifest, stages=kept)
    if settings is not None:
        (folder / "config.toml").write_bytes(settings.encode())
        manifest = replace(manifest, config_sha256=sha256_of(folder / "config.toml"))
    (folder / "manifest.json").write_bytes(manifest_bytes(manifest))


def publish(run: RunFolder, stage: str, number: int, mark: str) -> None:
    with run.publish(stage, number, mark) as publication:
        (publication.path / "sub").mkdir()
        (publication.path / "a.bin").write_bytes(mark.encode() * 1000)
        (publication.path / "sub" / "b.txt").write_bytes(mark.encode())
        publication.result["mark"] = mark


def published_files(folder: str, mark: str) -> dict[str, bytes]:
    return {f"{folder}/a.bin": mark.encode() * 1000, f"{folder}/sub/b.txt": mark.encode()}


def writer_of(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "adapter.bin").write_bytes(text.encode() * 500)
        (folder / "state.json").write_text(text)

    return write


def report_of(run: Path) -> dict[str, Any]:
    """The `report.json` of a run."""
    report: dict[str, Any] = json.loads((run / "report.json").read_text(encoding="utf-8"))
    return report

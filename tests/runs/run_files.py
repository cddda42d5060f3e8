"""What the tests of the run folder write into it, and what must then be there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safesteer_lite.runs.folder import RunFolder


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file but the lock's own, by its path inside `folder`."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


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

"""Checkpoints: the saved steps of a stage in progress, from which a killed run goes on."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safesteer_lite.runs.durable import (
    discard,
    draft_of,
    explained,
    put_in_place,
    remove_leftovers,
    sync_tree,
    write_atomically,
)

_STEP_FOLDER = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoints:
    """The saved steps of a stage in progress, each whole; make it with `RunFolder.checkpoint`.

    Steps that were saved under another fingerprint belong to other settings: the first call to `save_checkpoint` or
    `newest_checkpoint` removes them.
    """

    folder: Path
    fingerprint: str

    def save_checkpoint(self, step: int, write: Callable[[Path], None]) -> Path:
        """Save one step.

        Args:
            step: optimizer step, from 0; a step that is saved already is replaced.
            write: writes the step's files in the empty folder it is given.

        Returns:
            The step's folder.

        Raises:
            RunFolderError: the folder cannot be written.
            DiskSpaceError: the disk is full.
        """
        self._claim()
        final = self.folder / f"step-{step:06d}"
        with draft_of(final, f"the checkpoint of step {step}") as draft:
            write(draft)
            with explained(f"the checkpoint of step {step}"):
                sync_tree(draft)
                put_in_place(draft, final)
        return final

    def newest_checkpoint(self) -> tuple[int, Path] | None:
        """The last whole step with its folder, or None where there is none for this fingerprint."""
        self._claim()
        steps = self._steps()
        return steps[-1] if steps else None

    def prune(self, keep: int) -> None:
        """Remove all steps but the `keep` newest.

        Raises:
            RunFolderError: a step cannot be removed.
        """
        steps = self._steps()
        with explained(f"the removal of old checkpoints in {self.folder.parent.name}"):
            for _, path in steps[: max(len(steps) - keep, 0)]:
                discard(path)

    def _claim(self) -> None:
        """Make the folder this fingerprint's own, without anything that a killed process left in it."""
        with explained(f"the checkpoints in {self.folder.parent.name}"):
            if read_mark(self.folder) != self.fingerprint:
                discard(self.folder)
                self.folder.mkdir()
                write_atomically(self.folder / "fingerprint", self.fingerprint.encode("utf-8"))
            remove_leftovers(self.folder, _STEP_FOLDER)

    def _steps(self) -> list[tuple[int, Path]]:
        if not self.folder.exists():
            return []
        matches = ((_STEP_FOLDER.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted((int(match.group(1)), path) for match, path in matches if match)


def read_mark(partial: Path) -> str | None:
    """The fingerprint that a folder of checkpoints belongs to, None where there is none."""
    try:
        return (partial / "fingerprint").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None

"""Checkpoints: the saved steps of a stage in progress, from which a killed run goes on."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from safesteer_lite.errors import RunFolderError
from safesteer_lite.runs.durable import (
    discard,
    draft_of,
    explained,
    put_in_place,
    read_json,
    remove_leftovers,
    sync_tree,
    write_atomically,
    write_json,
)
from safesteer_lite.runs.manifest import artifacts_of

_STEP_FOLDER = re.compile(r"step-(\d{6,})")
_SUMS = "sums.json"


@dataclass(frozen=True)
class Checkpoints:
    """The saved steps of a stage in progress, each whole; make it with `RunFolder.checkpoint`.

    Steps that were saved under another fingerprint belong to other settings: the first call to `save_checkpoint` or
    `newest_checkpoint` removes them.

    Attributes:
        folder: where they are.
        fingerprint: what the stage's result depends on.
        warn: takes a sentence for the user where saved steps cannot be used.
    """

    folder: Path
    fingerprint: str
    warn: Callable[[str], None] = lambda message: None

    def save_checkpoint(self, step: int, write: Callable[[Path], None]) -> Path:
        """Save one step, with the sums of its files.

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
        with draft_of(final, f"the checkpoint of step {step}") as draft, explained(f"the checkpoint of step {step}"):
            write(draft)
            write_json(draft / _SUMS, _sums(draft, step))
            sync_tree(draft)
            put_in_place(draft, final)
        return final

    def newest_checkpoint(self) -> tuple[int, Path] | None:
        """The last step whose files are what was saved, with its folder; None where there is none for this fingerprint.

        Damaged steps are removed, and `warn` is told.
        """
        self._claim()
        for step, path in reversed(self._steps()):
            if _is_whole(path, step):
                return step, path
            self.warn(f"The saved step {step} is damaged; training goes on from the one before, or begins anew.")
            with explained(f"the removal of a damaged step in {self.folder.parent.name}"):
                discard(path)
        return None

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
            if self.folder.is_symlink() or read_mark(self.folder) != self.fingerprint:
                if self._steps():
                    self.warn("The saved steps do not belong to these settings, so training begins anew.")
                discard(self.folder)
                self.folder.mkdir()
                write_atomically(self.folder / "fingerprint", self.fingerprint.encode("utf-8"))
            remove_leftovers(self.folder, _STEP_FOLDER)

    def _steps(self) -> list[tuple[int, Path]]:
        if not self.folder.is_dir():
            return []
        matches = ((_STEP_FOLDER.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted((int(match.group(1)), path) for match, path in matches if match)


def read_mark(partial: Path) -> str | None:
    """The fingerprint that a folder of checkpoints belongs to, None where there is none."""
    try:
        return (partial / "fingerprint").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _sums(folder: Path, step: int) -> dict[str, object]:
    """What `sums.json` of a step holds: its number too, since a folder may be renamed."""
    files = {name: asdict(artifact) for name, artifact in artifacts_of(folder).items() if name != _SUMS}
    return {"step": step, "files": files}


def _is_whole(folder: Path, step: int) -> bool:
    try:
        return read_json(folder / _SUMS, "the sums of a saved step") == _sums(folder, step)
    except (RunFolderError, OSError):
        return False

"""Room on the disk, asked for before anything large is written. Sizes are bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

from safesteer_lite.errors import DiskSpaceError
from safesteer_lite.hardware.units import format_bytes


def disk_free(folder: Path) -> int:
    """Free bytes where `folder` is, or will be."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def check_disk(folder: Path, bytes_needed: int, what: str) -> None:
    """Raise unless `what` fits.

    Args:
        folder: where it will be written; it need not exist yet.
        bytes_needed: its size.
        what: what will be written, as the user would call it ("the merged model").

    Raises:
        DiskSpaceError: there is less room than that.
    """
    free = disk_free(folder)
    if free < bytes_needed:
        raise DiskSpaceError(
            f"There is not enough room for {what}: {bytes_needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free "
            f"at {folder}.",
            f"Free {format_bytes(bytes_needed - free)} there, or choose a folder on another disk.",
        )

"""Folders in the making: room is looked for before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from safesteer_lite.errors import DiskSpaceError
from safesteer_lite.export import drafts


def test_room_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    drafts.require_space(tmp_path / "new" / "out", free // 2)
    with pytest.raises(DiskSpaceError, match=r"room for out: .* GB needed, .* GB free"):
        drafts.require_space(tmp_path / "new" / "out", free * 2)
    assert list(tmp_path.iterdir()) == []

"""Room on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from safesteer_lite.errors import DiskSpaceError
from safesteer_lite.hardware.machine import check_disk, disk_free
from tests.hardware.examples import GB


def test_check_disk_says_what_is_needed_and_free(tmp_path: Path) -> None:
    check_disk(tmp_path / "new" / "folder", 1, "the report")
    free = disk_free(tmp_path)
    with pytest.raises(DiskSpaceError) as error:
        check_disk(tmp_path / "new", free + 5 * GB, "the merged model")
    assert "the merged model" in error.value.message
    assert f"{(free + 5 * GB) / GB:.1f} GB needed" in error.value.message
    assert error.value.hint

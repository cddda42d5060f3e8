"""Downloads: where they are kept, whether there is room, and how they report."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from safesteer_lite.errors import DiskSpaceError
from safesteer_lite.events import Event, Progress
from safesteer_lite.sources.download import cache_folder, progress_by_growth, require_space


def test_cache_folder_is_the_platforms_unless_one_is_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offline: None
) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("SAFESTEER_LITE_CACHE")
    assert cache_folder().name == "safesteer-lite"
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_folder() == tmp_path / "xdg" / "safesteer-lite"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_folder() == Path.home() / ".cache" / "safesteer-lite"


def test_progress_by_growth_ends_at_what_arrived(tmp_path: Path) -> None:
    events: list[Event] = []
    with progress_by_growth(tmp_path / "into", 1000, events.append, "model", "bytes"):
        (tmp_path / "into").mkdir()
        (tmp_path / "into" / "file").write_bytes(b"x" * 400)
    assert events == [Progress("model", "bytes", 400, 1000)]


def test_require_space_looks_at_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1, "Nothing")
    with pytest.raises(DiskSpaceError, match="room for everything"):
        require_space(tmp_path / "not" / "yet", 1 << 62, "everything")

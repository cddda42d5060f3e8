"""Checkpoints: damage is found and named, and room is looked for before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from safesteer_lite.errors import DiskSpaceError, ExportError
from safesteer_lite.export.weights import shards
from safesteer_lite.export.weights.merge import merge_adapter


def test_room_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    shards.require_space(tmp_path / "new" / "out", free // 2)
    with pytest.raises(DiskSpaceError, match=r"room for out: .* GB needed, .* GB free"):
        shards.require_space(tmp_path / "new" / "out", free * 2)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_shard_is_named(tmp_path: Path, base: Path, adapter: Path) -> None:
    shard = min(base.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ExportError, match=rf"{shard.name} is damaged"):
        merge_adapter(base, adapter, tmp_path / "out")


def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    path = base / shards.INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra"] = min(index["weight_map"].values())
    path.write_text(json.dumps(index))
    with pytest.raises(ExportError, match=r"model\.extra"):
        merge_adapter(base, adapter, tmp_path / "out")

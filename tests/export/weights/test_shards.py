"""Checkpoints: damage is found and named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from safesteer_lite.errors import ExportError
from safesteer_lite.export.weights import shards
from safesteer_lite.export.weights.merge import merge_adapter
from safesteer_lite.sources.folder import INDEX


def test_a_truncated_shard_is_named(tmp_path: Path, base: Path, adapter: Path) -> None:
    shard = min(base.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ExportError, match=rf"{shard.name} is damaged"):
        merge_adapter(base, adapter, tmp_path / "out")


def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    path = base / INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra"] = min(index["weight_map"].values())
    path.write_text(json.dumps(index))
    with pytest.raises(ExportError, match=r"model\.extra"):
        merge_adapter(base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/model.safetensors", "../model.safetensors", "a/../model.safetensors", "..\\model.safetensors"),
        *("C:x.safetensors", "model.bin", ".safetensors", "a\nb.safetensors", ""),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused_before_anything_is_read(
    tmp_path: Path, base: Path, name: str
) -> None:
    path = base / INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ExportError, match="names weight files that do not lie in it"):
        shards.read_checkpoint(base)


@pytest.mark.skipif(os.name == "nt", reason="pipes are no files there")
def test_a_pipe_in_place_of_weights_is_not_waited_for(base: Path) -> None:
    shard = min(base.glob("*.safetensors"))
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(ExportError, match="no regular file"):
        shards.read_checkpoint(base)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, "8"]},
        {"dtype": "F32", "shape": [2], "data_offsets": []},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]},
        ["F32"],
        None,
    ],
)
def test_a_header_that_cannot_be_true_is_damage(tmp_path: Path, entry: object) -> None:
    header = json.dumps({"x": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ExportError, match="damaged or incomplete"):
        shards.read_shard(path)

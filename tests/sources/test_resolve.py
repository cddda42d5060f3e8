"""Which name is taken for what, and that a fingerprint tells models apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safesteer_lite.errors import ModelError
from safesteer_lite.events import discard
from safesteer_lite.sources.base import model_fingerprint
from safesteer_lite.sources.resolve import resolve_model

pytestmark = pytest.mark.usefixtures("offline")


def test_local_folder_is_taken_as_it_is(model_folder: Path) -> None:
    assert resolve_model(str(model_folder), None, discard).folder == model_folder


@pytest.mark.parametrize("name", ["./missing", "missing", "model.gguf", "owner/name/more", "owner/", ""])
def test_what_is_neither_folder_nor_id_is_refused_at_once(name: str, tmp_path: Path) -> None:
    if not name:
        name = str(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"neither a folder nor|There is no file model\.gguf"):
        resolve_model(name, None, discard)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text("[]"), True),
        (lambda folder: (folder / "generation_config.json").write_text("{}"), True),
        (lambda folder: (folder / "model.safetensors").rename(folder / "other.safetensors"), True),
        (lambda folder: save_file({"weight": torch.ones(1 << 20)}, folder / "model.safetensors"), True),
        (lambda folder: flip_byte(folder / "model.safetensors", 10), True),
        (lambda folder: flip_byte(folder / "model.safetensors", 200), True),
        (lambda folder: flip_byte(folder / "model.safetensors", -1), True),
        # Documented as unseen: the price of not reading many gigabytes at every start.
        (lambda folder: flip_byte(folder / "model.safetensors", 2 << 20), False),
        (lambda folder: (folder / "README.md").write_text("card"), False),
    ],
)
def test_fingerprint(model_folder: Path, change: Callable[[Path], object], differs: bool) -> None:
    before = model_fingerprint(model_folder)
    assert len(before) == 64 and model_fingerprint(model_folder) == before
    change(model_folder)
    assert (model_fingerprint(model_folder) != before) is differs


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_fingerprint_ignores_where_the_folder_is(model_folder: Path, tmp_path: Path) -> None:
    before = model_fingerprint(model_folder)
    model_folder.rename(tmp_path / "moved")
    assert model_fingerprint(tmp_path / "moved") == before


def test_fingerprint_of_a_damaged_file_is_an_error(model_folder: Path) -> None:
    (model_folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="no safetensors header"):
        model_fingerprint(model_folder)

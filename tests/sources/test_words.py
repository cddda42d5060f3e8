"""A chat template that the user gives takes the place of the model's own, and the model's folder stays as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from safesteer_lite.errors import ModelError
from safesteer_lite.models.loading import check_template
from safesteer_lite.runs.durable import files_in
from safesteer_lite.sources.base import open_base
from safesteer_lite.sources.words import read_template, words_of
from tests import tiny

GIVEN = tiny.CHAT_TEMPLATE.replace("assistant", "helper")
HI = [{"role": "user", "content": "Hi there"}]


@pytest.fixture
def folder(tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that keeps its template among its tokenizer's settings, as older ones do."""
    monkeypatch.setenv("SAFESTEER_LITE_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(tiny_folder("qwen2"), tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = (folder / "chat_template.jinja").read_text()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink()
    return folder


def test_a_given_template_is_the_only_one(folder: Path) -> None:
    before = {path: path.read_bytes() for path in files_in(folder)}
    own, given = open_base(folder), open_base(folder, GIVEN)
    assert own.words == folder != given.words and own.folder == given.folder
    assert check_template(own).render(HI).endswith("<|im_start|>assistant\n")
    assert check_template(given).render(HI).endswith("<|im_start|>helper\n")
    assert "chat_template" not in json.loads((given.words / "tokenizer_config.json").read_text())
    assert not list(given.words.glob("*.safetensors"))
    assert {path: path.read_bytes() for path in files_in(folder)} == before
    # Another template is another base; the same one is found again.
    assert len({own.fingerprint, given.fingerprint, open_base(folder, GIVEN + " ").fingerprint}) == 3
    again = open_base(folder, GIVEN)
    assert (again.fingerprint, again.words) == (given.fingerprint, given.words)


def test_without_one_nothing_is_copied(folder: Path, tmp_path: Path) -> None:
    assert words_of(folder, "") == folder
    assert not (tmp_path / "cache").exists()


def test_a_tokenizer_that_changes_is_copied_anew(folder: Path) -> None:
    first = words_of(folder, GIVEN)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    assert words_of(folder, GIVEN) != first


def test_a_cache_that_cannot_be_written_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ModelError, match=r"The tokenizer of .* cannot be copied to") as caught:
        words_of(folder, GIVEN)
    assert "SAFESTEER_LITE_CACHE" in caught.value.hint


def test_a_file_is_read_as_it_is_but_for_a_mark_of_its_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_bytes("\ufeff{{ 'ü' }}\r\n".encode())
    assert read_template(tmp_path / "a.jinja") == "{{ 'ü' }}\r\n"

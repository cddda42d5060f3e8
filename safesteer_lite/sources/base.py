"""The base model of a run: its folder, read once, and everything that later steps ask about it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safesteer_lite.errors import ModelError
from safesteer_lite.hardware.shape import ModelShape
from safesteer_lite.runs.durable import sha256_of
from safesteer_lite.sources import headers
from safesteer_lite.sources.card import read_card
from safesteer_lite.sources.folder import Findings, matches, read_json
from safesteer_lite.sources.gguf_folder import MARKER
from safesteer_lite.sources.headers import Tensors, check_tensors, read_tensors
from safesteer_lite.sources.settings import is_quantised, read_settings
from safesteer_lite.sources.words import WORDS, words_of

_FINGERPRINTED = (*WORDS, "chat_template.*", "model.safetensors.index.json", "*.safetensors")
_MIB = 1 << 20


@dataclass(frozen=True)
class Base:
    """A model on this machine, looked through once.

    Attributes:
        folder: where it lies.
        config: its config.json.
        generation: its generation_config.json; empty if it has none.
        shape: its size.
        fingerprint: SHA-256 in hex that tells it apart from other models; see `model_fingerprint`.
        licence: as its folder states it, an identifier of the model hub; empty if it states none.
        tensors: where each of its tensors lies.
        words: the folder with its tokenizer and chat template, which is another one where the user gives a template.
        template: the chat template that the user gives; empty for the model's own.
    """

    folder: Path
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    shape: ModelShape
    fingerprint: str
    licence: str
    tensors: Tensors = field(repr=False)
    words: Path
    template: str = field(default="", repr=False)

    @property
    def is_quantised(self) -> bool:
        """Whether its weights are stored in fewer than 16 bits."""
        return is_quantised(self.config)

    @property
    def size(self) -> int:
        """Bytes of its weights as they are stored."""
        return sum(stored.size for stored in self.tensors.values())


def open_base(folder: Path, template: str = "") -> Base:
    """Look through a model's folder: its settings, its tokenizer and the headers of its weights.

    Args:
        folder: where it lies.
        template: the chat template that the user gives; empty for the model's own.

    Raises:
        ModelError: names everything in it that this method cannot use, and what to do about it.
    """
    findings = Findings(folder)
    words = words_of(folder, template)
    settings = read_settings(folder, findings, words)
    tensors = read_tensors(folder, findings)
    if settings.shape and tensors:
        check_tensors(tensors, settings.shape, is_quantised(settings.config), findings)
    findings.report()
    assert settings.shape is not None
    mark, licence = model_fingerprint(folder), licence_in(folder)
    if template:
        mark = hashlib.sha256(json.dumps([mark, template]).encode()).hexdigest()
    return Base(folder, settings.config, settings.generation, settings.shape, mark, licence, tensors, words, template)


# Models whose values this process has read already.
_finite: set[str] = set()


def check_values(base: Base) -> None:
    """Read every tensor of a model once, and refuse values that are not finite; once in a process.

    Raises:
        ModelError: names the tensors.
    """
    if base.fingerprint not in _finite:
        findings = Findings(base.folder)
        headers.check_values(base.tensors, findings)
        findings.report()
        _finite.add(base.fingerprint)


def licence_in(folder: Path) -> str:
    """The licence that a model's folder states, as an identifier of the model hub; empty if it states none."""
    if stated := read_card(folder).licence:
        return stated
    return str(_source_of(folder).get("licence", "")).lower()


def gguf_of(folder: Path) -> str:
    """The name of the GGUF file that a model's folder was made from here; empty for any other folder."""
    return str(_source_of(folder).get("file", ""))


def _source_of(folder: Path) -> dict[str, Any]:
    return read_json(folder, MARKER, Findings(folder)) or {}


def model_fingerprint(folder: Path) -> str:
    """A SHA-256 (64 hex digits) that changes when the model does, cheap enough to take at every start.

    It covers the names and sizes of the configuration, tokenizer and weight files, the whole content of the small
    ones, and of each safetensors file the header (names, types, shapes and places of all tensors) and the first and
    last MiB. A change confined to the middle of a weight file goes unseen: this tells models apart, it does not guard
    against forgery. Other files, such as a model card, do not count.

    Raises:
        ModelError: a weight file is too damaged to have a header.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if matches(path.name, _FINGERPRINTED) and path.is_file()):
        content = _weight_digest(path) if path.suffix == ".safetensors" else sha256_of(path)
        digest.update(json.dumps([path.name, path.stat().st_size, content]).encode())
    return digest.hexdigest()


def _weight_digest(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as stream:
        # A safetensors file opens with the length of its header, 8 bytes little-endian, then the header as JSON.
        header = int.from_bytes(stream.read(8), "little")
        if not 2 <= header <= min(size - 8, headers.LARGEST_HEADER):
            raise ModelError(f"{path} is damaged: it has no safetensors header.", "Copy or download the model again.")
        digest = hashlib.sha256(stream.read(header))
        digest.update(stream.read(_MIB))
        stream.seek(max(size - _MIB, 0))
        digest.update(stream.read(_MIB))
    return digest.hexdigest()

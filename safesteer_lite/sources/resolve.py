"""Where a model comes from, a local folder or the model hub, checked before anything heavy is loaded; and which it is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safesteer_lite.errors import ModelError
from safesteer_lite.events import Emit
from safesteer_lite.runs.durable import sha256_of
from safesteer_lite.sources.download import quiet_libraries
from safesteer_lite.sources.folder import check_folder, matches
from safesteer_lite.sources.hub import cached_model, fetch_model, is_hub_id

_FINGERPRINTED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "model.safetensors.index.json",
    "*.safetensors",
)
_MIB = 1 << 20


def resolve_model(
    name_or_path: str, revision: str | None, emit: Emit, *, download: bool = True, stage: str = "model"
) -> Path:
    """The folder of a model that this method can use, fetched from the model hub if need be.

    Code that a repository brings along is never fetched or run, and neither are pickled weights.

    Args:
        name_or_path: a local folder, or the id of a model on the hub, `owner/name`.
        revision: branch, tag or commit on the hub; None for its main branch.
        emit: takes one Note before a download, then its Progress in bytes.
        download: False to use only what this machine already has.
        stage: the name that the events carry.

    Raises:
        ModelError: the model is not there, may not be fetched, or cannot be used; the hint says what to do.
        DiskSpaceError: the download does not fit.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix.lower() == ".gguf":
        raise ModelError(
            f"{path} is a GGUF file, and those cannot be trained.",
            "Give the model it was made from: its folder of safetensors, or its id on the model hub.",
        )
    if path.is_dir():
        check_folder(path)
        return path
    if path.exists() or not is_hub_id(name_or_path):
        raise ModelError(
            f"{name_or_path} is neither a folder nor the id of a model.",
            "Give a folder with config.json and *.safetensors, or an id such as Qwen/Qwen2.5-0.5B-Instruct.",
        )
    with quiet_libraries():
        folder = fetch_model(name_or_path, revision, emit, stage) if download else cached_model(name_or_path, revision)
    if folder is None:
        raise ModelError(f"{name_or_path} is not on this machine.", "Allow its download, or give a local folder.")
    check_folder(folder)
    return folder


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
        if not 2 <= header <= size - 8:
            raise ModelError(f"{path} is damaged: it has no safetensors header.", "Copy or download the model again.")
        digest = hashlib.sha256(stream.read(header))
        digest.update(stream.read(_MIB))
        stream.seek(max(size - _MIB, 0))
        digest.update(stream.read(_MIB))
    return digest.hexdigest()

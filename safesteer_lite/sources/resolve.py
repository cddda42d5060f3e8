"""Where a model comes from, a local folder or the model hub, checked before anything heavy is loaded."""

from __future__ import annotations

from functools import partial

from safesteer_lite.errors import ModelError
from safesteer_lite.events import Emit
from safesteer_lite.sources.base import Base, open_base
from safesteer_lite.sources.download import quiet_hub
from safesteer_lite.sources.gguf_file import find_gguf
from safesteer_lite.sources.gguf_folder import folder_of_gguf
from safesteer_lite.sources.hub import cached_model, fetch_model, is_hub_id
from safesteer_lite.sources.settings import check_settings
from safesteer_lite.text import typed_path


def resolve_model(
    name_or_path: str,
    revision: str | None,
    emit: Emit,
    *,
    download: bool = True,
    stage: str = "model",
    template: str = "",
) -> Base:
    """A model that this method can use, fetched from the model hub if need be.

    Code that a repository brings along is never fetched or run, and neither are pickled weights.

    Args:
        name_or_path: a local folder, a GGUF file, or the id of a model on the hub, `owner/name`.
        revision: branch, tag or commit on the hub; None for its main branch.
        emit: takes one Note before a download, then its Progress in bytes.
        download: False to use only what this machine already has.
        stage: the name that the events carry.
        template: the chat template that the user gives; empty for the model's own.

    Raises:
        ModelError: the model is not there, may not be fetched, or cannot be used; the hint says what to do.
        DiskSpaceError: the download does not fit.
    """
    path = typed_path(name_or_path)
    if gguf := find_gguf(path):
        return open_base(folder_of_gguf(gguf, emit, stage, template), template)
    if path.is_dir():
        return open_base(path, template)
    if path.exists() or not is_hub_id(name_or_path):
        raise ModelError(
            f"{name_or_path} is neither a folder nor the id of a model.",
            "Give a folder with config.json and *.safetensors, a GGUF file, or an id such as Qwen/Qwen2.5-0.5B-Instruct.",
        )
    with quiet_hub():
        folder = (
            fetch_model(name_or_path, revision, emit, stage, partial(check_settings, template=template))
            if download
            else cached_model(name_or_path, revision)
        )
    if folder is None:
        raise ModelError(f"{name_or_path} is not on this machine.", "Allow its download, or give a local folder.")
    return open_base(folder, template)

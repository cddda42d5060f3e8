"""The model that another one was made from: what is found in the hidden states of the one means the same in the other."""

from __future__ import annotations

from safesteer_lite.errors import ModelError
from safesteer_lite.events import Emit, discard
from safesteer_lite.hardware.shape import ModelShape
from safesteer_lite.sources.base import Base
from safesteer_lite.sources.download import quiet_hub
from safesteer_lite.sources.hub import cached_model, is_hub_id
from safesteer_lite.sources.preview import look
from safesteer_lite.sources.resolve import resolve_model
from safesteer_lite.text import typed_path

_HINT = "Name the model that this one was fine-tuned or changed from, a folder, a GGUF file or a Hub id."


def look_at_origin(name: str, made: str, shape: ModelShape, template: str) -> None:
    """Refuse the model `name` by its settings alone, before anything large is fetched, made or read.

    Args:
        name: a local folder, a GGUF file, or the id of a model on the hub.
        made: what the model that was made from it is called.
        shape: that one's size.
        template: the chat template that the user gives; empty for the model's own.

    Raises:
        ModelError: it is not there, cannot be used, or is of another width, depth or vocabulary.
    """
    if _is_cached(name):
        found = resolve_model(name, None, discard, download=False, template=template).shape
    else:
        found = look(name, template=template).shape
    require_same_size(found, name, shape, made)


def open_origin(name: str, base: Base, emit: Emit) -> Base:
    """The model `name`, if its hidden states can be those that `base` began from.

    It is fetched where it is not on this machine; where it is, the model hub is not asked, and has no newer one to offer in the
    middle of a run.

    Args:
        name: a local folder, a GGUF file, or the id of a model on the hub.
        base: the model that was made from it.
        emit: takes what a download tells.

    Raises:
        ModelError: it is not there, cannot be used, or is of another architecture, width, depth or vocabulary.
    """
    look_at_origin(name, base.folder.name, base.shape, base.template)
    # A template that the user gives is for both, so that both read the same prompts.
    origin = resolve_model(name, None, emit, download=not _is_cached(name), template=base.template)
    require_same_size(origin.shape, name, base.shape, base.folder.name)
    ours, theirs = base.config.get("model_type"), origin.config.get("model_type")
    if ours != theirs:
        raise ModelError(f"{name} is a {theirs} model and {base.folder.name} a {ours} model.", _HINT)
    return origin


def require_same_size(origin: ModelShape, name: str, shape: ModelShape, called: str) -> None:
    """See that two models have as many blocks, of the same width, and as many tokens.

    Args:
        origin: the size of the model that the other was made from.
        name: of that model.
        shape: the size of the model that was made from it.
        called: how that one is called.

    Raises:
        ModelError: they differ.
    """
    theirs, ours = _size(origin), _size(shape)
    if theirs != ours:
        raise ModelError(f"{name} has {theirs}, and {called} {ours}: no direction fits both.", _HINT)


def _is_cached(name: str) -> bool:
    """Whether it is a model of the hub that lies whole in its cache."""
    if not is_hub_id(name) or typed_path(name).exists():
        return False
    with quiet_hub():
        return cached_model(name, None) is not None


def _size(shape: ModelShape) -> str:
    return f"{shape.layers} blocks of width {shape.width} and {shape.vocabulary:,} tokens"

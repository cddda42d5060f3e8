"""The 16-bit model that a 4-bit one was made from: what it is called, how large it is, whether it is here, whether it fits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safesteer_lite import config as settings
from safesteer_lite.errors import ExportError, ModelError
from safesteer_lite.export.weights import shards
from safesteer_lite.hardware.shape import parameters, shape_from_config
from safesteer_lite.sources import base as sources
from safesteer_lite.sources.hub import cached_model, is_hub_id
from safesteer_lite.text import typed_path

# How repositories of bitsandbytes weights are called: Unsloth's, and those that follow it.
_MARK = re.compile(r"(?:[-_.](?:unsloth|dynamic))*[-_.](?:bnb[-_.])?(?:4bit|nf4|int4)(?:[-_.]bnb)?$", re.IGNORECASE)
# Settings in which a model and its 4-bit form must agree; a type of number, say, may differ.
_SAME = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings"),
)
_WITNESS = "model.norm.weight"


@dataclass(frozen=True)
class Original:
    """The 16-bit original of a 4-bit model.

    Attributes:
        name: its id on the model hub, or its folder.
        size: bytes of its weights.
        folder: where it lies on this machine; None if it does not.
    """

    name: str
    size: int
    folder: Path | None


def is_quantised(folder: Path) -> bool:
    """Whether a model folder holds weights of fewer than 16 bits.

    Raises:
        ExportError: its config.json cannot be read.
    """
    return sources.is_quantised(shards.read_json(folder / "config.json"))


def find_original(folder: Path, name: str) -> Original | None:
    """Find what a 4-bit model was made from, without the network; None if nothing names it.

    Its own config.json comes first (`_name_or_path`), then a preset of the same name, then its name without the part
    that says 4-bit, as Unsloth calls its repositories.

    Args:
        folder: the 4-bit model.
        name: what the run calls it: a hub id, or its folder.

    Raises:
        ExportError: its config.json cannot be read.
    """
    config = shards.read_json(folder / "config.json")
    size = _size(config)
    candidates = list(dict.fromkeys(_candidates(config, name)))
    for candidate in candidates:
        if here := _here(candidate):
            return Original(candidate, size, here)
    named = next((candidate for candidate in candidates if is_hub_id(candidate)), None)
    return Original(named, size, None) if named else None


def describe_original(folder: Path, name: str) -> str:
    """Where the 16-bit original of a 4-bit base is and what it would cost to use it, in sentences."""
    found = find_original(folder, name)
    if found is None:
        return "Its base holds 4-bit weights only, and nothing in it names the 16-bit model that it was made from."
    place = "is on this machine" if found.folder else f"would be a download of about {found.size / 1e9:.1f} GB"
    return f"Its base holds 4-bit weights only; the 16-bit original is {found.name}, which {place}."


def ways_out(folder: Path, name: str) -> str:
    """What to do instead of merging into a 4-bit base, one sentence."""
    found = find_original(folder, name)
    other = found.name if found else "FOLDER"
    fetch = "to fetch and use the original" if found and not found.folder else "to use the original"
    return (
        "Give --weights dequantised to merge into exactly what was trained, which needs no download, "
        f"or --original {other} {fetch}."
    )


def check_same_model(base: Path, original: Path) -> None:
    """See that a 16-bit model is the one that a 4-bit base was made from, by its shape and by its last norm.

    Raises:
        ExportError: it is another one, is itself quantised, or cannot be read.
    """
    hint = "Give the 16-bit model that the base was made from, or --weights dequantised, which needs none."
    small, large = (shards.read_json(folder / "config.json") for folder in (base, original))
    if sources.is_quantised(large):
        raise ExportError(f"{original} holds quantised weights too, not 16-bit ones.", hint)
    differing = [key for key in _SAME if key in small and key in large and small[key] != large[key]]
    if differing:
        said = ", ".join(f"{key} is {large[key]} instead of {small[key]}" for key in differing)
        raise ExportError(f"{original} is not what the run's base was made from: {said}.", hint)
    norms = [shards.read_checkpoint(folder).tensors.get(_WITNESS) for folder in (base, original)]
    if norms[0] and norms[1]:
        one, other = (norm.load().float() for norm in norms if norm)
        # Norms stay as they are in a 4-bit model; a part in a hundred is more than rounding to 16 bits makes.
        if one.shape != other.shape or bool(((one - other).abs() > 0.01 * other.abs() + 1e-3).any()):
            raise ExportError(f"{original} is not what the run's base was made from: its last norm differs.", hint)


def _candidates(config: Mapping[str, Any], name: str) -> Iterator[str]:
    named = str(config.get("_name_or_path") or "")
    if named and named != name and not _MARK.search(named):
        yield named
    for text in (name, named):
        if _MARK.search(text):
            plain = _MARK.sub("", text)
            yield from (preset for preset in _preset_models() if _key(preset) == _key(plain))
            # The neighbour of a local folder is a folder; it must not be taken for a name on the hub.
            if Path(plain).is_dir() or not Path(text).exists():
                yield plain


def _preset_models() -> list[str]:
    values = (settings.preset_values(preset) for preset in settings.preset_names())
    return [str(entry["model.name"]) for entry in values if "model.name" in entry]


def _key(name: str) -> str:
    """The last part of a name, as it is compared: `unsloth/llama-3-8b-Instruct` is `meta-llama/Meta-Llama-3-8B-Instruct`."""
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1].lower().removeprefix("meta-")


def _here(name: str) -> Path | None:
    """A 16-bit model's folder on this machine."""
    folder = typed_path(name)
    if not folder.is_dir():
        cached = cached_model(name, None) if is_hub_id(name) else None
        if cached is None:
            return None
        folder = cached
    try:
        whole = not is_quantised(folder) and shards.read_checkpoint(folder)
    except ExportError:
        return None
    return folder if whole else None


def _size(config: Mapping[str, Any]) -> int:
    """Bytes of the weights in 16 bits; 0 where config.json does not tell."""
    try:
        return 2 * parameters(shape_from_config(config))
    except ModelError:
        return 0

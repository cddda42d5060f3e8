"""A GGUF file: what it holds, and whether all of that can be read."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safesteer_lite.errors import ModelError
from safesteer_lite.sources.download import quiet_libraries
from safesteer_lite.sources.folder import brief
from safesteer_lite.sources.gguf_header import UNREADABLE, check_header, read_header, understood, value

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".gguf"
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_ORIGINAL = "Give the model that it was made from: its folder of safetensors, or its id on the model hub."

# For each architecture, its class in transformers and the way its text is cut into words, which decides about every token.
# Files of Mistral and Llama 2 are called `llama` too, and have a vocabulary of another kind.
_ARCHITECTURES = {
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen2"),
    "llama": ("LlamaForCausalLM", "llama-bpe"),
}
# Types that keep what 16 bits hold, or nearly so.
_WIDE = {"F32", "F16", "BF16", "Q8_0"}
# What stretches the long waves of Llama 3.1 and later is stored as its result; these are the values that all of them have.
_STRETCH = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def find_gguf(place: Path) -> Path | None:
    """The GGUF file that a user means by a path: that file, or the only one in a folder that holds no other model.

    Raises:
        ModelError: there are several in the folder, it is one part of several, or it is not there.
    """
    if place.suffix.lower() == SUFFIX:
        if _PART.search(place.stem):
            raise _divided(place)
        if not place.exists():
            # Such a name is never taken for one on the hub.
            raise ModelError(f"There is no file {place}.", "Check the path.")
        return place if place.is_file() else None
    if not place.is_dir() or (place / "config.json").exists():
        return None
    found = sorted(path for path in place.iterdir() if path.suffix.lower() == SUFFIX)
    if any(_PART.search(path.stem) for path in found):
        raise _divided(found[0])
    if len(found) > 1:
        raise ModelError(
            f"{place} holds {len(found)} GGUF files.",
            f"Name one of them, such as {found[0]}: the one with the most bits.",
        )
    return found[0] if found else None


def _divided(path: Path) -> ModelError:
    return ModelError(
        f"{path} is one part of a model, and parts are not read.",
        f"Join them with llama.cpp's `llama-gguf-split --merge`, or else: {_ORIGINAL[0].lower()}{_ORIGINAL[1:]}",
    )


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose header has been read.

    Attributes:
        path: where it lies.
        reader: `gguf.GGUFReader`, which reads tensors when they are asked for.
        family: the class of the model in transformers.
    """

    path: Path
    reader: Any
    family: str

    def field(self, name: str) -> Any:
        """A value of the header; None where it has none of that name."""
        return value(self.reader, name)

    @property
    def tensors(self) -> dict[str, Any]:
        """The stored tensors by their names in the file."""
        return {tensor.name: tensor for tensor in self.reader.tensors}

    @property
    def weights(self) -> int:
        """How many weights it holds."""
        return sum(int(tensor.n_elements) for tensor in self.reader.tensors)

    @property
    def is_half(self) -> bool:
        """Whether its matrices are in F16, which has more digits than BF16."""
        return {tensor.tensor_type.name for tensor in self.reader.tensors if len(tensor.shape) > 1} == {"F16"}

    @property
    def loss(self) -> str:
        """What was lost when the file was written, in a sentence; empty where that is next to nothing."""
        narrow = [tensor for tensor in self.reader.tensors if tensor.tensor_type.name not in _WIDE]
        if not narrow:
            return ""
        bits = 8 * sum(int(tensor.n_bytes) for tensor in narrow) / sum(int(tensor.n_elements) for tensor in narrow)
        kinds = ", ".join(sorted({tensor.tensor_type.name for tensor in narrow}))
        return (
            f"{self.path.name} holds weights in {kinds}, {bits:.1f} bits each of the 16 that the model had: what was rounded "
            "away does not come back, and the rounded model is what is trained and exported. A file in Q8_0 or more, or the "
            "model's safetensors, would be better."
        )

    def require_template(self) -> None:
        """See that it has a chat template.

        Raises:
            ModelError: it has none.
        """
        if not self.field("tokenizer.chat_template"):
            raise ModelError(
                f"{self.path} has no chat template, so it cannot be prompted as an assistant.",
                "Give a file of the instruct model, made by a newer llama.cpp, or name a template with --chat-template FILE.",
            )

    def config(self) -> Any:
        """The model's settings as transformers has them.

        Raises:
            ModelError: they are not all known here.
        """
        with understood(self.path), quiet_libraries():
            return self._config()

    def _config(self) -> Any:
        from transformers import AutoConfig

        config: Any = AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name, trust_remote_code=False)
        kind = config.model_type
        if self.field(f"{kind}.rope.scaling.type") not in (None, "none"):
            raise ModelError(f"{self.path} stretches its context in a way that is not read here.", _ORIGINAL)
        if kind == "qwen3" and (width := self.field("qwen3.attention.key_length")):
            config.head_dim = width
        if (factors := self.tensors.get("rope_freqs.weight")) is not None:
            config.rope_parameters = {**config.rope_parameters, **self._stretch(dequantised(factors), config)}
        config.architectures = [self.family]
        return config

    def _stretch(self, factors: Tensor, config: Any) -> dict[str, object]:
        """The settings of Llama 3's stretched waves of which `factors` are the result."""
        import torch

        found = {"rope_type": "llama3", "factor": float(factors.max()), **_STRETCH}
        if not torch.allclose(factors, stretched(config, found), rtol=1e-4):
            raise ModelError(f"{self.path} stretches its context in a way that is not read here.", _ORIGINAL)
        return found


def open_gguf(path: Path) -> GgufFile:
    """Read a GGUF file's header.

    Raises:
        ModelError: it is no whole GGUF file, or has a model or a tokenizer that cannot be read.
    """
    try:
        reader = read_header(path)
        kind = _architecture_of(reader, path)
        check_header(reader, kind, path)
    except UNREADABLE as error:
        raise ModelError(f"{path} is no whole GGUF file.", "Copy or download it again.") from error
    return GgufFile(path, reader, _ARCHITECTURES[kind][0])


def _architecture_of(reader: Any, path: Path) -> str:
    """Which of `_ARCHITECTURES` a whole model is of, whose text is cut as that one's is."""
    if value(reader, "split.count") not in (None, 0, 1):
        raise _divided(path)
    if value(reader, "general.type") == "adapter":
        raise ModelError(f"{path} is an adapter, and no model.", "Give the model that it belongs on.")
    kind = value(reader, "general.architecture")
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        raise ModelError(
            f"{path} holds a model of the architecture {brief(kind)}, and only {', '.join(_ARCHITECTURES)} are read.",
            _ORIGINAL,
        )
    vocabulary, cut = value(reader, "tokenizer.ggml.model"), value(reader, "tokenizer.ggml.pre")
    if (vocabulary, cut) != ("gpt2", _ARCHITECTURES[kind][1]):
        raise ModelError(
            f"{path} cuts text into tokens in a way that is not read here ({brief(kind)} with {brief(cut or vocabulary)}).",
            _ORIGINAL,
        )
    return kind


def is_adapter(path: Path) -> bool:
    """Whether a GGUF file says that it holds an adapter alone; what cannot be read is no adapter."""
    try:
        return bool(value(read_header(path), "general.type") == "adapter")
    except UNREADABLE:
        return False


def dequantised(tensor: Any, rows: int | None = None) -> Tensor:
    """A GGUF tensor, or its first `rows` rows, as a float32 tensor."""
    import numpy
    import torch
    from gguf import dequantize

    return torch.from_numpy(numpy.require(dequantize(tensor.data[:rows], tensor.tensor_type), requirements="W"))


def stretched(config: Any, stretch: dict[str, Any]) -> Tensor:
    """By what Llama 3.1 and later divide the frequency of each pair of rotary columns.

    Args:
        config: of the model.
        stretch: `factor`, `low_freq_factor`, `high_freq_factor` and `original_max_position_embeddings`, as in such settings.

    Returns:
        (head_dim / 2,) float32.
    """
    import torch

    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    waves = 2 * math.pi * config.rope_parameters["rope_theta"] ** pairs
    low, high = stretch["low_freq_factor"], stretch["high_freq_factor"]
    smooth = ((stretch["original_max_position_embeddings"] / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / stretch["factor"] + smooth)).float()

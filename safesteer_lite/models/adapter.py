"""The LoRA adapter: attached, saved, read, scaled, frozen, copied; what is written into it must fit to the last weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safesteer_lite.errors import ModelError
from safesteer_lite.models.loaded import PlainModel
from safesteer_lite.sources.hub import first_line

_TRAIN_AGAIN = "Train again, or give the run its own adapter back."


@dataclass(frozen=True)
class Adapter:
    """The LoRA adapter on all linear layers of the decoder blocks.

    Attributes:
        rank: LoRA r.
        alpha: LoRA alpha; the update is scaled by alpha / rank.
        first_layer: the lowest block that gets an adapter.
    """

    rank: int
    alpha: int
    first_layer: int = 0


def with_adapter(model: nn.Module, tokenizer: Any, adapter: Adapter, seed: int) -> PlainModel:
    """Attach a fresh LoRA adapter (B = 0, so the student starts as the base)."""
    from peft import LoraConfig, get_peft_model

    decoder: Any = model.model
    depth = len(decoder.layers)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=linear_layers(decoder.layers[0]),
        layers_to_transform=list(range(adapter.first_layer, depth)),
        layers_pattern="layers",
    )
    return PlainModel(get_peft_model(model, config, autocast_adapter_dtype=False), tokenizer, adapter.first_layer)


def linear_layers(block: nn.Module) -> list[str]:
    """The names of a block's linear layers; some families have one for queries, keys and values together."""
    return sorted(name.rpartition(".")[2] for name, part in block.named_modules() if isinstance(part, nn.Linear))


def save_adapter(model: PlainModel, folder: Path) -> None:
    """Write the adapter as peft writes it, without the base's folder on this machine and without peft's card."""
    network: Any = model.network
    for settings in network.peft_config.values():
        settings.base_model_name_or_path = None
    network.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)


def read_adapter(model: PlainModel, folder: Path) -> None:
    """Load an adapter's weights, as `save_adapter` writes them, into the student.

    Raises:
        ModelError: the adapter cannot be read, does not belong to this model, or holds values that are not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "adapter_model.safetensors"
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"The adapter {path} cannot be read ({first_line(error)}).", _TRAIN_AGAIN) from error
    _write_in({_stored_name(name): parameter for name, parameter in _parameters(model)}, stored)


def freeze_reading(model: PlainModel) -> None:
    """Leave the adapter's A matrices as they are from now on: only B is trained."""
    for name, parameter in model.network.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)


def scale_adapter(model: PlainModel, factor: float) -> None:
    """Multiply the adapter's update by `factor`, on its B matrices."""
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if "lora_B" in name:
                parameter.mul_(factor)


def adapter_tensors(model: PlainModel) -> dict[str, Tensor]:
    """A copy of the adapter's weights by name."""
    return {name: parameter.detach().cpu().clone() for name, parameter in _parameters(model)}


def load_adapter(model: PlainModel, tensors: Mapping[str, Tensor]) -> None:
    """Write weights, as `adapter_tensors` copies them, into the adapter.

    Raises:
        ModelError: they are not this adapter's, to the last name and shape, or are not finite.
    """
    _write_in(dict(_parameters(model)), tensors)


def _parameters(model: PlainModel) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.network.named_parameters() if "lora_" in name)


def _stored_name(name: str) -> str:
    """A parameter's name in an adapter's file, which leaves out what peft calls the adapter in memory."""
    return name.replace(".default.", ".")


def _write_in(wanted: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """The one way in: every weight of the adapter is written, and nothing is left over.

    Args:
        wanted: the adapter's weights, by the names that `tensors` has for them.
        tensors: what they shall be.
    """
    if strange := sorted(wanted.keys() ^ tensors.keys()):
        raise ModelError(
            f"The adapter does not fit this model: {strange[0]} is only in one of them, one of {len(strange)} such weights.",
            "Use the model that it was trained on.",
        )
    for name, parameter in wanted.items():
        if tensors[name].shape != parameter.shape:
            raise ModelError(
                f"The adapter does not fit this model: {name} has the shape {tuple(tensors[name].shape)} instead of "
                f"{tuple(parameter.shape)}.",
                "Use the model that it was trained on.",
            )
    if broken := sorted(name for name, value in tensors.items() if not bool(torch.isfinite(value).all())):
        raise ModelError(f"The adapter holds values that are not finite: {broken[0]}.", _TRAIN_AGAIN)
    # Only now, so that an adapter that is refused leaves the one that is there as it was.
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])

"""The LoRA adapter: attached, saved, read, scaled, frozen, copied."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safesteer_lite.errors import ModelError
from safesteer_lite.models.loaded import PlainModel


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
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        layers_to_transform=list(range(adapter.first_layer, depth)),
        layers_pattern="layers",
    )
    return PlainModel(get_peft_model(model, config, autocast_adapter_dtype=False), tokenizer, adapter.first_layer)


def save_adapter(model: PlainModel, folder: Path) -> None:
    """Write the adapter as peft writes it, without the base's folder on this machine and without peft's card."""
    network: Any = model.network
    for settings in network.peft_config.values():
        settings.base_model_name_or_path = None
    network.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)


def read_adapter(model: PlainModel, folder: Path) -> None:
    """Load an adapter's weights into the student.

    Raises:
        ModelError: the adapter does not belong to this model.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(model.network)
    if {name: tuple(value.shape) for name, value in tensors.items()} != {
        name: tuple(value.shape) for name, value in expected.items()
    }:
        raise ModelError(f"The adapter in {folder} does not fit this model.", "Use the model that it was trained on.")
    set_peft_model_state_dict(model.network, tensors)


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
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.network.named_parameters()
        if "lora_" in name
    }


def load_adapter(model: PlainModel, tensors: dict[str, Tensor]) -> None:
    """Write weights, as `adapter_tensors` copies them, into the adapter."""
    for name, parameter in model.network.named_parameters():
        if name in tensors:
            parameter.data.copy_(tensors[name])

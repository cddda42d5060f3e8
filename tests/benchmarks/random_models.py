"""The presets' models with random 4-bit weights: the real shapes, and nothing to download.

The shapes are those of `safesteer_lite.hardware.known`, written down there from each model's config.json on the model hub
(Qwen/Qwen3-4B-Instruct-2507, Qwen/Qwen2.5-7B-Instruct, meta-llama/Llama-3.2-3B-Instruct, meta-llama/Meta-Llama-3-8B-Instruct).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from safesteer_lite.hardware.known import KNOWN
from safesteer_lite.hardware.shape import ModelShape

PRESETS = {
    "llama-3.2-3b": ("llama", KNOWN["meta-llama/Llama-3.2-3B-Instruct"].shape),
    "qwen3-4b": ("qwen3", KNOWN["Qwen/Qwen3-4B-Instruct-2507"].shape),
    "qwen2.5-7b": ("qwen2", KNOWN["Qwen/Qwen2.5-7B-Instruct"].shape),
    "llama-3-8b": ("llama", KNOWN["meta-llama/Meta-Llama-3-8B-Instruct"].shape),
    # For a smoke test on a CPU.
    "tiny": ("qwen2", ModelShape(3, 128, 256, 4, 2, 32, 320, False, "bfloat16", qkv_bias=True)),
}
"""Family and shape by name."""

_FOUR_BIT = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
}


def configuration(name: str) -> dict[str, Any]:
    """The model's config.json; what does not change its size or speed is left to transformers' defaults."""
    family, shape = PRESETS[name]
    architecture = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": family,
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": shape.tied,
        "dtype": "bfloat16",
        "quantization_config": _FOUR_BIT,
    }


def write(folder: Path, name: str, device: str) -> Path:
    """Write the model as a 4-bit checkpoint with a tokenizer, block by block, unless it is there.

    Args:
        folder: where it goes.
        name: a key of `PRESETS`.
        device: where weights are drawn and quantised.
    """
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests import tiny

    folder.mkdir(parents=True, exist_ok=True)
    tiny.build_tokenizer().save_pretrained(folder)
    config = configuration(name)
    draft = folder / "config.json.tmp"
    draft.write_text(json.dumps(config), encoding="utf-8")
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "architectures")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain), dtype=torch.bfloat16)
    parts: dict[str, dict[str, Tensor]] = {}
    generator = torch.Generator(device).manual_seed(0)
    weights: dict[str, str] = {}
    names = [key for key, _ in model.named_parameters()]
    for key, parameter in model.named_parameters():
        part = key.split(".")[2] if ".layers." in key else "ends"
        tensors = drawn(key, tuple(parameter.shape), device, generator)
        parts.setdefault(part, {}).update(tensors)
        weights |= dict.fromkeys(tensors, f"model-{part}.safetensors")
        following = names[names.index(key) + 1 :]
        if part != "ends" and not any(f".layers.{part}." in other for other in following):
            save_file(parts.pop(part), folder / f"model-{part}.safetensors", {"format": "pt"})
    save_file(parts["ends"], folder / "model-ends.safetensors", {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    draft.replace(folder / "config.json")
    return folder


def drawn(key: str, shape: tuple[int, ...], device: str, generator: torch.Generator) -> dict[str, Tensor]:
    """One parameter's tensors as they are stored: packed with its statistics for a block's matrix, bf16 for the rest."""
    if len(shape) == 1:
        # Norms are 1, biases small, so that the residual stream stays of ordinary size through all blocks.
        return {key: torch.full(shape, 0.01 if key.endswith("bias") else 1.0, dtype=torch.bfloat16)}
    weight = 0.02 * torch.randn(shape, device=device, generator=generator, dtype=torch.float32).bfloat16()
    if ".layers." not in key:
        return {key: weight.cpu()}
    import bitsandbytes.functional as functional

    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    statistics = state.as_dict(packed=True)
    return {key: packed.cpu()} | {f"{key}.{name}": value.cpu() for name, value in statistics.items()}

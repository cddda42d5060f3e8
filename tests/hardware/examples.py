"""Shapes and machines that several tests of the hardware share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from safesteer_lite.hardware.machine import Gpu, Machine
from safesteer_lite.hardware.shape import ModelShape

GB = 10**9

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "pad_token_id": 0,
}
LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Qwen2.5-0.5B and Llama 3.1 8B, whose published sizes are 494,032,768 and 8,030,261,248 parameters.
SMALL = ModelShape(24, 896, 4864, 14, 2, 64, 151936, True, "bfloat16", qkv_bias=True)
LARGE = ModelShape(32, 4096, 14336, 32, 8, 128, 128256, False, "bfloat16")

CPU_MACHINE = Machine(
    system="Linux",
    python="3.11.7",
    cpu="a CPU",
    cores=4,
    ram_total=32 * GB,
    ram_available=24 * GB,
    disk_free=100 * GB,
    gpus=(),
    versions={name: "1.0" for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate")},
    cuda_build=None,
    cpu_bf16=True,
)
CARD = Gpu("a card", 12 * GB, 11 * GB, (8, 6), "570.1", True)


def tiny(family: str, **options: Any) -> tuple[dict[str, Any], Any]:
    """A model of random weights without storage, and its config as it stands in config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, **{key: value for key, value in {**SIZES, **options}.items() if value is not None}
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # What is written leaves out defaults, as a published config.json may.
    return json.loads(config.to_json_string(use_diff=True)), model


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")

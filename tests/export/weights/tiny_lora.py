"""Tiny random base models with adapters on them, in every form that a merge reads, and peft's own merge."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from safesteer_lite.models.adapter import linear_layers

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2-tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3-tied": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "gemma2-tied": Gemma2Config(**SIZES, head_dim=16),
    "gemma3-tied": Gemma3TextConfig(**SIZES, head_dim=16),
    "phi3": Phi3Config(**SIZES, pad_token_id=None),
}


def save_base(folder: Path, kind: str, dtype: torch.dtype, max_shard_size: str = "60KB") -> Path:
    """A random model in several shards, with biases and norms that are not just zeros and ones."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer.json").write_bytes(b'{"not": "parsed"}\r\n')
    (folder / "chat_template.jinja").write_bytes("{{ messages }} ü\n".encode())
    return folder


def save_adapter(folder: Path, base: Path, **settings: Any) -> Path:
    """A random adapter on `base`, both factors large enough to move every weight."""
    network = load(base)
    targets = linear_layers(network.model.layers[0])
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": targets, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(network, LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype | str = "auto", **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def load_4bit(folder: Path) -> Any:
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return load(folder, torch.bfloat16, quantization_config=quantisation, device_map={"": "cpu"})


def peft_merge(base: Path, adapter: Path, dtype: torch.dtype, strength: float = 1.0) -> dict[str, Tensor]:
    model = PeftModel.from_pretrained(load(base, dtype), adapter)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= strength
    state: dict[str, Tensor] = model.merge_and_unload().state_dict()
    return state


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], tied: bool) -> None:
    """The same tensors, bit for bit; a tied LM head is in the state but not in the file."""
    assert ours.keys() == theirs.keys() - ({"lm_head.weight"} if tied else set())
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name

"""Tiny random models with a real tokenizer and chat template, built in-process and offline.

`SAFESTEER_LITE_TEST_DEVICE` (`cpu`, `cuda`) and `SAFESTEER_LITE_TEST_BACKEND` (`plain`, `unsloth`) say where and by what they
are loaded, so that the contract suite runs over each; `tests/models/test_gpu.py` sets them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from safesteer_lite.method.policies import Batch, Completions, pad_left
from safesteer_lite.models import plain, unsloth
from safesteer_lite.models.adapter import Adapter, with_adapter
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.loaded import PlainModel
from safesteer_lite.sources.base import open_base

DEVICE = os.environ.get("SAFESTEER_LITE_TEST_DEVICE", "cpu")
BACKEND = os.environ.get("SAFESTEER_LITE_TEST_BACKEND", "plain")

LAYERS, WIDTH, VOCABULARY = 4, 64, 320
ARCHITECTURES = ("llama", "qwen2", "qwen3")
FURTHER = ("mistral", "gemma2", "gemma3_text", "phi3")
"""The other families, which fewer tests run over."""
PRECISIONS = ("fp32", "bf16", "nf4-packed", "nf4-unpacked")
PROMPTS = (
    "Say hello.",
    "How do rivers find their way to the sea?",
    "Tell me how to bake bread, and why it rises when it is warm.",
    "Why?",
    "What is the name of the tallest tree in the wood?",
)

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma2": Gemma2Config,
    "gemma3_text": Gemma3TextConfig,
    "phi3": Phi3Config,
}
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
# Bounds and windows so small that they matter to the shortest prompt.
_NEAR: dict[str, Any] = {"sliding_window": 6, "query_pre_attn_scalar": 20, **_NO_TOKENS}
_OF_FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "gemma2": {**_NEAR, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 8.0},
    "gemma3_text": _NEAR,
    "phi3": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        **_NO_TOKENS,
    },
}


class Loader(Protocol):
    """What the fixture `tiny_policy` gives a test."""

    def __call__(
        self, architecture: str = "llama", precision: str = "fp32", first_layer: int = 0, filled: bool = False
    ) -> Policy:
        """A fresh policy over a tiny model of `architecture`."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few sentences: every text has tokens, and `assistant` and `user` are single ones."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevelDecoder()
    special = [END_OF_TEXT, START_OF_TURN, END_OF_TURN]
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - 8,  # Fewer tokens than embedding rows, as in many real models.
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    core.train_from_iterator(["assistant", "user"] * 50 + [prompt for prompt in PROMPTS for _ in range(3)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END_OF_TURN, pad_token=END_OF_TEXT)
    tokenizer.add_special_tokens({"additional_special_tokens": [START_OF_TURN]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def config_of(architecture: str, *, layers: int = LAYERS, width: int = WIDTH, **settings: Any) -> Any:
    """The configuration of a tiny model of `architecture`; `settings` are further ones, as config.json calls them."""
    usual: dict[str, Any] = {
        **_OF_FAMILIES.get(architecture, {}),
        "vocab_size": VOCABULARY,
        "intermediate_size": 2 * width,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    if architecture == "gemma3_text":
        usual["layer_types"] = [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)]
    return _CONFIGS[architecture](hidden_size=width, num_hidden_layers=layers, **{**usual, **settings})


def save_model(
    folder: Path,
    architecture: str,
    *,
    layers: int = LAYERS,
    width: int = WIDTH,
    seed: int = 0,
    tied: bool = False,
    **settings: Any,
) -> Path:
    """Write a random model of `architecture` with its tokenizer, as a downloaded instruct model would lie there.

    The weights are ten times larger than at an ordinary start: logits then differ by whole units, so that greedy
    answers vary and a wrong position or mask shows. `settings` are further ones, as config.json calls them.
    """
    config = config_of(architecture, layers=layers, width=width, tie_word_embeddings=tied, **settings)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        # transformers starts biases at zero, which would hide a bias that a backend loses.
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            # Norms of one weight would hide that a family adds one to it.
            if architecture in FURTHER and name.endswith("norm.weight"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    ends = tokenizer.convert_tokens_to_ids([END_OF_TURN, END_OF_TEXT])
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_policy(folder: Path, precision: str, first_layer: int = 0, *, filled: bool = False, rank: int = 4) -> Policy:
    """Load a model through the plain backend, with an adapter.

    Args:
        folder: from `save_model`.
        precision: one of `PRECISIONS`.
        first_layer: lowest block with an adapter.
        filled: give the adapter's B matrices values, so that the student differs from the base.
        rank: LoRA r.
    """
    kind, _, packing = precision.partition("-")
    adapter = Adapter(rank=rank, alpha=2 * rank, first_layer=first_layer)
    if BACKEND == "unsloth":
        if precision not in ("bf16", "nf4-packed"):
            pytest.skip(f"Unsloth does not load {precision}")
        if json.loads((folder / "config.json").read_text())["model_type"] not in ARCHITECTURES:
            pytest.skip("Unsloth is used for models with the blocks of Llama alone")
        model: PlainModel = unsloth.load(open_base(folder), kind, adapter, 3, DEVICE)
    else:
        network, tokenizer = plain.load(open_base(folder), precision=kind, device=DEVICE, unpack=packing == "unpacked")
        model = with_adapter(network, tokenizer, adapter, seed=3)
    if filled:
        fill_adapter(model)
    return Policy(model, prompt_tokens=128)


def fill_adapter(model: PlainModel, scale: float = 0.05, seed: int = 5) -> None:
    """Give all B matrices random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def prompt_batch(policy: Policy, count: int = len(PROMPTS)) -> Batch:
    """The first `count` of `PROMPTS`, which differ in length, as one left-padded batch."""
    return pad_left([policy.encode(prompt) for prompt in PROMPTS[:count]])


def vector(scale: float, seed: int = 11) -> Tensor:
    """A random steering vector, (WIDTH,), whose entries have standard deviation `scale`."""
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) * scale


def fixed_completions(count: int, device: torch.device, length: int = 6) -> Completions:
    """Random completions that depend on nothing but their number, the first of them shorter than the others."""
    tokens = torch.randint(5, VOCABULARY - 8, (count, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, length // 2 :] = False
    return Completions(tokens.to(device), mask.to(device))

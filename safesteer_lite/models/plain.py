"""The plain backend: a model loaded by transformers and bitsandbytes, on CUDA and on the CPU."""

from __future__ import annotations

from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safesteer_lite.errors import ModelError
from safesteer_lite.foreign import forbid_hub_kernels
from safesteer_lite.sources.base import Base


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, padding on the left."""
    forbid_hub_kernels()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not tokenizer.chat_template:
        raise ModelError(
            f"{folder} has no chat template, so it cannot be prompted as an assistant.",
            "Use an instruct model, or add its chat_template.jinja to the folder.",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load(base: Base, *, precision: str, device: str, unpack: bool, compute: str = "bf16") -> tuple[nn.Module, Any]:
    """Load weights without an adapter.

    Args:
        base: the model.
        precision: `nf4` (4-bit NF4, double quantisation, bf16 compute), `bf16` or `fp32`.
        device: `cuda` or `cpu`.
        unpack: expand 4-bit weights once after loading. The numbers are the same, each forward is spared the
            unpacking, and 4 times the memory is used; for CPUs.
        compute: `bf16` or `fp32`, the dtype that 4-bit weights compute in.

    Returns:
        The causal language model in evaluation mode, all weights frozen, and its tokenizer.
    """
    forbid_hub_kernels()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    # On CPUs it warns that an optional accelerated kernel is not installed; nothing here needs it.
    getLogger("bitsandbytes").setLevel("ERROR")
    tokenizer = load_tokenizer(base.folder)
    wide = precision == "fp32" or (precision == "nf4" and compute == "fp32")
    dtype = torch.float32 if wide else torch.bfloat16
    options: dict[str, Any] = {"dtype": dtype}
    if precision == "nf4" and not base.is_quantised:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(
        base.folder, local_files_only=True, use_safetensors=True, device_map={"": device}, **options
    )
    keep_cpu_autograd(model)
    if unpack:
        unpack_4bit(model, dtype)
    model.requires_grad_(False)
    return model.eval(), tokenizer


def keep_cpu_autograd(model: nn.Module) -> None:
    """Stop bitsandbytes 0.50 from repacking weights on CPUs with AVX512-BF16.

    The repacking, done in place at the first no-grad forward, is lossy, cannot be saved, and has no autograd.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def unpack_4bit(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every 4-bit linear layer by an ordinary one that holds its dequantised weights."""
    import bitsandbytes as bnb

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(child.weight.data, child.weight.quant_state)
                plain = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None, device="meta")
                plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
                if child.bias is not None:
                    plain.bias = nn.Parameter(child.bias.data.to(dtype), requires_grad=False)
                setattr(parent, name, plain)
    # peft and transformers decide by these marks how to treat the layers, which are ordinary ones now.
    causal: Any = model
    for mark, value in (("is_loaded_in_4bit", False), ("is_quantized", False), ("quantization_method", None)):
        if hasattr(causal, mark):
            setattr(causal, mark, value)
    if hasattr(causal.config, "quantization_config"):
        del causal.config.quantization_config

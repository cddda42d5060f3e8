"""The plain backend: a model loaded by transformers and bitsandbytes, on CUDA and on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safesteer_lite.errors import ModelError, SafeSteerError
from safesteer_lite.foreign import forbid_hub_kernels
from safesteer_lite.hardware.machine import cap_cuda_memory, use_card
from safesteer_lite.method.memory import is_out_of_memory
from safesteer_lite.models import attention
from safesteer_lite.sources.base import Base
from safesteer_lite.sources.download import quiet_libraries

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

ATTENTION = "sdpa"
"""torch's own attention, named where a model does without `attention.GROUPED`: a config.json may ask for one that is code
from elsewhere."""


def load_tokenizer(folder: Path, config: Mapping[str, Any]) -> Any:
    """The tokenizer of a model, padding on the left.

    Args:
        folder: where it lies.
        config: the model's config.json.

    Raises:
        ModelError: it cannot be loaded.
    """
    forbid_hub_kernels()
    from transformers import AutoTokenizer

    with loading(folder, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=library_config(folder, config), local_files_only=True, trust_remote_code=False
        )
    if not tokenizer.chat_template:
        raise ModelError(
            f"{folder} has no chat template, so it cannot be prompted as an assistant.",
            "Use an instruct model, or give its template with --chat-template FILE.",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load(base: Base, *, precision: str, device: str, unpack: bool, compute: str = "bf16") -> tuple[nn.Module, Any]:
    """Load weights without an adapter.

    Args:
        base: the model.
        precision: `nf4` (4-bit NF4, double quantisation), `bf16` (16 bits, or what `compute` says) or `fp32`.
        device: `cpu`, `cuda:0`, ...; `cuda` is the card in use.
        unpack: expand 4-bit weights once after loading. The numbers are the same, each forward is spared the
            unpacking, and 4 times the memory is used; for CPUs.
        compute: `bf16`, `fp16` or `fp32`, the dtype of all that is not packed, and the one that is computed in.

    Returns:
        The causal language model in evaluation mode, all weights frozen, and its tokenizer.

    Raises:
        ModelError: the libraries cannot load it.
    """
    forbid_hub_kernels()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # On CPUs it warns that an optional accelerated kernel is not installed; nothing here needs it.
    getLogger("bitsandbytes").setLevel("ERROR")
    tokenizer = load_tokenizer(base.words, base.config)
    use_card(device)
    if device.startswith("cuda"):
        cap_cuda_memory()
    dtype = torch.float32 if precision == "fp32" else _DTYPES[compute]
    options: dict[str, Any] = {"dtype": dtype}
    if precision == "nf4" and not base.is_quantised:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    with loading(base.folder, "model"):
        model, info = AutoModelForCausalLM.from_pretrained(
            base.folder,
            config=library_config(base.folder, base.config),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=attention.register(),
            device_map={"": device},
            output_loading_info=True,
            **options,
        )
        check_loaded(base.folder, info)
        keep_cpu_autograd(model)
        if unpack:
            unpack_4bit(model, dtype)
    model.requires_grad_(False)
    return model.eval(), tokenizer


def skeleton(base: Base, dtype: torch.dtype) -> nn.Module:
    """A model's modules without memory for their weights, in evaluation mode.

    Args:
        base: the model.
        dtype: the type that its weights will be given in.

    Raises:
        ModelError: transformers cannot make it.
    """
    forbid_hub_kernels()
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    # Buffers are real: what a model computes for itself, such as the frequencies of its positions, is in no file.
    with loading(base.folder, "config.json"), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            library_config(base.folder, base.config),
            attn_implementation=attention.register(),
            trust_remote_code=False,
            dtype=dtype,
        )
    return model.requires_grad_(False).eval()


def library_config(folder: Path, config: Mapping[str, Any]) -> Any:
    """A model's config.json, as it was read and checked, in the form that transformers wants.

    Raises:
        ModelError: transformers refuses it.
    """
    from transformers import AutoConfig

    # An entry that says nothing would still count as a quantisation.
    plain = {key: value for key, value in config.items() if key != "quantization_config" or value}
    with loading(folder, "config.json"):
        return AutoConfig.for_model(**deepcopy(plain))


def check_loaded(folder: Path, info: Mapping[str, Any]) -> None:
    """Compare what was loaded with what the library itself expected of the model.

    Args:
        folder: where the model lies.
        info: what `from_pretrained` tells with `output_loading_info`.

    Raises:
        ModelError: weights are missing, or have other shapes.
    """
    found = {key: sorted(map(str, info.get(f"{key}_keys") or ())) for key in ("missing", "mismatched")}
    if any(found.values()):
        told = "; ".join(f"{key}: {', '.join(names[:3])}" for key, names in found.items() if names)
        raise ModelError(
            f"{folder} cannot be used: its weights are not those that its config.json describes ({told}).",
            "Copy or download the model again.",
        )


@contextmanager
def loading(folder: Path, what: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads a model into one error that names the model.

    Args:
        folder: where the model lies.
        what: what of it is loaded.

    Raises:
        ModelError: anything went wrong inside.
    """
    try:
        with quiet_libraries():
            yield
    except (SafeSteerError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    # tokenizers and safetensors are written in Rust, whose panics are no Exception.
    except BaseException as error:
        if is_out_of_memory(error):
            raise ModelError(
                f"{folder} cannot be loaded: its {what} does not fit in memory.",
                "Close other programs, choose a smaller model, or set model.precision=nf4.",
            ) from error
        raise ModelError(
            f"{folder} cannot be loaded: its {what} is not one that {_library(error)} reads ({_said(error)}).",
            "Copy or download the model again, or choose another one.",
        ) from error


def _library(error: BaseException) -> str:
    """The library that an error comes from, as far as its type tells."""
    module = type(error).__module__.partition(".")[0]
    return {"pyo3_runtime": "tokenizers", "jinja2": "jinja"}.get(module, "transformers")


def _said(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Some put what it is about on a line of its own; and some quote a whole file.
    line = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]).rstrip(".") or "it does not say why"
    return f"{type(error).__name__}: {line}"[:300]


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

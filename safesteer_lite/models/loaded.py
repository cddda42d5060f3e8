"""The plain backend: transformers + bitsandbytes + peft, on CUDA and on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import date
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from safesteer_lite.errors import ModelError
from safesteer_lite.method.policies import Batch, Completions, Residual
from safesteer_lite.models import sampling
from safesteer_lite.models.sampling import Cache, GrowingCache, mask_behind, positions
from safesteer_lite.models.template import ChatTemplate, stop_ids

# What a block is told of a cache; transformers' name and Unsloth's.
_OF_THE_CACHE = ("past_key_values", "past_key_value", "use_cache")


class _Reached(Exception):
    """Ends a forward once what was wanted of it is known."""


class _KeepPrefix:
    """Stands where a block looks for its key-value cache: notes the prefix's keys and values as they pass."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        return keys, values


class _PutBefore:
    """Stands where a block looks for its key-value cache: gives each sequence the prefix's keys and values."""

    def __init__(self, prefix: _KeepPrefix) -> None:
        self._prefix = prefix

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows = len(keys)
        return (
            torch.cat([self._prefix.keys.expand(rows, -1, -1, -1), keys], dim=2),
            torch.cat([self._prefix.values.expand(rows, -1, -1, -1), values], dim=2),
        )


class PlainModel:
    """One loaded model: base, teacher and student in one set of weights. See `method.model.LanguageModel`.

    Attributes:
        checkpointing: whether adapted blocks keep only their input for backward and are run again there: the same
            numbers with far less memory, for one more forward.
    """

    checkpointing = False

    def __init__(self, network: nn.Module, tokenizer: Any, first_adapter_layer: int | None) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self._adapted = first_adapter_layer is not None
        untyped: Any = network
        causal: Any = untyped.get_base_model() if self._adapted else untyped
        self.causal = causal
        self.decoder: Any = causal.model
        self._layers: list[nn.Module] = list(self.decoder.layers)
        self._first_adapter_layer = first_adapter_layer if first_adapter_layer is not None else len(self._layers)
        self._end_of_turn = end_of_turn_ids(causal, tokenizer)
        self._special = frozenset(int(index) for index in tokenizer.all_special_ids) | frozenset(
            int(index) for index, token in tokenizer.added_tokens_decoder.items() if token.special
        )

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder blocks, lowest first."""
        return self._layers

    @property
    def device(self) -> torch.device:
        """Where token ids must be."""
        device: torch.device = self.decoder.embed_tokens.weight.device
        return device

    @property
    def end_of_turn(self) -> frozenset[int]:
        """Token ids that end an answer."""
        return self._end_of_turn

    @property
    def special_ids(self) -> frozenset[int]:
        """Token ids that are markup, not text."""
        return self._special

    @property
    def first_adapter_layer(self) -> int:
        """The lowest block that has an adapter."""
        return self._first_adapter_layer

    @property
    def rank(self) -> int:
        """LoRA r of the adapter; 0 without one."""
        settings: dict[str, Any] = getattr(self.network, "peft_config", {})
        return next((int(config.r) for config in settings.values()), 0)

    def adapted_modules(self, layer: int) -> list[nn.Module]:
        """The linear layers of one block that have an adapter."""
        return [module for module in self._layers[layer].modules() if hasattr(module, "lora_A")]

    def start(self, batch: Batch) -> Residual:
        """The token embeddings at block 0, with the arguments that every block receives.

        A prefix that several sequences share is read once, apart from them: half of a short prompt is the system
        prompt that its chat template adds.
        """
        if batch.prefix and len(batch) > 1:
            first, rest = batch.split_prefix()
            return replace(self._embed(rest, batch.prefix), prefix=self._embed(first))
        return self._embed(batch)

    def _embed(self, batch: Batch, behind: int = 0) -> Residual:
        """`start` of a batch that comes behind `behind` other tokens.

        The decoder itself prepares mask and positions; a hook on the first block takes them and ends the forward there.
        """
        seen: list[Residual] = []

        def capture(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = {key: value for key, value in kwargs.items() if key not in _OF_THE_CACHE}
            seen.append(Residual(args[0], 0, arguments))
            raise _Reached

        handle = self._layers[0].register_forward_pre_hook(capture, with_kwargs=True, prepend=True)
        try:
            self.decoder(
                input_ids=batch.input_ids,
                attention_mask=mask_behind(behind, batch.attention_mask),
                position_ids=positions(batch.attention_mask, behind),
                past_key_values=self._cache_of(behind) if behind else None,
                use_cache=bool(behind),
            )
        except _Reached:
            pass
        finally:
            handle.remove()
        return seen[0]

    def advance(self, residual: Residual, layer: int) -> Residual:
        """Run blocks `residual.layer` to `layer - 1`."""
        for index in range(residual.layer, layer):
            if self.checkpointing and torch.is_grad_enabled() and index >= self._first_adapter_layer:
                # Nothing in a block is drawn at random, so no state of a generator has to be kept for the second run.
                residual = checkpoint(self._block, residual, use_reentrant=False, preserve_rng_state=False)
            else:
                residual = self._block(residual)
        return residual

    def _block(self, residual: Residual) -> Residual:
        """Run one block, over the shared prefix first where there is one."""
        block, prefix = self._layers[residual.layer], residual.prefix
        extra: dict[str, Any] = {}
        if prefix:
            kept = _KeepPrefix()
            output = block(prefix.hidden, **prefix.arguments, past_key_values=kept)
            prefix = replace(prefix, hidden=_first(output), layer=residual.layer + 1)
            extra["past_key_values"] = _PutBefore(kept)
        hidden = _first(block(residual.hidden, **residual.arguments, **extra))
        return replace(residual, hidden=hidden, layer=residual.layer + 1, prefix=prefix)

    def _cache_of(self, tokens: int) -> Any:
        """A cache that seems to hold `tokens` tokens, for the decoder to make its mask by."""
        from transformers import DynamicCache

        nothing = torch.zeros(1, 1, tokens, 1, device=self.device)
        cache = DynamicCache()
        for layer in range(len(self._layers)):
            cache.update(nothing, nothing, layer)
        return cache

    def final(self, residual: Residual) -> Tensor:
        """Run all remaining blocks and the final norm: (batch, length, width)."""
        hidden: Tensor = self.decoder.norm(self.advance(residual, len(self._layers)).hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The LM head: (positions, width) to (positions, vocabulary)."""
        result: Tensor = self.causal.lm_head(hidden)
        return result

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Inside, the model is the base."""
        if not self._adapted:
            yield
            return
        context: AbstractContextManager[None] = self.network.disable_adapter()  # type: ignore[operator]
        with context:
            yield

    def generate(
        self, prompts: Batch, max_new_tokens: int, temperature: float, generator: torch.Generator | None, repeats: int
    ) -> Completions:
        """Sample `repeats` completions a prompt (copies side by side); temperature 0 is greedy."""
        return sampling.generate(
            self.decoder,
            self.causal.lm_head,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            generator=generator,
            repeats=repeats,
            end_of_turn=self._end_of_turn,
            padding=self.tokenizer.pad_token_id,
            new_cache=self.new_cache,
        )

    def new_cache(self) -> Cache:
        """An empty key-value cache, as the decoder wants it."""
        return GrowingCache()

    def parameters_to_train(self) -> list[nn.Parameter]:
        """The adapter weights, in a fixed order."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]


def _first(output: Any) -> Tensor:
    """A block's output, which is a tensor in transformers and a tuple elsewhere."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def end_of_turn_ids(causal: Any, tokenizer: Any) -> frozenset[int]:
    """Every id that a model's settings, its tokenizer or its chat template end an answer with."""
    return stop_ids(
        tokenizer,
        getattr(causal.generation_config, "eos_token_id", None),
        getattr(causal.config, "eos_token_id", None),
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, padding on the left."""
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


def check_template(folder: Path, day: date | None = None) -> ChatTemplate:
    """Try out how a model folder is prompted and what ends its answers, without its weights.

    Args:
        folder: the model.
        day: what a chat template that asks the date is told; None for today.

    Raises:
        ModelError: the chat template will not do, or nothing ends an answer.
    """
    tokenizer = load_tokenizer(folder)
    stop_ids_of(folder, tokenizer)
    return ChatTemplate(tokenizer, day)


def stop_ids_of(folder: Path, tokenizer: Any) -> frozenset[int]:
    """Every token id that ends an answer of the model in a folder; see `stop_ids`."""
    files = [folder / name for name in ("generation_config.json", "config.json")]
    settings = [json.loads(file.read_text(encoding="utf-8-sig")) for file in files if file.is_file()]
    return stop_ids(tokenizer, *(entry.get("eos_token_id") for entry in settings))


def load(folder: Path, *, precision: str, device: str, unpack: bool, compute: str = "bf16") -> tuple[nn.Module, Any]:
    """Load weights without an adapter.

    Args:
        folder: a Hugging Face model folder with safetensors.
        precision: `nf4` (4-bit NF4, double quantisation, bf16 compute), `bf16` or `fp32`.
        device: `cuda` or `cpu`.
        unpack: expand 4-bit weights once after loading. The numbers are the same, each forward is spared the
            unpacking, and 4 times the memory is used; for CPUs.
        compute: `bf16` or `fp32`, the dtype that 4-bit weights compute in.

    Returns:
        The causal language model in evaluation mode, all weights frozen, and its tokenizer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    # On CPUs it warns that an optional accelerated kernel is not installed; nothing here needs it.
    getLogger("bitsandbytes").setLevel("ERROR")
    tokenizer = load_tokenizer(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    already = getattr(config, "quantization_config", None) is not None
    wide = precision == "fp32" or (precision == "nf4" and compute == "fp32")
    dtype = torch.float32 if wide else torch.bfloat16
    options: dict[str, Any] = {"dtype": dtype}
    if precision == "nf4" and not already:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, device_map={"": device}, **options
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


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config

"""The Unsloth backend: its loader and fused kernels on CUDA, in place of transformers' own blocks.

Unsloth changes transformers' classes for the life of a process, so it is loaded only where nothing else is: in the process that
trains (`stages.trainer`). It decodes single tokens on a path that passes the blocks by, where no hook fires. So nothing here
calls its `generate`: sampling goes through the blocks with a cache of plain pairs, and the model stays in evaluation mode,
because in training mode Unsloth drops the padding mask.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from safesteer_lite.errors import ModelError
from safesteer_lite.method.policies import Residual
from safesteer_lite.models import plain
from safesteer_lite.models.adapter import Adapter
from safesteer_lite.models.loaded import PlainModel
from safesteer_lite.models.sampling import Cache
from safesteer_lite.sources.base import Base
from safesteer_lite.sources.download import cache_folder


class PairCache:
    """The cache as Unsloth's decoder takes and returns it: one (keys, values) pair a block, (rows, heads, tokens, size)."""

    def __init__(self) -> None:
        self.given: list[tuple[Tensor, Tensor]] | None = None

    def take(self, output: Any) -> None:
        """Keep the longer pairs that the decoder returned."""
        self.given = [(pair[0], pair[1]) for pair in output.past_key_values]

    def repeat(self, times: int) -> None:
        """Make each row `times` rows, copies side by side."""
        self.given = [
            (keys.repeat_interleave(times, dim=0), values.repeat_interleave(times, dim=0))
            for keys, values in self.given or []
        ]

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.given = [(keys[rows], values[rows]) for keys, values in self.given or []]


class UnslothModel(PlainModel):
    """A model whose blocks are Unsloth's: they return tuples, and take and give the cache as pairs."""

    def new_cache(self) -> Cache:
        """An empty cache of pairs."""
        return PairCache()

    def _cache_of(self, tokens: int) -> Any:
        nothing = torch.zeros(1, 1, tokens, 1, device=self.device)
        return [(nothing, nothing)] * len(self.layers)

    def _block(self, residual: Residual) -> Residual:
        block, kind, prefix = self.layers[residual.layer], self._kinds[residual.layer], residual.prefix
        extra: dict[str, Any] = {}
        if prefix:
            hidden, (keys, values) = block(prefix.hidden, **prefix.arguments[kind], use_cache=True)
            prefix = replace(prefix, hidden=hidden, layer=residual.layer + 1)
            rows = len(residual.hidden)
            extra["past_key_value"] = (keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))
        hidden = block(residual.hidden, **residual.arguments[kind], **extra)[0]
        return replace(residual, hidden=hidden, layer=residual.layer + 1, prefix=prefix)


def take_up() -> Any:
    """Unsloth itself, without its banner, its usage statistics and its progress bars.

    Raises:
        ModelError: transformers was imported first, which Unsloth would change too late.
    """
    if "unsloth" not in sys.modules and "transformers" in sys.modules:
        raise ModelError(
            "Unsloth has to be imported before transformers, and this process has imported transformers already.",
            "Set model.backend=plain.",
        )
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    # Unsloth writes code to a folder and imports it from there: by itself a folder in the current one, which may be
    # somebody else's and hold such a folder already.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_folder() / "unsloth"))
    with redirect_stdout(io.StringIO()):
        return importlib.import_module("unsloth")


def load(base: Base, precision: str, adapter: Adapter, seed: int, device: str = "cuda") -> UnslothModel:
    """Load a model and attach a fresh LoRA adapter (B = 0, so the student starts as the base).

    Args:
        base: the model.
        precision: `nf4` or `bf16`.
        adapter: the adapter's size and place.
        seed: of the adapter's A matrices.
        device: where to.
    """
    unsloth = take_up()
    with redirect_stdout(io.StringIO()):
        network, _ = unsloth.FastLanguageModel.from_pretrained(
            model_name=str(base.folder),
            # Longer sequences would be cut without an error, so the limit is the model's own.
            max_seq_length=plain.library_config(base.folder, base.config).max_position_embeddings,
            dtype=torch.bfloat16,
            load_in_4bit=precision == "nf4",
            load_in_16bit=precision == "bf16",
            device_map={"": device},
            offload_embedding=False,
            use_gradient_checkpointing=False,
            use_exact_model_name=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        network.requires_grad_(False)
        network = unsloth.FastLanguageModel.get_peft_model(
            network,
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            lora_dropout=0.0,
            bias="none",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            layers_to_transform=list(range(adapter.first_layer, len(network.model.layers))),
            layers_pattern="layers",
            use_gradient_checkpointing=False,
            random_state=seed,
        )
    return UnslothModel(network.eval(), plain.load_tokenizer(base.words, base.config), adapter.first_layer)

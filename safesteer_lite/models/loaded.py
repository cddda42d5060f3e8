"""A loaded model on the plain backend (transformers, bitsandbytes, peft): base, teacher and student in one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from safesteer_lite.method.policies import Batch, Chance, Completions, Residual
from safesteer_lite.models import sampling
from safesteer_lite.models.sampling import Cache, Ended, GrowingCache, mask_behind, positions
from safesteer_lite.models.template import stop_ids

# What a block is told of a cache; transformers' name and Unsloth's.
_OF_THE_CACHE = ("past_key_values", "past_key_value", "use_cache")


class _Reached(Exception):
    """Ends a forward once what was wanted of it is known.

    Attributes:
        hidden: the residual stream where it ended.
    """

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Taker(nn.Module):
    """Stands in for a block: notes what blocks of its kind are given, and passes the residual stream on as it came."""

    def __init__(self, kind: str, kinds: frozenset[str], seen: dict[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self.kind, self.kinds, self.seen = kind, kinds, seen

    def forward(self, hidden: Tensor, **given: Any) -> Tensor:
        """The residual stream, (batch, length, width), as it came; ends the decoder's forward once every kind is known."""
        self.seen.setdefault(self.kind, {key: value for key, value in given.items() if key not in _OF_THE_CACHE})
        if self.seen.keys() == self.kinds:
            raise _Reached(hidden)
        return hidden


class _KeepPrefix:
    """Stands where a block looks for its key-value cache: notes the prefix's keys and values as they pass."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """As a cache does: what a block has read so far, which is the prefix itself."""
        self.keys, self.values = keys, values
        return keys, values


class _PutBefore:
    """Stands where a block looks for its key-value cache: gives each sequence the prefix's keys and values."""

    def __init__(self, prefix: _KeepPrefix) -> None:
        self._prefix = prefix

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """As a cache does: keys and values of (batch, heads, length, head width), behind those of the prefix."""
        rows = len(keys)
        return (
            torch.cat([self._prefix.keys.expand(rows, -1, -1, -1), keys], dim=2),
            torch.cat([self._prefix.values.expand(rows, -1, -1, -1), values], dim=2),
        )


class PlainModel:
    """One loaded model: base, teacher and student in one set of weights. See `method.policies.LanguageModel`.

    Attributes:
        checkpointing: whether adapted blocks keep only their input for backward and are run again there: the same
            numbers with far less memory, for one more forward.
        layers: the decoder blocks, lowest first.
        end_of_turn: token ids that end an answer: those that the model's own files name, unless others are set.
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
        self.layers: list[nn.Module] = list(self.decoder.layers)
        # Blocks of one kind are given the same mask and positions.
        self._kinds: list[str] = getattr(causal.config, "layer_types", None) or ["block"] * len(self.layers)
        self._window: int | None = getattr(causal.config, "sliding_window", None)
        self._softcap: float | None = getattr(causal.config, "final_logit_softcapping", None)
        self._first_adapter_layer = first_adapter_layer if first_adapter_layer is not None else len(self.layers)
        self.end_of_turn = end_of_turn_ids(causal, tokenizer)
        # A special token that the vocabulary does not have has no id, and one that only other models read has no row.
        named = [int(index) for index in tokenizer.all_special_ids if index is not None]
        named += [int(index) for index, token in tokenizer.added_tokens_decoder.items() if token.special]
        self._special = frozenset(index for index in named if index < self.decoder.embed_tokens.num_embeddings)

    @property
    def device(self) -> torch.device:
        """Where token ids must be."""
        device: torch.device = self.decoder.embed_tokens.weight.device
        return device

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
        return [module for module in self.layers[layer].modules() if hasattr(module, "lora_A")]

    def start(self, batch: Batch) -> Residual:
        """The token embeddings at block 0, with the arguments that every block receives.

        A prefix that several sequences share is read once, apart from them: half of a short prompt is the system
        prompt that its chat template adds.
        """
        batch = self._shared(batch, 0)
        if batch.prefix and len(batch) > 1:
            first, rest = batch.split_prefix()
            return replace(self._embed(rest, batch.prefix), prefix=self._embed(first))
        return self._embed(batch)

    def _shared(self, batch: Batch, further: int) -> Batch:
        """The batch without a shared prefix where it would be read wrongly: padding stands between it and what follows, and
        a window that ends within the sequence counts it.

        Args:
            batch: prompts.
            further: tokens that will follow.
        """
        longer = self._window is not None and batch.input_ids.shape[1] + further > self._window
        return replace(batch, prefix=0) if longer else batch

    def _embed(self, batch: Batch, behind: int = 0) -> Residual:
        """`start` of a batch that comes behind `behind` other tokens.

        The decoder itself prepares mask and positions; what stands where its blocks are called takes them, and ends the
        forward once there are those of each kind of block.
        """
        arguments: dict[str, Mapping[str, Any]] = {}
        kinds = frozenset(self._kinds)
        blocks, self.decoder.layers = (
            self.decoder.layers,
            nn.ModuleList(_Taker(kind, kinds, arguments) for kind in self._kinds),
        )
        try:
            self.decoder(
                input_ids=batch.input_ids,
                attention_mask=mask_behind(behind, batch.attention_mask),
                position_ids=positions(batch.attention_mask, behind),
                past_key_values=self._cache_of(behind) if behind else None,
                use_cache=bool(behind),
            )
        except _Reached as reached:
            return Residual(reached.hidden, 0, arguments)
        finally:
            self.decoder.layers = blocks
        raise AssertionError("The decoder did not call its blocks.")

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
        block, kind, prefix = self.layers[residual.layer], self._kinds[residual.layer], residual.prefix
        extra: dict[str, Any] = {}
        if prefix:
            kept = _KeepPrefix()
            output = block(prefix.hidden, **prefix.arguments[kind], past_key_values=kept)
            prefix = replace(prefix, hidden=_first(output), layer=residual.layer + 1)
            extra["past_key_values"] = _PutBefore(kept)
        hidden = _first(block(residual.hidden, **residual.arguments[kind], **extra))
        return replace(residual, hidden=hidden, layer=residual.layer + 1, prefix=prefix)

    def _cache_of(self, tokens: int) -> Any:
        """A cache that seems to hold `tokens` tokens, for the decoder to make its mask by."""
        from transformers import DynamicCache

        nothing = torch.zeros(1, 1, tokens, 1, device=self.device)
        cache = DynamicCache()
        for layer in range(len(self.layers)):
            cache.update(nothing, nothing, layer)
        return cache

    def final(self, residual: Residual) -> Tensor:
        """Run all remaining blocks and the final norm: (batch, length, width)."""
        hidden: Tensor = self.decoder.norm(self.advance(residual, len(self.layers)).hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The LM head, and the bound that some models put on logits: (positions, width) to (positions, vocabulary)."""
        result: Tensor = self.causal.lm_head(hidden)
        return result if self._softcap is None else (result / self._softcap).tanh() * self._softcap

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Inside, the model is the base.

        What peft's own `disable_adapter` does to each layer, without its report on the whole model beforehand, which takes
        longer than a small model's forward.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [module for module in self.network.modules() if isinstance(module, BaseTunerLayer)]
        # Whoever switched them off switches them on again.
        switched = [layer for layer in layers if not layer.disable_adapters]
        # peft has every weight of an adapter trained that it switches on.
        frozen = [part for layer in switched for part in layer.parameters() if not part.requires_grad]
        try:
            for layer in switched:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in switched:
                layer.enable_adapters(True)
            for part in frozen:
                part.requires_grad_(False)

    def generate(
        self,
        prompts: Batch,
        max_new_tokens: int,
        temperature: float,
        chance: Chance,
        repeats: int,
        ended: Ended | None = None,
        first: Callable[[Tensor], None] | None = None,
    ) -> Completions:
        """Sample `repeats` completions a prompt (copies side by side); temperature 0 is greedy. See `sampling.generate`."""
        return sampling.generate(
            self.decoder,
            self.logits,
            self._shared(prompts, max_new_tokens),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            chance=chance,
            repeats=repeats,
            end_of_turn=self.end_of_turn,
            # Any token will do: what stands behind the end of an answer is never read.
            padding=min(self.end_of_turn) if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
            new_cache=self.new_cache,
            ended=ended,
            first=first,
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

"""A decoder that is called as Unsloth's is, made of transformers' own blocks, so that the backend's code runs on a CPU.

As read in Unsloth 2026.10.7: blocks return tuples; the cache goes in and comes out as one (keys, values) pair a block, under
the name `past_key_value`; a mask is made only where one is needed; the decoder returns the longer pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.unsloth import UnslothModel

Pair = tuple[Tensor, Tensor]


class _OnePair:
    """What a block of transformers takes for its cache."""

    def __init__(self, before: Pair | None) -> None:
        self.pair = before

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Pair:
        if self.pair is not None:
            keys, values = torch.cat([self.pair[0], keys], dim=2), torch.cat([self.pair[1], values], dim=2)
        self.pair = (keys, values)
        return self.pair


class PairBlock(nn.Module):
    """One block of transformers, called as Unsloth's."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block
        self.self_attn, self.mlp = block.self_attn, block.mlp

    def forward(
        self,
        hidden_states: Tensor,
        causal_mask: None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_value: Pair | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        padding_mask: None = None,
        position_embeddings: Pair | None = None,
    ) -> tuple[Any, ...]:
        cache = _OnePair(past_key_value)
        hidden = self.block(
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            position_embeddings=position_embeddings,
        )
        return (hidden, cache.pair) if use_cache else (hidden,)


class PairDecoder(nn.Module):
    """A decoder of transformers, called as Unsloth's."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.embed_tokens, self.norm, self.rotary_emb = decoder.embed_tokens, decoder.norm, decoder.rotary_emb
        self.layers = nn.ModuleList([PairBlock(block) for block in decoder.layers])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Sequence[Pair] | None = None,
        use_cache: bool = False,
    ) -> BaseModelOutputWithPast:
        hidden = self.embed_tokens(input_ids)
        behind = past_key_values[0][0].shape[2] if past_key_values is not None else 0
        embeddings, pairs = self.rotary_emb(hidden, position_ids), []
        mask = additive_mask(attention_mask, input_ids.shape[1], behind, hidden.dtype)
        for index, layer in enumerate(self.layers):
            output = layer(
                hidden,
                causal_mask=None,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_value=past_key_values[index] if past_key_values is not None else None,
                output_attentions=False,
                use_cache=use_cache,
                padding_mask=None,
                position_embeddings=embeddings,
            )
            hidden = output[0]
            pairs += [output[1]] if use_cache else []
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden), past_key_values=tuple(pairs) if use_cache else None
        )


def additive_mask(attention_mask: Tensor, length: int, behind: int, dtype: torch.dtype) -> Tensor | None:
    """(batch, 1, length, behind + length); None where nothing is padded and the kernels know what to do."""
    if bool(attention_mask.all()) and (length == 1 or behind == 0):
        return None
    whole = behind + length
    visible = torch.ones(length, whole, dtype=torch.bool, device=attention_mask.device).tril(behind)
    hidden = ~(visible & (attention_mask[:, None, None, :whole] > 0))
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)


def as_unsloth(policy: Policy) -> Policy:
    """The same network behind the Unsloth backend; the policy given cannot be used any more."""
    causal: Any = policy.model.causal
    causal.model = PairDecoder(causal.model)
    return Policy(UnslothModel(policy.model.network, policy.tokenizer, policy.model.first_adapter_layer), 128)

"""Attention whose keys and values are never copied for the query heads that share them.

In a decoder with grouped queries, 4 to 8 query heads look at the same keys and values. Where a mask is given, transformers
first copies both for each of these heads, at every block and every token, because torch's fast kernels want as many key
heads as query heads. Here the queries of such a group are laid end to end instead, as one longer query of the head that
they share: the same products and the same sums, without the copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

GROUPED = "grouped"
"""The name under which transformers finds it."""


def register() -> str:
    """Make it known to transformers, as often as one likes.

    Returns:
        The name to ask for as `attn_implementation`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(GROUPED, attend)
    AttentionMaskInterface.register(GROUPED, mask_for)
    return GROUPED


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as a block of transformers calls it.

    Args:
        module: the block's attention layer.
        query: (rows, heads, queries, size).
        key, value: (rows, key heads, keys, size); the number of heads is a multiple of that of key heads.
        attention_mask: (rows, 1, queries, keys), or that of `mask_for`; None where each query sees all up to itself, which
            several queries whose products are bounded always have to be told by a mask.
        dropout: share of the weights that is left out.
        scaling: of the products; None for 1 / sqrt(size).
        options: what else transformers tells, such as the bound of the products (`softcap`).

    Returns:
        (rows, queries, heads, size), and no weights.
    """
    rows, heads, queries, size = query.shape
    shared, softcap = heads // key.shape[1], options.get("softcap")
    if softcap is None and (shared == 1 or (attention_mask is None and queries > 1)):
        # Nothing to be copied, or torch's kernel for a causal mask, which knows of groups itself.
        from transformers import AttentionInterface

        plain: Any = AttentionInterface()["sdpa"]
        result: tuple[Tensor, None] = plain(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return result
    if attention_mask is not None and attention_mask.shape[2] == queries:
        attention_mask = _end_to_end(attention_mask, shared)
    joined = query.reshape(rows, key.shape[1], shared * queries, size)
    if softcap is None:
        found = scaled_dot_product_attention(
            joined, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
        )
    else:
        found = _softcapped(joined, key, value, attention_mask, scaling, softcap)
    # Kernels lay this out in one way or another: heads are taken apart first, which no layout is in the way of.
    apart = found.unflatten(2, (shared, queries)).permute(0, 3, 1, 2, 4)
    return apart.reshape(rows, queries, heads, size), None


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, bound: float
) -> Tensor:
    """Attention whose products are bent to stay below a bound (Gemma 2), which no kernel of torch does."""
    products = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    products = (products / bound).tanh() * bound
    if mask is not None:
        products = products + mask
    return products.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def mask_for(*, config: Any, dtype: torch.dtype, **wanted: Any) -> Tensor | None:
    """The mask of one forward, made once for all its blocks.

    What may not be seen gets the lowest number instead of minus infinity: the padding before a prompt sees nothing at all,
    and a softmax over nothing but infinities is not a number.

    Args:
        config: the model's.
        dtype: that of the hidden states.
        wanted: what transformers' `sdpa_mask` takes: sizes, offsets, which tokens are padding.

    Returns:
        (rows, 1, query heads a key head * queries, keys), 0 where a query looks and the lowest number of `dtype` elsewhere;
        None where a causal mask says it all.
    """
    from transformers import AttentionMaskInterface

    softcapped = getattr(config, "attn_logit_softcapping", None) is not None
    if softcapped or (wanted["q_length"] == 1 and wanted["attention_mask"] is not None):
        # Whether nothing is padded is asked of the device, which would have to catch up with the host at every token; and
        # where products are bounded, no kernel adds a causal mask by itself.
        wanted["allow_is_causal_skip"] = False
    plain: Any = AttentionMaskInterface()["sdpa"]
    visible: Tensor | None = plain(config=config, dtype=dtype, **wanted)
    if visible is None:
        return None
    rows, _, queries, keys = visible.shape
    # Rows of memory that begin at multiples of 8: CUDA's kernel would make a copy that has them, in every block.
    mask = torch.full((rows, 1, queries, -(-keys // 8) * 8), torch.finfo(dtype).min, dtype=dtype, device=visible.device)
    mask[..., :keys].masked_fill_(visible, 0)
    return _end_to_end(mask, config.num_attention_heads // config.num_key_value_heads)[..., :keys]


def _end_to_end(mask: Tensor, times: int) -> Tensor:
    """The mask of `times` query heads that are laid end to end: (rows, 1, times * queries, keys)."""
    rows, _, queries, keys = mask.shape
    return mask.unsqueeze(2).expand(rows, 1, times, queries, keys).reshape(rows, 1, times * queries, keys)

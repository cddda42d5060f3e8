"""AdamW with 8-bit moments in pageable memory, for cards on which every gigabyte counts."""

from __future__ import annotations

import torch
from torch import nn

from safesteer_lite.method.optimizer import Optimizing, adamw


def paged_adamw_8bit(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW: 2 bytes of moments a weight instead of 8, which the driver may move to RAM and back.

    On a CPU nothing is paged. Moments that a resumed run has loaded lie in ordinary memory.
    """
    import bitsandbytes as bnb

    optimizer: torch.optim.Optimizer = bnb.optim.PagedAdamW8bit(weights, lr=0.0, betas=(0.9, 0.999), weight_decay=0.0)
    return optimizer


def optimizing_on(device: torch.device) -> Optimizing:
    """8-bit and paged on CUDA; torch's own elsewhere, where memory is cheap and resuming is exact to the last bit."""
    return paged_adamw_8bit if device.type == "cuda" else adamw

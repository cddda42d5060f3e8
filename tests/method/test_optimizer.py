"""What AdamW on float32 copies takes of memory."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from safesteer_lite.method.optimizer import MasterAdamW
from tests.live_bytes import LiveBytes


@pytest.mark.parametrize("averaging", [0.0, 0.8])
def test_what_a_step_takes_is_told_before_it(averaging: float) -> None:
    """The first makes the moments too; between steps nothing else is left of it."""
    weights = [nn.Parameter(torch.ones(64, 512, dtype=torch.bfloat16)) for _ in range(8)]
    optimizer = MasterAdamW(weights, averaging)
    # On a card torch updates all weights together.
    optimizer.optimizer.param_groups[0]["foreach"] = True
    gradients = [torch.ones_like(weight) for weight in weights]
    for moments in (True, False):
        told = optimizer.bytes_to_come
        with LiveBytes() as live:
            for _ in range(2):
                optimizer.add(gradients)
            optimizer.step(1e-3, 1.0)
            optimizer.zero()
            gc.collect()
        assert live.peak == pytest.approx(told, rel=0.1)
        assert live.now == pytest.approx(2 * 4 * 8 * 64 * 512 if moments else 0, abs=1000)

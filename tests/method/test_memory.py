"""Half a batch, and again, where memory runs out: on a card and on the CPU."""

from __future__ import annotations

import pytest
import torch

from safesteer_lite.method.memory import fitting

TOO_MUCH = 1 << 50


@pytest.mark.parametrize("kind", ["card", "CPU", "Python"])
def test_a_batch_is_halved_until_it_fits(kind: str) -> None:
    tried: list[int] = []

    def work(size: int) -> int:
        tried.append(size)
        if size > 3:
            if kind == "card":
                raise torch.OutOfMemoryError("simulated, for want of a card")
            _ = torch.empty(TOO_MUCH) if kind == "CPU" else bytearray(TOO_MUCH)
        return -size

    assert fitting(16, work) == (-2, 2)
    assert tried == [16, 8, 4, 2]


def test_what_never_fits_and_what_is_no_want_of_memory_reach_the_caller() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        fitting(8, lambda size: torch.empty(TOO_MUCH))
    tried: list[int] = []

    def broken(size: int) -> None:
        tried.append(size)
        raise RuntimeError("the shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        fitting(8, broken)
    assert tried == [8]

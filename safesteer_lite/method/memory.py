"""What to do when a batch does not fit in memory: half of it, and again."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def fitting(size: int, work: Callable[[int], Result]) -> tuple[Result, int]:
    """`work(size)`, from the start with half the size each time memory runs out.

    Args:
        size: rows at a time to begin with.
        work: must do the same whenever it is called again.

    Returns:
        Its result, and the size that fitted.

    Raises:
        torch.OutOfMemoryError, RuntimeError, MemoryError: not even one row at a time fits.
    """
    while True:
        try:
            return work(size), size
        except (RuntimeError, MemoryError) as error:
            if size <= 1 or not is_out_of_memory(error):
                raise
        # Only out here, where the exception no longer holds the failed attempt's tensors, is their memory free.
        size = size // 2
        gc.collect()
        release()


# What torch and the libraries under it say in a RuntimeError of no class of its own: CUDA itself, cuBLAS and its sisters, and
# torch's allocator for the CPU, whose words differ on Windows.
_SIGNS = ("out of memory", "_STATUS_ALLOC_FAILED", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the card or on the CPU, in any of its forms."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    )


def release() -> None:
    """Give what torch keeps of freed memory back to the card, so that tensors of other sizes find it in one piece."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()

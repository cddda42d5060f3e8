"""Half a batch, and again, where memory runs out: on a card and on the CPU."""

from __future__ import annotations

import gc

import pytest
import torch

from safesteer_lite.method.memory import fitting, is_out_of_memory

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


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
    ],
)
def test_want_of_memory_is_known_by_each_of_its_messages(said: str) -> None:
    def work(size: int) -> int:
        if size > 1:
            raise RuntimeError(said)
        return size

    assert fitting(4, work) == (1, 1)


def test_other_failures_of_the_same_libraries_are_no_want_of_memory() -> None:
    for said in ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED", "CUDA error: an illegal memory access was encountered"):
        assert not is_out_of_memory(RuntimeError(said))
    assert not is_out_of_memory(ValueError("out of memory"))


class Circle:
    """Holds memory that reference counting alone never frees."""

    alive = 0

    def __init__(self) -> None:
        self.itself = self
        Circle.alive += 1

    def __del__(self) -> None:
        Circle.alive -= 1


def test_what_a_failed_attempt_left_unreachable_is_freed_before_the_next() -> None:
    def work(size: int) -> int:
        assert Circle.alive == 0
        Circle()
        if size > 1:
            raise MemoryError
        return size

    gc.disable()
    try:
        assert fitting(4, work) == (1, 1)
    finally:
        gc.enable()

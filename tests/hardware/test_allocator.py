"""Freed memory stays with the process, counted in page faults; the peak is of one stage; torch's allocator is told."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from safesteer_lite.hardware.allocator import grow_segments


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_kept() -> None:
    """A large block taken again brings no page faults, where without the setting every page is mapped anew."""
    code = """
import resource, sys
from safesteer_lite.hardware.allocator import keep_freed_memory
applied = keep_freed_memory() if sys.argv[1] == "with" else True
bytearray(b"x") * (64 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    bytearray(b"x") * (64 << 20)
print(int(applied), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

    def faults(mode: str) -> tuple[int, int]:
        done = subprocess.run([sys.executable, "-c", code, mode], capture_output=True, text=True, check=True)
        applied, count = done.stdout.split()
        return int(applied), int(count)

    applied, kept = faults("with")
    if not applied:
        pytest.skip("the C library is not glibc")
    _, anew = faults("without")
    assert kept < 100
    assert anew > 100


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
def test_freed_memory_is_given_back_when_asked() -> None:
    """Blocks freed below one that stays cannot leave by themselves: the resident size falls only when asked."""
    code = """
import pathlib
from safesteer_lite.hardware.allocator import keep_freed_memory, return_freed_memory
def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096
applied = keep_freed_memory()
blocks = [bytearray(b"x") * (1 << 20) for _ in range(64)]
stays = bytearray(b"x") * (1 << 20)
del blocks
kept = resident()
given = return_freed_memory()
print(int(applied and given), kept - resident())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    applied, freed = map(int, done.stdout.split())
    if not applied:
        pytest.skip("the C library is not glibc")
    assert freed > 48 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a process's peak")
def test_the_peak_is_that_of_what_follows() -> None:
    code = """
from safesteer_lite.hardware.allocator import peak, start_peak
bytearray(b"x") * (256 << 20)
first = peak()
start_peak()
second = peak()
bytearray(b"x") * (64 << 20)
print(first >> 20, second >> 20, peak() >> 20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, nothing, second = map(int, done.stdout.split())
    assert first > nothing + 200
    assert 50 < second - nothing < 100


@pytest.mark.skipif(sys.platform != "linux", reason="torch grows segments on Linux alone")
def test_torch_grows_its_pieces_of_a_cards_memory_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert not grow_segments() and os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    assert grow_segments() and os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")

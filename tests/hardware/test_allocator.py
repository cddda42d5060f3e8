"""Freed memory stays with the process, counted in page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest


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

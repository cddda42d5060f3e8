"""A merge that was killed goes on after its last finished file, and ends with the same bytes."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safesteer_lite.export.weights.merge import RECORD, merge_adapter
from tests import children
from tests.export.weights.tiny_lora import save_base

needs_sigkill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system cannot kill in that way")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def merge_and_die(base: Path, adapter: Path, out: Path, after: int) -> None:
    """A merge that kills itself, as a power cut would, once the progress has been told `after` times."""
    told = itertools.count(1)

    def die(done: int, total: int) -> None:
        if next(told) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    merge_adapter(base, adapter, out, progress=die)


def kill(base: Path, adapter: Path, out: Path, after: int) -> list[str]:
    """Start a merge and kill it after some tensors; returns the weight files that it says are whole."""
    assert children.run(merge_and_die, base, adapter, out, after) == -signal.SIGKILL
    assert not out.exists()
    record = out.with_name(f"{out.name}.safesteer-draft") / RECORD
    return sorted(json.loads(record.read_text())["files"]) if record.exists() else []


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base in so many files that two kills leave some of them."""
    return save_base(tmp_path / "base", "qwen2-tied", torch.bfloat16, max_shard_size="20KB")


@pytest.fixture
def whole(tmp_path: Path, base: Path, adapter: Path) -> dict[str, bytes]:
    """The files of a merge that nothing interrupted."""
    merge_adapter(base, adapter, tmp_path / "whole")
    return contents(tmp_path / "whole")


@needs_sigkill
def test_a_killed_merge_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, base: Path, adapter: Path, whole: dict[str, bytes]
) -> None:
    out, draft = tmp_path / "out", tmp_path / "out.safesteer-draft"
    finished = kill(base, adapter, out, 10)
    assert finished and len(finished) < len([name for name in whole if name.endswith(".safetensors")])
    again = kill(base, adapter, out, 16)
    assert again[: len(finished)] == finished and len(again) > len(finished)
    before = {name: (draft / name).stat().st_ino for name in again}
    merge_adapter(base, adapter, out)
    assert contents(out) == whole and not draft.exists()
    assert {name: (out / name).stat().st_ino for name in again} == before


def damage(draft: Path, name: str) -> None:
    content = bytearray((draft / name).read_bytes())
    content[-1] ^= 1
    (draft / name).write_bytes(content)


@needs_sigkill
@pytest.mark.parametrize(
    "change",
    [
        damage,
        lambda draft, name: (draft / name).unlink(),
        lambda draft, name: (draft / name).write_bytes(b""),
        lambda draft, name: (draft / RECORD).write_text("{"),
        lambda draft, name: (draft / RECORD).write_text('{"mark": 1, "files": []}'),
        lambda draft, name: (draft / RECORD).unlink(),
    ],
)
def test_what_is_not_as_it_was_written_is_written_again(
    tmp_path: Path, base: Path, adapter: Path, whole: dict[str, bytes], change: Callable[[Path, str], object]
) -> None:
    finished = kill(base, adapter, tmp_path / "out", 10)
    change(tmp_path / "out.safesteer-draft", finished[0])
    merge_adapter(base, adapter, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


@needs_sigkill
def test_another_merge_trusts_nothing_of_it(tmp_path: Path, base: Path, adapter: Path) -> None:
    finished = kill(base, adapter, tmp_path / "out", 10)
    left = {name: (tmp_path / "out.safesteer-draft" / name).read_bytes() for name in finished}
    merge_adapter(base, adapter, tmp_path / "out", strength=0.5)
    merge_adapter(base, adapter, tmp_path / "half", strength=0.5)
    assert contents(tmp_path / "out") == contents(tmp_path / "half")
    assert any(contents(tmp_path / "out")[name] != content for name, content in left.items())

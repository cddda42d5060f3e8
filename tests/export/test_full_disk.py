"""A disk that runs full in the middle: one sentence, and nothing is left of what was begun."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from safesteer_lite.errors import DiskSpaceError
from safesteer_lite.export import drafts
from safesteer_lite.export.folder import exported
from safesteer_lite.export.weights.merge import merge_adapter
from safesteer_lite.export.weights.verify import write_sums

SIZE = 24 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MiB; only a superuser can make one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no small disk can be made here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(place: Path, left: int = 0) -> None:
    """Leave so many bytes free, and not a page more."""
    with (place / "filler").open("wb") as stream:
        free = shutil.disk_usage(place).free - left
        stream.write(bytes(max(free, 0)))


@pytest.mark.parametrize("left", [0, 4096, 20_000, 60_000])
def test_a_merge_whose_disk_is_filled_by_others_leaves_nothing(
    small_disk: Path, base: Path, adapter: Path, left: int
) -> None:
    filled: list[int] = []

    def progress(done: int, total: int) -> None:
        if not filled:
            filled.append(done)
            fill(small_disk, left)

    with pytest.raises(DiskSpaceError, match=r"The disk ran full while .*out was written"):
        merge_adapter(base, adapter, small_disk / "out", progress=progress)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def through_numpy(draft: Path) -> None:
    """As quantised tensors are written: numpy says how much it could not write, and no number of the system's."""
    import numpy

    with (draft / "a.gguf").open("wb") as stream:
        numpy.zeros(2 * SIZE, numpy.uint8).tofile(stream)


def through_copies(draft: Path) -> None:
    source = draft.parent.parent / "source"
    source.mkdir()
    (source / "adapter_model.safetensors").write_bytes(bytes(2 * SIZE))
    drafts.copy_folder(source, draft)


def through_sums(draft: Path) -> None:
    (draft / "a.gguf").write_bytes(bytes(1000))
    fill(draft)
    write_sums(draft)


@pytest.mark.parametrize("write", [through_numpy, through_copies, through_sums])
def test_every_way_of_writing_ends_in_the_same_sentence(small_disk: Path, write: Callable[[Path], None]) -> None:
    with (
        pytest.raises(DiskSpaceError, match=r"The disk ran full while .*out was written"),
        exported(small_disk / "out") as draft,
    ):
        write(draft)
    assert list(small_disk.iterdir()) == []

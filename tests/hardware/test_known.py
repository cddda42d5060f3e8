"""What is known of the presets' models before a download: sizes, which card they fit, whether the disk has room."""

from __future__ import annotations

from dataclasses import replace

import pytest

from safesteer_lite.hardware import known
from safesteer_lite.hardware.shape import parameters
from tests.hardware.examples import CPU_MACHINE


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen3-4B-Instruct-2507", 4.022),
        ("Qwen/Qwen2.5-7B-Instruct", 7.616),
        ("meta-llama/Llama-3.2-3B-Instruct", 3.213),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8.030),
        ("Qwen2.5-Coder-0.5B-Instruct", 0.494),
    ],
)
def test_the_presets_have_the_published_numbers_of_parameters(name: str, billions: float) -> None:
    assert parameters(known.KNOWN[name].shape) / 1e9 == pytest.approx(billions, abs=0.0005)


def test_what_fits_which_card() -> None:
    rows = known.fit_table(
        ["Qwen/Qwen3-4B-Instruct-2507", "meta-llama/Meta-Llama-3-8B-Instruct"], (4, 8, 12)
    ).splitlines()
    assert rows[0] == "| model | download | 4 GB card | 8 GB card | 12 GB card |"
    assert rows[2] == "| Qwen/Qwen3-4B-Instruct-2507 | 8.0 GB | does not fit | fits | fits |"
    assert rows[3] == "| meta-llama/Meta-Llama-3-8B-Instruct | 16.1 GB | does not fit | tight | fits |"


def test_a_small_disk_is_told_before_the_download() -> None:
    small = known.KNOWN["Qwen2.5-Coder-0.5B-Instruct"]
    assert known.outlook(CPU_MACHINE, small.shape).fit == "fits"
    found = known.outlook(replace(CPU_MACHINE, disk_free=10**9), small.shape, download=small.size)
    assert found.fit == "does not fit" and found.reason == "The disk is too small: 1.7 GB needed, 1.0 GB free."
    assert found.disk_bytes > small.size and set(found.memory_bytes) >= {"direction", "distill", "evaluate", "export"}


@pytest.mark.parametrize(
    "name", ["Qwen2.5-Coder-0.5B-Instruct", "Qwen/Qwen2.5-Coder-1.5B-Instruct", "models/Qwen2.5-Coder-1.5B-Instruct/"]
)
def test_of_a_measured_model_nothing_is_told(name: str) -> None:
    assert known.measured_on(name) == ""


def test_who_trains_another_model_is_told_which_were_measured() -> None:
    assert known.measured_on("Qwen/Qwen2.5-7B-Instruct") == (
        "Qwen2.5-Coder-0.5B-Instruct and Qwen2.5-Coder-1.5B-Instruct alone: what it does to this model, "
        "its own before and after will tell"
    )

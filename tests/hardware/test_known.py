"""What is known of the presets' models before a download: sizes, which card they fit, whether the disk has room."""

from __future__ import annotations

from dataclasses import replace

import pytest

from safesteer_lite import config
from safesteer_lite.hardware import known
from safesteer_lite.hardware.peaks import LITE, Demand
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
    paper = Demand.of(config.build([("paper", config.recipe_values("paper", ""))]))
    names = ["Qwen/Qwen3-4B-Instruct-2507", "meta-llama/Meta-Llama-3-8B-Instruct"]
    rows = known.fit_table(names, {"lite": LITE, "paper": paper}, (4, 8, 12)).splitlines()
    assert rows[0] == "| model | download | recipe | at least | 4 GB card | 8 GB card | 12 GB card |"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]
    assert [(row[0], row[2]) for row in cells] == [(name, recipe) for name in names for recipe in ("`lite`", "`paper`")]
    assert [row[-1] for row in cells] == ["fits"] * 4
    assert [row[-2] for row in cells] == ["fits", "fits", "tight", "tight"]
    least = [float(row[3].removesuffix(" GB")) for row in cells]
    assert least[1] > least[0] + 0.5 and least[3] > least[2] + 0.5, "long rollouts, and all blocks are trained"
    assert [row[-3] for row in cells[2:]] == ["does not fit"] * 2


def test_the_defaults_of_what_is_asked_for_are_those_of_lite() -> None:
    assert Demand.of(config.build([])) == LITE


def test_a_small_disk_is_told_before_the_download() -> None:
    small = known.KNOWN["Qwen2.5-Coder-0.5B-Instruct"]
    assert known.outlook(CPU_MACHINE, small.shape).fit == "fits"
    found = known.outlook(replace(CPU_MACHINE, disk_free=10**9), small.shape, download=small.size)
    assert found.fit == "does not fit" and found.reason == "The disk is too small: 1.6 GB needed, 1.0 GB free."
    assert found.disk_bytes > small.size and set(found.memory_bytes) >= {"direction", "distill", "evaluate", "export"}


@pytest.mark.parametrize(
    "name", ["Qwen2.5-Coder-0.5B-Instruct", "Qwen/Qwen2.5-Coder-1.5B-Instruct", "models/Qwen2.5-Coder-1.5B-Instruct/"]
)
def test_of_a_measured_model_nothing_is_told(name: str) -> None:
    assert known.measured_on(name) == ""


def test_who_trains_another_model_is_told_which_were_measured() -> None:
    assert known.measured_on("Qwen/Qwen2.5-7B-Instruct") == (
        "Qwen2.5-Coder-0.5B-Instruct and Qwen2.5-Coder-1.5B-Instruct alone: "
        "what it does to this model, its own before and after will tell"
    )

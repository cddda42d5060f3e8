"""A run goes on as its model was loaded when it began, or is refused with the way out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from safesteer_lite.config import ModelConfig
from safesteer_lite.errors import ModelError, RunFolderError
from safesteer_lite.hardware import kept
from safesteer_lite.hardware.backend import Decision, choose_backend, smallest_need
from safesteer_lite.hardware.kept import decide_again, to_record
from safesteer_lite.hardware.machine import Machine
from safesteer_lite.hardware.peaks import LITE, Demand
from tests.hardware.examples import CARD, CPU_MACHINE, GB, SMALL
from tests.hardware.test_backend import TURING, WITH_UNSLOTH

UNPACKED = {"device": "cpu", "precision": "nf4", "unpack": True, "compute_dtype": "bf16"}
ON_CARD = {**UNPACKED, "device": "cuda", "unpack": False}
NEED = smallest_need(SMALL, "cpu", "nf4", True, "bf16").peak_bytes


def again(record: dict[str, Any], machine: Machine, monkeypatch: pytest.MonkeyPatch, demand: Demand = LITE) -> Decision:
    monkeypatch.setattr(kept, "inspect", lambda folder: machine)
    return decide_again(record, ModelConfig(), SMALL, Path("runs/a-run"), demand)


@pytest.mark.parametrize(
    ("began", "now", "differs"),
    [
        (GB * 2, 24 * GB, "unpack"),
        (24 * GB, NEED + 1, "unpack"),
        (24 * GB, 24 * GB, "device"),
        (24 * GB, 24 * GB, "compute_dtype"),
    ],
)
def test_it_goes_on_as_it_began_where_it_would_begin_otherwise_now(
    began: int, now: int, differs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = choose_backend(replace(CPU_MACHINE, ram_available=began), SMALL, "auto")
    here = replace(CPU_MACHINE, ram_available=now, gpus=(CARD,) if differs == "device" else ())
    here = replace(here, cpu_bf16=differs != "compute_dtype")
    assert getattr(choose_backend(here, SMALL, "auto"), differs) != getattr(first, differs)
    found = again(to_record(first), here, monkeypatch)
    assert to_record(found) == to_record(first)
    assert found.reason.startswith("As the run began: 4-bit weights") and found.reason.endswith(" free.")
    assert found.fit == ("tight" if now == NEED + 1 else "fits")


def test_a_card_and_a_library_are_those_that_are_there_now(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = (replace(CARD, memory_free=5 * GB), replace(CARD, number=1), replace(TURING, number=2, memory_free=GB))
    found = again(ON_CARD, replace(WITH_UNSLOTH, gpus=cards), monkeypatch, Demand(completion_tokens=512))
    assert (found.place, found.library.name) == ("cuda:1", "unsloth")
    assert again(ON_CARD, replace(CPU_MACHINE, gpus=cards), monkeypatch).library.name == "plain"


def test_what_the_machine_cannot_hold_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ModelError, match="cannot hold the run as it began: 4-bit weights unpacked to bf16 on the CPU"
    ) as caught:
        again(UNPACKED, replace(CPU_MACHINE, ram_available=NEED - 1), monkeypatch)
    assert "1.3 GB needed, 1.3 GB free" in caught.value.message
    assert "--set distill.checkpointing=yes" in caught.value.hint and "start a new run" in caught.value.hint
    paper = Demand(completion_tokens=512, depth_start=0.0)
    fits = smallest_need(SMALL, "cpu", "nf4", True, "bf16", replace(paper, checkpointing="yes")).peak_bytes
    here = replace(CPU_MACHINE, ram_available=fits)
    with pytest.raises(ModelError, match="cannot hold"):
        again(UNPACKED, here, monkeypatch, paper)
    # What the hint says does help.
    assert again(UNPACKED, here, monkeypatch, replace(paper, checkpointing="yes")).fit == "tight"
    with pytest.raises(ModelError, match="4-bit weights on the a card do not fit") as caught:
        again(ON_CARD, replace(CPU_MACHINE, gpus=(replace(CARD, memory_free=GB),)), monkeypatch)
    assert "checkpointing" not in caught.value.hint


def test_another_kind_of_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="began on a CUDA card, and there is none here"):
        again(ON_CARD, CPU_MACHINE, monkeypatch)
    with pytest.raises(ModelError, match="no bf16 arithmetic"):
        again(ON_CARD, replace(CPU_MACHINE, gpus=(TURING,)), monkeypatch)
    assert again({**ON_CARD, "compute_dtype": "fp16"}, replace(CPU_MACHINE, gpus=(CARD,)), monkeypatch).card == 0


@pytest.mark.parametrize("change", [{"device": "tpu"}, {"unpack": "yes"}, {"precision": None}, {"more": 1}])
def test_a_record_that_says_something_else_is_refused(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunFolderError, match="a-run does not say how its model is loaded"):
        again({**UNPACKED, **change}, CPU_MACHINE, monkeypatch)

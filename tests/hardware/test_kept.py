"""A run goes on as its model was loaded when it began, or is refused with the way out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from safesteer_lite.config import ModelConfig
from safesteer_lite.errors import ModelError, RunFolderError, UsageError
from safesteer_lite.hardware import kept
from safesteer_lite.hardware.backend import Decision, choose_backend, smallest_need
from safesteer_lite.hardware.kept import decide_again, decide_alike, to_record
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
    with pytest.raises(ModelError, match="cannot go on here as it began, because there is no CUDA card here"):
        again(ON_CARD, CPU_MACHINE, monkeypatch)
    with pytest.raises(ModelError, match="because it computes in bf16, and the a card has no bf16 arithmetic"):
        again(ON_CARD, replace(CPU_MACHINE, gpus=(TURING,)), monkeypatch)
    assert again({**ON_CARD, "compute_dtype": "fp16"}, replace(CPU_MACHINE, gpus=(CARD,)), monkeypatch).card == 0


@pytest.mark.parametrize("change", [{"device": "tpu"}, {"unpack": "yes"}, {"precision": None}, {"more": 1}])
def test_a_record_that_says_something_else_is_refused(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunFolderError, match="a-run does not say how its model is loaded"):
        again({**UNPACKED, **change}, CPU_MACHINE, monkeypatch)
    with pytest.raises(RunFolderError, match="a-run does not say how its model is loaded"):
        alike({**UNPACKED, **change}, CPU_MACHINE, monkeypatch)


def alike(
    record: dict[str, Any], machine: Machine, monkeypatch: pytest.MonkeyPatch, settings: ModelConfig | None = None
) -> Decision:
    monkeypatch.setattr(kept, "inspect", lambda folder: machine)
    return decide_alike(record, settings or ModelConfig(), SMALL, Path("runs/a-run"), LITE)


def asking(unpack: bool, compute: str = "bf16") -> int:
    """What it takes on a CPU to ask the small model something."""
    return smallest_need(SMALL, "cpu", "nf4", unpack, compute).memory_bytes["evaluate"]


def test_a_runs_models_are_asked_as_it_was_trained_whatever_a_new_run_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    in_fp32 = {**UNPACKED, "compute_dtype": "fp32"}
    assert asking(True) < NEED, "to ask takes less than to train"
    for record, here in (
        (UNPACKED, replace(CPU_MACHINE, cpu_bf16=False)),
        (UNPACKED, replace(CPU_MACHINE, gpus=(CARD,))),
        (UNPACKED, replace(CPU_MACHINE, ram_available=asking(True))),
        (in_fp32, replace(CPU_MACHINE, ram_available=asking(True, "fp32"))),
        ({**UNPACKED, "unpack": False}, CPU_MACHINE),
    ):
        assert to_record(choose_backend(here, SMALL, "auto")) != record
        found = alike(record, here, monkeypatch)
        assert to_record(found) == record and found.reason.startswith("As the run began: 4-bit weights")
        assert found.library.name == "plain"


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
def test_where_that_does_not_fit_the_precision_stays_and_the_rest_is_said(
    compute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = {**UNPACKED, "compute_dtype": compute}
    packed = {**began, "unpack": False}
    short = replace(CPU_MACHINE, ram_available=asking(True, compute) - 1)
    found = alike(began, short, monkeypatch)
    assert to_record(found) == packed
    assert found.reason.startswith(
        f"In the run's precision, though it began with 4-bit weights unpacked to {compute} on the CPU: 4-bit weights on the CPU"
    )
    none = replace(short, ram_available=GB // 2)
    found = alike(began, replace(none, gpus=(CARD,)), monkeypatch)
    assert to_record(found) == {**packed, "device": "cuda"} and found.place == "cuda:0"
    with pytest.raises(ModelError, match=r"4-bit weights on the CPU do not fit, at least .* free") as caught:
        alike(began, none, monkeypatch)
    assert "cannot be loaded here in the precision" in caught.value.message and "Close other" in caught.value.hint


def test_a_run_of_a_card_is_asked_on_the_cpu_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    found = alike(ON_CARD, CPU_MACHINE, monkeypatch)
    assert to_record(found) == UNPACKED and "began with 4-bit weights on a CUDA card" in found.reason
    # A card that cannot compute in the run's precision is left alone.
    assert to_record(alike(ON_CARD, replace(CPU_MACHINE, gpus=(TURING,)), monkeypatch)) == UNPACKED
    with pytest.raises(ModelError, match="trained in: there is no CUDA card here"):
        alike({**ON_CARD, "compute_dtype": "fp16"}, CPU_MACHINE, monkeypatch)


def test_device_and_packing_can_be_asked_for_and_another_precision_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    both = replace(CPU_MACHINE, gpus=(CARD,))
    assert to_record(alike(UNPACKED, both, monkeypatch, ModelConfig(device="cuda"))) == ON_CARD
    assert to_record(alike(ON_CARD, both, monkeypatch, ModelConfig(device="cpu"))) == UNPACKED
    packed = alike(UNPACKED, both, monkeypatch, ModelConfig(unpack="no"))
    assert to_record(packed) == {**UNPACKED, "unpack": False}
    with pytest.raises(ModelError, match="there is no CUDA card here that can be used"):
        alike(UNPACKED, CPU_MACHINE, monkeypatch, ModelConfig(device="cuda"))
    with pytest.raises(UsageError, match="beside which figures of model") as caught:
        alike(UNPACKED, both, monkeypatch, ModelConfig(precision="bf16"))
    assert "Leave model.precision out" in caught.value.hint

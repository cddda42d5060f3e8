"""The choice of the backend, on planted machines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from safesteer_lite.config import ModelConfig
from safesteer_lite.errors import ModelError, UsageError
from safesteer_lite.hardware.backend import choose_backend, choose_library, decide, find_place, fit, smallest_need
from safesteer_lite.hardware.machine import Machine
from safesteer_lite.hardware.peaks import Demand
from tests.hardware.examples import CARD, CPU_MACHINE, GB, LARGE, SMALL
from tests.hardware.test_machine import plant_cards

TURING = replace(CARD, capability=(7, 5))


def test_cpu_with_fast_bf16_unpacks() -> None:
    decision = choose_backend(CPU_MACHINE, SMALL, "auto")
    assert (decision.device, decision.precision, decision.unpack) == ("cpu", "nf4", True)
    assert (decision.compute_dtype, decision.fit) == ("bf16", "fits")
    assert decision.reason == (
        "4-bit weights unpacked once to bf16 on the CPU: the same numbers, faster, 988.1 MB of memory."
    )


def test_cpu_without_fast_bf16_computes_in_fp32_while_memory_allows() -> None:
    machine = replace(CPU_MACHINE, cpu_bf16=False)
    roomy = choose_backend(machine, SMALL, "nf4")
    assert (roomy.unpack, roomy.compute_dtype) == (True, "fp32")
    assert "fp32 on the CPU" in roomy.reason and "2.0 GB" in roomy.reason
    tighter = choose_backend(replace(machine, ram_available=3 * GB), SMALL, "nf4")
    assert (tighter.unpack, tighter.compute_dtype) == (True, "bf16")
    assert choose_backend(machine, SMALL, "bf16").compute_dtype == "fp32"
    assert choose_backend(machine, SMALL, "fp32").compute_dtype == "fp32"


def test_unpacking_stops_at_sixty_percent_of_memory() -> None:
    need = smallest_need(SMALL, "cpu", "nf4", True, "bf16").peak_bytes
    enough, too_little = int(need / 0.6) + 1, int(need / 0.6) - 2
    assert choose_backend(replace(CPU_MACHINE, ram_available=enough), SMALL, "auto").unpack
    packed = choose_backend(replace(CPU_MACHINE, ram_available=too_little), SMALL, "auto")
    assert not packed.unpack and packed.fit == "fits" and "left packed on the CPU" in packed.reason
    nothing = choose_backend(replace(CPU_MACHINE, ram_available=GB // 2), SMALL, "auto")
    assert nothing.fit == "does not fit" and "do not fit" in nothing.reason


def test_a_card_is_used_packed_and_left_when_it_is_too_small() -> None:
    machine = replace(CPU_MACHINE, gpus=(replace(CARD, name="spare", memory_free=GB), CARD))
    chosen = choose_backend(machine, LARGE, "auto")
    assert (chosen.device, chosen.precision, chosen.unpack, chosen.fit) == ("cuda", "nf4", False, "fits")
    assert "4-bit weights on the a card" in chosen.reason and "11.0 GB" in chosen.reason
    full = replace(machine, gpus=(replace(CARD, memory_free=2 * GB),))
    on_cpu = choose_backend(full, LARGE, "auto")
    assert on_cpu.device == "cpu" and "because 2.0 GB free on the a card are too little" in on_cpu.reason
    neither = choose_backend(replace(full, ram_available=2 * GB), LARGE, "auto")
    assert (neither.device, neither.fit) == ("cuda", "does not fit")
    broken = replace(machine, gpus=(replace(CARD, usable=False),))
    assert choose_backend(broken, SMALL, "auto").device == "cpu"


@pytest.mark.parametrize(
    ("capability", "compute", "said"),
    [((8, 6), "bf16", ""), ((7, 5), "fp16", "if the model stays finite"), ((6, 1), "fp32", "slow")],
)
def test_a_card_computes_in_what_it_is_fast_in(capability: tuple[int, int], compute: str, said: str) -> None:
    machine = replace(WITH_UNSLOTH, gpus=(replace(CARD, capability=capability),))
    for precision in ("auto", "bf16"):
        decision = choose_backend(machine, SMALL, precision, demand=Demand(completion_tokens=512))
        assert (decision.device, decision.compute_dtype) == ("cuda", compute) and said in decision.reason
        assert decision.library.name == ("unsloth" if compute == "bf16" else "plain")
    assert choose_backend(machine, SMALL, "fp32").compute_dtype == "fp32"
    with_fp32 = smallest_need(SMALL, "cuda", "bf16", False, "fp32").peak_bytes
    assert smallest_need(SMALL, "cuda", "bf16", False, compute).peak_bytes <= with_fp32


def test_the_card_with_most_free_memory_is_the_one_that_is_used() -> None:
    cards = (
        replace(CARD, memory_free=5 * GB),
        replace(CARD, number=1),
        replace(CARD, memory_free=12 * GB, usable=False),
    )
    decision = choose_backend(replace(CPU_MACHINE, gpus=cards), SMALL, "auto")
    assert (decision.device, decision.place) == ("cuda", "cuda:1")
    assert choose_backend(CPU_MACHINE, SMALL, "auto").place == "cpu"


def test_what_runs_beside_the_policy_goes_to_the_same_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_cards(monkeypatch, cuda=None, hip="6.2")
    assert find_place("auto", tmp_path) == "cpu", "a card of another maker was taken"
    with pytest.raises(ModelError, match="no usable CUDA device"):
        find_place("cuda", tmp_path)
    plant_cards(monkeypatch, cuda="12.8", hip=None)
    assert [find_place(device, tmp_path) for device in ("auto", "cuda", "cpu")] == ["cuda:2", "cuda:2", "cpu"]


@pytest.mark.parametrize("fast", [False, True])
def test_a_card_that_is_not_used_says_nothing_about_the_processor(
    fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card has bf16 arithmetic, and what is computed beside it may have none."""
    plant_cards(monkeypatch, cuda="12.8", hip=None)
    monkeypatch.setattr("safesteer_lite.hardware.machine.fast_in_bf16", lambda: fast)
    small = replace(SMALL, layers=2, vocabulary=1000)
    decision = decide(ModelConfig(device="cpu"), small, tmp_path)
    assert (decision.device, decision.compute_dtype) == ("cpu", "bf16" if fast else "fp32")
    assert decide(ModelConfig(), small, tmp_path).compute_dtype == "bf16"


def test_every_reason_is_one_sentence() -> None:
    for fast in (True, False):
        for gpus in ((), (CARD,), (replace(CARD, memory_free=GB),), (TURING,)):
            for available in (GB // 2, 3 * GB, 24 * GB):
                for requested in ("auto", "nf4", "bf16", "fp32"):
                    for shape in (SMALL, LARGE):
                        machine = replace(CPU_MACHINE, cpu_bf16=fast, gpus=gpus, ram_available=available)
                        reason = choose_backend(machine, shape, requested).reason
                        assert reason.endswith(".") and ". " not in reason and "  " not in reason


def test_unknown_precision() -> None:
    with pytest.raises(UsageError, match="int3"):
        choose_backend(CPU_MACHINE, SMALL, "int3")


def test_fit_has_three_answers() -> None:
    assert [fit(needed, 100) for needed in (80, 81, 100, 101)] == ["fits", "tight", "tight", "does not fit"]


WITH_UNSLOTH = replace(CPU_MACHINE, gpus=(CARD,), versions={**CPU_MACHINE.versions, "unsloth": "2026.10.7"})


def test_unsloth_is_chosen_for_long_rollouts_on_a_card_that_has_it_and_the_reason_is_told() -> None:
    chosen = choose_backend(WITH_UNSLOTH, SMALL, "auto", demand=Demand(completion_tokens=512))
    assert (chosen.device, chosen.library.name, chosen.library.own_process) == ("cuda", "unsloth", True)
    assert chosen.library.reason == (
        "Unsloth 2026.10.7 for distillation, if it passes its checks; everything else by transformers and bitsandbytes."
    )
    lengths = {tokens: choose_library(WITH_UNSLOTH, "cuda", "nf4", "auto", tokens).name for tokens in (4, 63, 64)}
    assert lengths == {4: "plain", 63: "plain", 64: "unsloth"}
    assert choose_library(WITH_UNSLOTH, "cuda", "nf4", "unsloth", 4).name == "unsloth"
    for other in (replace(SMALL, fused=True), replace(SMALL, block_norms=4)):
        assert choose_backend(WITH_UNSLOTH, other, "auto", demand=Demand(completion_tokens=512)).library.name == "plain"


@pytest.mark.parametrize(
    ("machine", "precision", "requested", "tokens", "because"),
    [
        (replace(WITH_UNSLOTH, versions=CPU_MACHINE.versions), "auto", "auto", 64, "Unsloth is not installed"),
        (replace(WITH_UNSLOTH, gpus=()), "auto", "auto", 64, "Unsloth needs a CUDA card"),
        (WITH_UNSLOTH, "fp32", "auto", 64, "Unsloth computes in 16 bits"),
        (WITH_UNSLOTH, "auto", "auto", 4, "Unsloth is left to rollouts of 64 tokens and more"),
        (WITH_UNSLOTH, "auto", "plain", 64, "model.backend asks for it"),
    ],
)
def test_plain_transformers_are_chosen_with_the_reason(
    machine: Machine, precision: str, requested: str, tokens: int, because: str
) -> None:
    library = choose_backend(machine, SMALL, precision, requested, Demand(completion_tokens=tokens)).library
    assert library.name == "plain" and not library.own_process
    assert library.reason == f"Plain transformers and bitsandbytes, because {because}."


def test_unsloth_cannot_be_asked_for_where_it_is_not() -> None:
    with pytest.raises(UsageError, match="needs a CUDA card"):
        choose_library(CPU_MACHINE, "cpu", "nf4", "unsloth", 64)

"""A kept decision: how the model of a run was loaded when it began, and is loaded whenever it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

from safesteer_lite.config import ModelConfig
from safesteer_lite.errors import ModelError, RunFolderError
from safesteer_lite.hardware.backend import (
    CUDA_CONTEXT,
    WEIGHTS,
    Decision,
    card_dtype,
    choose_library,
    fit,
    smallest_need,
)
from safesteer_lite.hardware.machine import Machine, inspect
from safesteer_lite.hardware.need import Precision
from safesteer_lite.hardware.peaks import Demand
from safesteer_lite.hardware.shape import ModelShape
from safesteer_lite.hardware.units import format_bytes

_KINDS: dict[str, tuple[object, ...]] = {
    "device": ("cuda", "cpu"),
    "precision": get_args(Precision),
    "unpack": (True, False),
    "compute_dtype": ("bf16", "fp16", "fp32"),
}
_ELSEWHERE = (
    "Resume it on a machine like the one that it began on, or start a new run, which is loaded as this one can."
)


def to_record(decision: Decision) -> dict[str, str | bool]:
    """What of a decision the numbers of a run depend on: the rest may be decided anew."""
    return {name: getattr(decision, name) for name in _KINDS}


def decide_again(
    kept: Mapping[str, Any], settings: ModelConfig, shape: ModelShape, folder: Path, demand: Demand
) -> Decision:
    """The decision of a run that has begun, if this machine can hold it.

    Card and library are chosen anew: the card with most free memory, and Unsloth only where it is installed.

    Args:
        kept: what `to_record` made.
        settings: the section `model`.
        shape: the model.
        folder: of the run.
        demand: what the other settings ask for.

    Raises:
        RunFolderError: the record is none.
        ModelError: the machine has no such device, or too little memory.
    """
    if kept.keys() != _KINDS.keys() or any(kept[name] not in values for name, values in _KINDS.items()):
        raise RunFolderError(
            f"{folder.name} does not say how its model is loaded in words that this version knows.",
            "Go on with the version that made it, or start a new run.",
        )
    device, precision = str(kept["device"]), cast(Precision, kept["precision"])
    unpack, compute = bool(kept["unpack"]), str(kept["compute_dtype"])
    machine = inspect(folder)
    where, free = _room(machine, device, compute)
    needed = smallest_need(shape, device, precision, unpack, compute, demand).peak_bytes
    needed += CUDA_CONTEXT if device == "cuda" else 0
    name = WEIGHTS[precision] + (f" unpacked to {compute}" if unpack else "")
    amounts = f"at least {format_bytes(needed)} needed, {format_bytes(free)} free"
    result = fit(needed, free)
    if result == "does not fit":
        less = "" if demand.recomputes(device) else ", or add --set distill.checkpointing=yes, which takes less"
        raise ModelError(
            f"This machine cannot hold the run as it began: {name} {where} do not fit, {amounts}.",
            f"Close other programs{less}. {_ELSEWHERE}",
        )
    library = choose_library(machine, device, precision, settings.backend, demand.completion_tokens)
    card = machine.gpu.number if device == "cuda" and machine.gpu else 0
    reason = f"As the run began: {name} {where}, {amounts}."
    return Decision(device, precision, unpack, compute, result, reason, library, card)


def _room(machine: Machine, device: str, compute: str) -> tuple[str, int]:
    """Where a model would be, in words, and the bytes that are free there."""
    if device == "cpu":
        return "on the CPU", machine.ram_available
    card = machine.gpu
    if card is None:
        raise ModelError("The run began on a CUDA card, and there is none here that can be used.", _ELSEWHERE)
    if compute == "bf16" and card_dtype(card) != "bf16":
        raise ModelError(f"The run computes in bf16, and the {card.name} has no bf16 arithmetic.", _ELSEWHERE)
    return f"on the {card.name}", card.memory_free

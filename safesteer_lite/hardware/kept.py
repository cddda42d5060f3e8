"""A kept decision: how the model of a run was loaded when it began, and is loaded whenever it goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from safesteer_lite.config import ModelConfig
from safesteer_lite.errors import ModelError, RunFolderError, UsageError
from safesteer_lite.hardware.backend import (
    CUDA_CONTEXT,
    WEIGHTS,
    Decision,
    Fit,
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


@dataclass(frozen=True)
class _Way:
    """How a model is loaded: the fields that a decision has too."""

    device: str
    precision: Precision
    unpack: bool
    compute_dtype: str

    @property
    def words(self) -> str:
        """The weights, in words."""
        return WEIGHTS[self.precision] + (f" unpacked to {self.compute_dtype}" if self.unpack else "")


def to_record(decision: Decision) -> dict[str, str | bool]:
    """What of a decision the numbers of a run depend on: the rest may be decided anew."""
    return {name: getattr(decision, name) for name in _KINDS}


def decide_again(
    kept: Mapping[str, Any],
    settings: ModelConfig,
    shape: ModelShape,
    folder: Path,
    demand: Demand,
    elsewhere: str = _ELSEWHERE,
) -> Decision:
    """The decision of a run that has begun, if this machine can hold it.

    Card and library are chosen anew: the card with most free memory, and Unsloth only where it is installed.

    Args:
        kept: what `to_record` made.
        settings: the section `model`.
        shape: the model.
        folder: of the run.
        demand: what the other settings ask for.
        elsewhere: what to do where the machine cannot.

    Raises:
        RunFolderError: the record is none.
        ModelError: the machine has no such device, or too little memory.
    """
    way, machine = _read(kept, folder), inspect(folder)
    if problem := _obstacle(machine, way):
        raise ModelError(f"The run cannot go on here as it began, because {problem}.", elsewhere)
    needed = smallest_need(shape, way.device, way.precision, way.unpack, way.compute_dtype, demand).peak_bytes
    result, said = _judge(machine, way, needed)
    if result == "does not fit":
        less = "" if demand.recomputes(way.device) else ", or add --set distill.checkpointing=yes, which takes less"
        raise ModelError(
            f"This machine cannot hold the run as it began: {said}.", f"Close other programs{less}. {elsewhere}"
        )
    library = choose_library(machine, way.device, way.precision, settings.backend, demand.completion_tokens)
    return replace(_decision(machine, way, result, f"As the run began: {said}."), library=library)


def decide_alike(
    kept: Mapping[str, Any], settings: ModelConfig, shape: ModelShape, folder: Path, demand: Demand
) -> Decision:
    """How the models of a run are loaded to be asked something: as they were when it began, or, where that cannot be or the
    settings say so, on another device or packed. The precision stays, or figures would not stand beside the run's own.

    Args:
        kept: what `to_record` made.
        settings: the section `model`, which may be another one than the run's.
        shape: the model.
        folder: of the run.
        demand: what the other settings ask for.

    Raises:
        RunFolderError: the record is none.
        UsageError: the settings ask for another precision.
        ModelError: this machine can hold the models in that precision nowhere.
    """
    began, machine, problems = _read(kept, folder), inspect(folder), list[str]()
    began_on = "a CUDA card" if began.device == "cuda" else "the CPU"
    if settings.precision != began.precision:
        raise UsageError(
            f"The run has {WEIGHTS[began.precision]}, beside which figures of model.precision={settings.precision} would "
            "mislead.",
            "Leave model.precision out, or start a new run with it.",
        )
    for way in _alternatives(began, settings):
        if problem := _obstacle(machine, way):
            problems.insert(0, problem)
            continue
        need = smallest_need(shape, way.device, way.precision, way.unpack, way.compute_dtype, demand)
        result, said = _judge(machine, way, need.memory_bytes["evaluate"])
        if result != "does not fit":
            reason = f"As the run began: {said}."
            if way != began:
                reason = f"In the run's precision, though it began with {began.words} on {began_on}: {said}."
            return _decision(machine, way, result, reason)
        problems.append(said)
    # Of what does not fit the last way takes least; what cannot be at all stands before it.
    raise ModelError(
        f"The run's models cannot be loaded here in the precision that they were trained in: {problems[-1]}.",
        "Close other programs, or go on where there is room for them: another precision would change what is measured.",
    )


def _alternatives(began: _Way, settings: ModelConfig) -> Iterator[_Way]:
    """Ways to load a model that compute in the same precision, as the run began first of all; none that the settings exclude."""
    devices = (began.device, "cpu" if began.device == "cuda" else "cuda")
    for device in devices if settings.device == "auto" else (settings.device,):
        unpacked = (
            (began.unpack, False) if device == began.device else (device == "cpu" and began.precision == "nf4", False)
        )
        for unpack in dict.fromkeys(unpacked if settings.unpack == "auto" else (settings.unpack == "yes",)):
            yield replace(began, device=device, unpack=unpack)


def _read(kept: Mapping[str, Any], folder: Path) -> _Way:
    if kept.keys() != _KINDS.keys() or any(kept[name] not in values for name, values in _KINDS.items()):
        raise RunFolderError(
            f"{folder.name} does not say how its model is loaded in words that this version knows.",
            "Go on with the version that made it, or start a new run.",
        )
    return _Way(**kept)


def _obstacle(machine: Machine, way: _Way) -> str:
    """Why a machine cannot compute in a way, however much memory it has; empty where it can."""
    card = machine.gpu
    if way.device == "cpu":
        return "it computes in fp16, as cards alone do" if way.compute_dtype == "fp16" else ""
    if card is None:
        return "there is no CUDA card here that can be used"
    if way.compute_dtype == "bf16" and card_dtype(card) != "bf16":
        return f"it computes in bf16, and the {card.name} has no bf16 arithmetic"
    return ""


def _judge(machine: Machine, way: _Way, needed: int) -> tuple[Fit, str]:
    """Whether so many bytes fit where a model would be, and that in words."""
    where, free = "on the CPU", machine.ram_available
    if way.device == "cuda" and machine.gpu:
        where, free, needed = f"on the {machine.gpu.name}", machine.gpu.memory_free, needed + CUDA_CONTEXT
    result = fit(needed, free)
    verdict = " do not fit" if result == "does not fit" else ""
    return result, f"{way.words} {where}{verdict}, at least {format_bytes(needed)} needed, {format_bytes(free)} free"


def _decision(machine: Machine, way: _Way, result: Fit, reason: str) -> Decision:
    card = machine.gpu.number if way.device == "cuda" and machine.gpu else 0
    return Decision(**vars(way), fit=result, reason=reason, card=card)

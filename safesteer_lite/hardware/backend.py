"""The decision how a model is loaded on this machine: device, precision and compute dtype, with the reason."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from safesteer_lite.config import ModelConfig
from safesteer_lite.errors import ModelError, UsageError
from safesteer_lite.hardware.machine import Gpu, Machine, inspect
from safesteer_lite.hardware.need import Need, Precision, estimate
from safesteer_lite.hardware.peaks import LITE, Demand
from safesteer_lite.hardware.shape import ModelShape
from safesteer_lite.hardware.units import format_bytes

Fit = Literal["fits", "tight", "does not fit"]

# Unpacking stops here, so that the desktop and the prompt sets keep room.
_UNPACK_SHARE = 0.6
_FITS_SHARE = 0.8

CUDA_CONTEXT = 500_000_000
"""CUDA's own context takes about half a gigabyte that the estimate does not know of."""

LONG_ROLLOUT = 64
"""Tokens from which on a run takes Unsloth by itself: with a handful a step there is little for it to speed up."""


@dataclass(frozen=True)
class Library:
    """What runs the model while it is trained; everything else of a run is done by plain transformers and bitsandbytes.

    Attributes:
        name: `plain` (transformers and bitsandbytes) or `unsloth`, which is still checked before it is trusted.
        reason: one sentence for the user.
        own_process: whether it trains in a process of its own, as Unsloth has to: it changes transformers for good.
    """

    name: str
    reason: str
    own_process: bool = False


@dataclass(frozen=True)
class Decision:
    """How the model will be loaded, and why.

    Attributes:
        device: `cuda` or `cpu`.
        precision: `nf4`, `bf16` (16 bits of either kind) or `fp32`.
        unpack: whether 4-bit weights are expanded once after loading.
        compute_dtype: `bf16`, `fp32`, or `fp16` where that is all that a card is fast in: if the model does not stay finite
            in it, it is loaded in fp32 after all.
        fit: whether the smallest possible work fits the device's free memory.
        reason: one sentence for the user.
        library: what runs it while it is trained.
        card: torch's number of the card; 0 without one.
    """

    device: str
    precision: Precision
    unpack: bool
    compute_dtype: str
    fit: Fit
    reason: str
    library: Library = Library("plain", "Plain transformers and bitsandbytes.")
    card: int = 0

    @property
    def place(self) -> str:
        """The device as torch names it: `cpu`, `cuda:1`."""
        return f"cuda:{self.card}" if self.device == "cuda" else self.device


def fit(bytes_needed: int, bytes_free: int) -> Fit:
    """`fits` up to 80 % of what is free, `tight` up to all of it."""
    if bytes_needed > bytes_free:
        return "does not fit"
    return "fits" if bytes_needed <= _FITS_SHARE * bytes_free else "tight"


def smallest_need(
    shape: ModelShape, device: str, precision: Precision, unpacked: bool, compute_dtype: str, demand: Demand = LITE
) -> Need:
    """The need of the least work that batch sizes can be reduced to: what decides whether a model can run at all.

    Args:
        shape: the model.
        device: `cuda` or `cpu`.
        precision, unpacked, compute_dtype: as `estimate` takes them.
        demand: what the run's settings ask for.
    """
    return estimate(
        shape,
        precision=precision,
        unpacked=unpacked,
        demand=demand,
        sequences=8,
        prompt_tokens=128,
        micro_batch=1,
        compute_dtype=compute_dtype,
        checkpointing=demand.recomputes(device),
    )


def require_fit(decision: Decision) -> Decision:
    """A decision, if the model fits.

    Raises:
        ModelError: it does not.
    """
    if decision.fit == "does not fit":
        # On a card blocks are computed again anyway.
        slower = ", or, slower, distill.checkpointing=yes" if decision.device == "cpu" else ""
        raise ModelError(
            f"The model does not fit this machine. {decision.reason}",
            "Close other programs, choose a smaller model (`safesteer-lite presets`), or ask for less: --recipe lite, or a "
            f"lower distill.completion_tokens{slower}.",
        )
    return decision


def choose_library(
    machine: Machine,
    device: str,
    precision: str,
    requested: str,
    completion_tokens: int,
    shape: ModelShape | None = None,
) -> Library:
    """Unsloth for long rollouts on a CUDA card where it is installed, plain transformers and bitsandbytes elsewhere.

    Args:
        machine: from `inspect`.
        device, precision: as decided.
        requested: `auto`, `plain` or `unsloth`.
        completion_tokens: longest rollout that is trained on.
        shape: the model; None before one is chosen.

    Raises:
        UsageError: Unsloth is asked for where it cannot be.
    """
    version, why_not = machine.versions.get("unsloth"), ""
    if device != "cuda":
        why_not = "Unsloth needs a CUDA card"
    elif precision == "fp32":
        why_not = "Unsloth computes in 16 bits"
    elif machine.gpu is not None and card_dtype(machine.gpu) != "bf16":
        why_not = "it is used in bf16 only, and this card has no bf16 arithmetic"
    elif shape and (shape.fused or shape.block_norms != 2):
        why_not = "Unsloth is used for models with the blocks of Llama alone"
    elif version is None:
        why_not = "Unsloth is not installed"
    elif requested == "auto" and completion_tokens < LONG_ROLLOUT:
        why_not = f"Unsloth is left to rollouts of {LONG_ROLLOUT} tokens and more"
    if requested == "unsloth" and why_not:
        raise UsageError(f"model.backend is unsloth, but {why_not}.", "Set model.backend=auto, or see `doctor`.")
    if requested == "plain":
        why_not = "model.backend asks for it"
    if why_not:
        return Library("plain", f"Plain transformers and bitsandbytes, because {why_not}.")
    reason = f"Unsloth {version} for distillation, if it passes its checks; everything else by transformers and bitsandbytes."
    return Library("unsloth", reason, own_process=True)


def decide(settings: ModelConfig, shape: ModelShape, folder: Path, demand: Demand = LITE) -> Decision:
    """How a model will be loaded on this machine; cheap, so that a run is refused before its folder is made.

    Args:
        settings: the section `model`.
        shape: the model.
        folder: where the run goes.
        demand: what the other settings ask for.

    Raises:
        ModelError: the settings ask for a device that is not there.
        UsageError: they ask for a library that cannot be used here.
    """
    machine = _machine_with(settings.device, folder)
    decision = choose_backend(machine, shape, settings.precision, settings.backend, demand)
    return decision if settings.unpack == "auto" else replace(decision, unpack=settings.unpack == "yes")


def find_place(device: str, folder: Path) -> str:
    """Where a small model beside the policy runs: `cpu`, or the card with most free memory, as `cuda:1`.

    Args:
        device: `auto`, `cuda` or `cpu`.
        folder: where the run goes.

    Raises:
        ModelError: the device is not there.
    """
    card = _machine_with(device, folder).gpu
    return f"cuda:{card.number}" if card else "cpu"


def _machine_with(device: str, folder: Path) -> Machine:
    """The machine as the settings want it to be used: without its cards where they say `cpu`."""
    machine = inspect(folder)
    if device == "cuda" and machine.gpu is None:
        raise ModelError("There is no usable CUDA device.", "Set model.device=cpu, or see `safesteer-lite doctor`.")
    return replace(machine, gpus=()) if device == "cpu" else machine


def choose_backend(
    machine: Machine, shape: ModelShape, requested: str, library: str = "auto", demand: Demand = LITE
) -> Decision:
    """Device, precision, compute dtype and library for a model on this machine.

    Args:
        machine: from `inspect`.
        shape: the model.
        requested: `auto` (4-bit), `nf4`, `bf16` or `fp32`.
        library: `auto`, `plain` or `unsloth`.
        demand: what the run's settings ask for.

    Raises:
        UsageError: `requested` is none of these, or Unsloth is asked for where it cannot be.
    """
    decision = _choose_device(machine, shape, requested, demand)
    chosen = choose_library(machine, decision.device, decision.precision, library, demand.completion_tokens, shape)
    return replace(decision, library=chosen)


def _choose_device(machine: Machine, shape: ModelShape, requested: str, demand: Demand) -> Decision:
    if requested not in ("auto", *get_args(Precision)):
        raise UsageError(f"There is no precision {requested!r}.", "Use auto, nf4, bf16 or fp32.")
    precision: Precision = "nf4" if requested == "auto" else requested  # type: ignore[assignment]
    gpu = machine.gpu
    if gpu is None:
        return _choose_on_cpu(machine, shape, precision, demand, "")
    on_gpu = _choose_on_gpu(gpu, shape, precision, demand)
    if on_gpu.fit != "does not fit":
        return on_gpu
    instead = f", because {format_bytes(gpu.memory_free)} free on the {gpu.name} are too little"
    on_cpu = _choose_on_cpu(machine, shape, precision, demand, instead)
    return on_gpu if on_cpu.fit == "does not fit" else on_cpu


WEIGHTS: dict[Precision, str] = {"nf4": "4-bit weights", "bf16": "16-bit weights", "fp32": "32-bit weights"}
"""A precision in words."""


def card_dtype(gpu: Gpu) -> str:
    """What a card multiplies matrices fast in: bf16 from Ampere on, fp16 on Volta and Turing, and before them neither."""
    return "bf16" if gpu.capability >= (8, 0) else "fp16" if gpu.capability >= (7, 0) else "fp32"


def _choose_on_gpu(gpu: Gpu, shape: ModelShape, precision: Precision, demand: Demand) -> Decision:
    compute = "fp32" if precision == "fp32" else card_dtype(gpu)
    need = smallest_need(shape, "cuda", precision, False, compute, demand)
    needed = need.peak_bytes + CUDA_CONTEXT
    result = fit(needed, gpu.memory_free)
    name = f"{WEIGHTS[precision]} on the {gpu.name}"
    amounts = f"at least {format_bytes(needed)} needed, {format_bytes(gpu.memory_free)} free"
    reason = f"{name}: {amounts}."
    if result == "does not fit":
        reason = f"{name} do not fit: {amounts}."
    elif compute == "fp16":
        reason = (
            f"{name}, computed in fp16 if the model stays finite in it: {amounts}; this card has no bf16 arithmetic."
        )
    elif compute != precision and compute == "fp32":
        reason = f"{name}, computed in fp32: {amounts}; slow, because this card has no fast 16-bit arithmetic."
    return Decision("cuda", precision, False, compute, result, reason, card=gpu.number)


def _choose_on_cpu(machine: Machine, shape: ModelShape, precision: Precision, demand: Demand, instead: str) -> Decision:
    """Unpacked where memory allows, in fp32 where the CPU is not fast in bf16 and memory allows that too."""
    dtypes = ["fp32"] if precision == "fp32" else ["bf16"] if machine.cpu_bf16 else ["fp32", "bf16"]
    for compute in dtypes:
        need = smallest_need(shape, "cpu", precision, precision == "nf4", compute, demand)
        if need.peak_bytes > _UNPACK_SHARE * machine.ram_available:
            continue
        where = f"on the CPU{instead}"
        if precision == "nf4":
            kept = "the same numbers, faster" if compute == "bf16" else "faster than bf16 on this CPU"
            reason = f"4-bit weights unpacked once to {compute} {where}: {kept}"
        else:
            because = " in fp32, because this CPU is not fast in bf16" if compute != precision else ""
            reason = f"{WEIGHTS[precision]} {where}{because}"
        reason += f", {format_bytes(need.weights_bytes)} of memory."
        return Decision("cpu", precision, precision == "nf4", compute, "fits", reason)
    compute = dtypes[-1]
    needed = smallest_need(shape, "cpu", precision, False, compute, demand).peak_bytes
    result = fit(needed, machine.ram_available)
    name = WEIGHTS[precision] + (" left packed" if precision == "nf4" else "")
    amounts = f"{format_bytes(needed)} needed, {format_bytes(machine.ram_available)} available"
    verdict = {"does not fit": " do not fit", "tight": " are a tight fit", "fits": ""}[result]
    return Decision("cpu", precision, False, compute, result, f"{name} on the CPU{instead}{verdict}: {amounts}.")

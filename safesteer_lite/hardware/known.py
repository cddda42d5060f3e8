"""What is known of the presets' models before anything is downloaded: shape, licence, and on which card they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from safesteer_lite.hardware.backend import Decision, Fit, choose_backend, fit, smallest_need
from safesteer_lite.hardware.machine import Gpu, Machine
from safesteer_lite.hardware.peaks import LITE, Demand
from safesteer_lite.hardware.shape import ModelShape, parameters


@dataclass(frozen=True)
class KnownModel:
    """A model's public figures.

    Attributes:
        shape: as its config.json states it.
        licence: as its page states it.
        gated: whether its owner wants the licence accepted on that page first.
        download_bytes: of a download that is smaller than the 16-bit weights; 0 for those.
    """

    shape: ModelShape
    licence: str
    gated: bool = False
    download_bytes: int = 0

    @property
    def size(self) -> int:
        """Bytes to download."""
        return self.download_bytes or 2 * parameters(self.shape)


KNOWN = {
    "Qwen/Qwen3-4B-Instruct-2507": KnownModel(
        ModelShape(36, 2560, 9728, 32, 8, 128, 151936, True, "bfloat16", head_norms=True), "Apache-2.0"
    ),
    "Qwen/Qwen2.5-7B-Instruct": KnownModel(
        ModelShape(28, 3584, 18944, 28, 4, 128, 152064, False, "bfloat16", qkv_bias=True), "Apache-2.0"
    ),
    "meta-llama/Llama-3.2-3B-Instruct": KnownModel(
        ModelShape(28, 3072, 8192, 24, 8, 128, 128256, True, "bfloat16"), "Llama 3.2", gated=True
    ),
    "meta-llama/Meta-Llama-3-8B-Instruct": KnownModel(
        ModelShape(32, 4096, 14336, 32, 8, 128, 128256, False, "bfloat16"), "Llama 3", gated=True
    ),
    "Qwen2.5-Coder-0.5B-Instruct": KnownModel(
        ModelShape(24, 896, 4864, 14, 2, 64, 151936, True, "bfloat16", qkv_bias=True),
        "Apache-2.0",
        download_bytes=491_400_064,
    ),
}
"""By the name that the presets give the model."""

MEASURED = ("Qwen2.5-Coder-0.5B-Instruct", "Qwen2.5-Coder-1.5B-Instruct")
"""Models on which the default way of training was measured (docs/results.md)."""


def measured_on(name: str) -> str:
    """For who trains another model than those: on which the way of training was measured, and what will tell.

    Args:
        name: a hub id or a folder.

    Returns:
        The end of a sentence; empty for a model of `MEASURED`.
    """
    if PurePath(name).name in MEASURED:
        return ""
    return f"{' and '.join(MEASURED)} alone: what it does to this model, its own before and after will tell"


@dataclass(frozen=True)
class Outlook:
    """Whether a model fits this machine.

    Attributes:
        decision: how it would be loaded.
        fit: with the room on the disk taken into account.
        reason: one sentence.
        memory_bytes: what each stage takes at least, by its name: VRAM on a GPU, else RAM; the export takes RAM always.
        disk_bytes: the download that is still to come, and all that the run writes.
    """

    decision: Decision
    fit: Fit
    reason: str
    memory_bytes: Mapping[str, int]
    disk_bytes: int


def outlook(
    machine: Machine, shape: ModelShape, precision: str = "nf4", download: int = 0, demand: Demand = LITE
) -> Outlook:
    """Whether a model fits the device's free memory and the disk.

    Args:
        machine: from `inspect`.
        shape: the model.
        precision: as `choose_backend` takes it.
        download: bytes still to come, besides what the run writes.
        demand: what the run's settings ask for.
    """
    decision = choose_backend(machine, shape, precision, demand=demand)
    need = smallest_need(shape, decision.device, decision.precision, decision.unpack, decision.compute_dtype, demand)
    # The estimate counts the published weights too, which a local model has on the disk already.
    on_disk = need.disk_bytes - 2 * parameters(shape) + download
    result, reason = decision.fit, decision.reason
    if fit(on_disk, machine.disk_free) == "does not fit":
        gigabytes = f"{on_disk / 1e9:.1f} GB needed, {machine.disk_free / 1e9:.1f} GB free"
        result, reason = "does not fit", f"The disk is too small: {gigabytes}."
    return Outlook(decision, result, reason, need.memory_bytes, on_disk)


def fit_table(names: Sequence[str], demands: Mapping[str, Demand], gigabytes: Sequence[int] = (8, 12, 16, 24)) -> str:
    """A Markdown table: which of the known models fit which cards, 4-bit, with 0.6 GB of a card taken by the desktop.

    Args:
        names: keys of `KNOWN`.
        demands: what each recipe asks for, by its name.
        gigabytes: sizes of cards, as their makers count them (1 GB = 2^30 bytes).
    """
    lines = [
        "| model | download | recipe | at least | " + " | ".join(f"{size} GB card" for size in gigabytes) + " |",
        "| --- " * (len(gigabytes) + 4) + "|",
    ]
    for name in names:
        model = KNOWN[name]
        for recipe, demand in demands.items():
            least = smallest_need(model.shape, "cuda", "nf4", False, "bf16", demand).peak_bytes
            fits = [fit_on_card(model.shape, size, demand) for size in gigabytes]
            lines.append(
                f"| {name} | {model.size / 1e9:.1f} GB | `{recipe}` | {least / 1e9:.1f} GB | " + " | ".join(fits) + " |"
            )
    return "\n".join(lines)


def fit_on_card(shape: ModelShape, gigabytes: int, demand: Demand) -> Fit:
    """Whether a model fits a card in 4 bits, with 0.6 GB of it taken by the desktop.

    Args:
        shape: the model.
        gigabytes: of the card, as its maker counts them (1 GB = 2^30 bytes).
        demand: what the run's settings ask for.
    """
    total = gigabytes << 30
    card = Gpu(f"{gigabytes} GB card", total, total - 600_000_000, (8, 6), None, True)
    machine = Machine("", "3.11.0", "", 8, 1, 1, 10**12, (card,), {}, "12.8", True)
    return choose_backend(machine, shape, "nf4", demand=demand).fit

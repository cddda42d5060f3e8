"""The doctor's checks: whether this machine is ready for a run, and what to do where it is not."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from safesteer_lite import children
from safesteer_lite.hardware.backend import LONG_ROLLOUT, card_dtype, choose_library
from safesteer_lite.hardware.known import KNOWN
from safesteer_lite.hardware.limits import read_or_empty
from safesteer_lite.hardware.machine import PACKAGES, Machine, has_code_for
from safesteer_lite.hardware.units import format_bytes
from safesteer_lite.text import typed_path

if TYPE_CHECKING:
    from packaging.requirements import Requirement


_FROM_PIP = "Install safesteer-lite itself with pip, so that its version bounds are known."


@dataclass(frozen=True)
class Check:
    """One line of `doctor`.

    Attributes:
        name: what was looked at.
        ok: True, False for what must be mended, None for what is optional, unknown or merely worth knowing.
        found: what is there.
        remedy: one sentence on what to do; empty only where nothing need be done.
    """

    name: str
    ok: bool | None
    found: str
    remedy: str = ""


def checks(machine: Machine) -> list[Check]:
    """Everything `doctor` looks at, without the network."""
    return [
        _python_check(machine),
        *_package_checks(machine),
        _other_packages_check(),
        _bitsandbytes_check(machine),
        _driver_check(machine),
        _torch_build_check(machine),
        _cuda_check(machine),
        *_other_checks(machine),
        _gpu_memory_check(machine),
        _backend_check(machine),
        _bf16_check(machine),
        _at_least("memory", machine.ram_total, 8 * 10**9, "Use a machine with more memory, or a model below 1B."),
        _at_least("disk", machine.disk_free, 10 * 10**9, "Free some space, or choose a folder on another disk."),
        _login_check(),
        _gated_check(),
        _offline_check(),
        _terminal_check(),
    ]


def _at_least(name: str, found: int, wanted: int, remedy: str) -> Check:
    ok = found >= wanted
    text = format_bytes(found) + ("" if ok else f", {format_bytes(wanted)} wanted")
    return Check(name, ok, text, "" if ok else remedy)


def _python_check(machine: Machine) -> Check:
    ok = tuple(int(part) for part in machine.python.split(".")[:2]) >= (3, 11)
    return Check("Python", ok, machine.python, "" if ok else "Install Python 3.11 or newer.")


def _package_checks(machine: Machine) -> list[Check]:
    """Installed versions against the bounds in this package's own metadata."""
    bounds = {requirement.name: requirement.specifier for requirement in _requirements()}
    found = []
    for name in PACKAGES:
        version, bound = machine.versions.get(name), bounds.get(name)
        wanted = f"{name}{bound}" if bound is not None else name
        if version is None:
            optional = name == "unsloth"
            remedy = f'Run: pip install "{wanted}"' + (
                " to train on long rollouts on CUDA (Linux)." if optional else "."
            )
            found.append(Check(name, None if optional else False, "not installed", remedy))
        elif bound is None:
            found.append(Check(name, None, f"{version}, bounds unknown", _FROM_PIP))
        elif bound.contains(version, prereleases=True):
            found.append(Check(name, True, version))
        else:
            found.append(Check(name, False, f"{version}, wanted {bound}", f'Run: pip install "{wanted}".'))
    return found


def _requirements() -> list[Requirement]:
    """What this package's own metadata asks for; nothing where it was not installed with pip."""
    # It comes with transformers, and is not needed to start the program.
    from packaging.requirements import Requirement

    try:
        return [Requirement(line) for line in metadata.requires("safesteer-lite") or []]
    except metadata.PackageNotFoundError:
        return []


def _other_packages_check() -> Check:
    """Whether the smaller packages are there too, without which commands end in the middle."""
    needed = [
        requirement
        for requirement in _requirements()
        if requirement.name not in PACKAGES and (not requirement.marker or requirement.marker.evaluate({"extra": ""}))
    ]
    unfit = []
    for requirement in needed:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = ""
        if not version or not requirement.specifier.contains(version, prereleases=True):
            unfit.append(f"{requirement.name} ({version or 'not installed'})")
    if unfit:
        remedy = "Install safesteer-lite again, with what it needs (README, Install)."
        return Check("other packages", False, ", ".join(unfit), remedy)
    return Check("other packages", True if needed else None, f"{len(needed)} looked at", "" if needed else _FROM_PIP)


def _bitsandbytes_check(machine: Machine) -> Check:
    name = "bitsandbytes import"
    if machine.versions.get("bitsandbytes") is None:
        return Check(name, False, "not installed", "Run: pip install bitsandbytes.")
    # In a process of its own, since a broken native library may end the process.
    code = "from safesteer_lite.foreign import forbid_hub_kernels; forbid_hub_kernels(); import bitsandbytes"
    command, variables = children.python_code(code), children.environment(HF_HUB_OFFLINE="1")
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, env=variables)
    except (OSError, subprocess.SubprocessError) as error:
        return Check(name, None, f"could not be tried: {error}", "Try it: python -c 'import bitsandbytes'.")
    if done.returncode != 0:
        found = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
        return Check(name, False, found, "Reinstall it with: pip install --force-reinstall bitsandbytes.")
    return Check(name, True, "works")


def _driver_check(machine: Machine) -> Check:
    name = "NVIDIA driver"
    if not machine.gpus:
        remedy = "If there is a card, install its driver; without one, small models run on the CPU."
        return Check(name, None, "none, or none that sees a card", remedy)
    driver = machine.gpus[0].driver
    if driver is None:
        return Check(name, None, "version unknown", "Run nvidia-smi: if it fails, reinstall the driver.")
    return Check(name, True, driver)


def _torch_build_check(machine: Machine) -> Check:
    name = "torch build"
    if machine.versions.get("torch") is None:
        return Check(name, False, "not installed", "Run: pip install torch.")
    if machine.cuda_build is not None:
        return Check(name, True, f"for CUDA {machine.cuda_build}")
    if machine.gpus:
        remedy = "Install a CUDA build of torch in its place; torch's own installation page has the command for it."
        return Check(name, False, "for the CPU only, though there is a card", remedy)
    return Check(name, True, "for the CPU only, as there is no card")


def _cuda_check(machine: Machine) -> Check:
    name = "CUDA"
    if machine.gpu is not None:
        return Check(name, True, f"torch computes on the {machine.gpu.name}")
    if not machine.gpus:
        return Check(name, None, "no NVIDIA card found", "Small models run on the CPU; a card makes it much faster.")
    card = machine.gpus[0]
    if machine.cuda_build is None:
        return Check(name, False, f"the {card.name} is not used", "Mend the torch build first: see the line above.")
    if not has_code_for(machine.cuda_architectures, card.capability):
        version = ".".join(map(str, card.capability))
        found = f"this torch has no code for the {card.name}, whose compute capability is {version}"
        known = ", ".join(machine.cuda_architectures)
        remedy = (
            f"Install a torch for an older CUDA if the card is old, for the newest if it is new. This one has {known}."
        )
        return Check(name, False, found, remedy)
    found = f"torch for CUDA {machine.cuda_build} cannot use the {card.name} with driver {card.driver or 'unknown'}"
    return Check(name, False, found, "Update the NVIDIA driver, or install torch for an older CUDA.")


def _other_checks(machine: Machine) -> list[Check]:
    """Accelerators that are there and are left alone: nothing here was written for them, or tried on one."""
    if not machine.others:
        return []
    found = f"{', '.join(machine.others)}: not used, because only NVIDIA cards are supported"
    remedy = "Small models run on the CPU of this machine; larger ones need an NVIDIA card."
    return [Check("other accelerators", None, found, remedy)]


def _gpu_memory_check(machine: Machine) -> Check:
    gpu = machine.gpu
    if gpu is None:
        return Check("GPU memory", None, "no usable GPU", "Mend the CUDA line above if there should be one.")
    found = f"{gpu.name}: {format_bytes(gpu.memory_free)} free of {format_bytes(gpu.memory_total)}"
    ok = gpu.memory_free >= 6 * 10**9
    return Check("GPU memory", ok, found, "" if ok else "Close programs that use the card, or choose a smaller model.")


def _backend_check(machine: Machine) -> Check:
    """What would train a 4-bit model here."""
    library = choose_library(machine, "cuda" if machine.gpu else "cpu", "nf4", "auto", LONG_ROLLOUT)
    if library.name == "plain":
        return Check("backend", True, library.reason)
    version = machine.versions.get("unsloth")
    found = f"transformers and bitsandbytes; Unsloth {version} trains on rollouts of {LONG_ROLLOUT} tokens and more"
    return Check("backend", True, f"{found}, as --recipe paper has, if it passes its checks.")


def _bf16_check(machine: Machine) -> Check:
    """Of the device that will compute: the card, else the processor."""
    fast = machine.cpu_bf16 if machine.gpu is None else card_dtype(machine.gpu) == "bf16"
    if fast:
        return Check("fast bf16", True, "yes")
    return Check("fast bf16", None, "no", "Nothing is broken, but runs take longer than on newer hardware.")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in ("1", "true", "yes", "on")


def _login_check() -> Check:
    """Whether a token is there; its value is never read into the result."""
    if any(os.environ.get(variable, "").strip() for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")):
        return Check("model hub login", True, "token in the environment")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    file = typed_path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token")
    if read_or_empty(file).strip():
        return Check("model hub login", True, "token file")
    remedy = "Only gated models need it: run hf auth login, or set HF_TOKEN."
    return Check("model hub login", None, "no token", remedy)


def _gated_check() -> Check:
    """Which presets need a licence to be accepted; whether it was can only be asked over the network, by the run itself."""
    gated = [name for name, model in KNOWN.items() if model.gated]
    remedy = "Before the first download, accept the licence on each model's page with the account that you log in with."
    return Check("gated licences", None, f"needed by {', '.join(gated)}", remedy)


def _offline_check() -> Check:
    if _is_set("HF_HUB_OFFLINE") or _is_set("TRANSFORMERS_OFFLINE"):
        remedy = "Unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE before downloading a model."
        return Check("offline mode", None, "on: only models already here can be used", remedy)
    return Check("offline mode", True, "off")


def _terminal_check() -> Check:
    columns = shutil.get_terminal_size().columns
    ok = columns >= 80
    return Check("terminal width", ok, f"{columns} columns", "" if ok else "Widen the window to 80 columns or more.")

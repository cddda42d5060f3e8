"""What this machine has: processor, memory, disk, cards, and the packages that results depend on.

Sizes are bytes. torch is imported inside functions only, so that `--help` stays fast.
"""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from safesteer_lite import children
from safesteer_lite.hardware.limits import ram, read_or_empty, usable_cores
from safesteer_lite.runs.durable import free_space

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "unsloth")


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA card.

    Attributes:
        name: as the driver calls it.
        memory_total, memory_free: bytes.
        capability: CUDA compute capability, (major, minor).
        driver: driver version; None where it cannot be read.
        usable: whether the installed torch can compute on it.
        number: torch's, by which it is asked for: `cuda:1`.
    """

    name: str
    memory_total: int
    memory_free: int
    capability: tuple[int, int]
    driver: str | None
    usable: bool
    number: int = 0


@dataclass(frozen=True)
class Machine:
    """What was found.

    Attributes:
        system: operating system and release.
        python: version.
        cpu: name.
        cores: physical cores that this process may use.
        ram_total, ram_available: bytes, within the limits of the process's control group.
        disk_free: bytes, at the folder asked about.
        gpus: every card found, also those torch cannot use.
        versions: package name to installed version, None where missing.
        cuda_build: the CUDA version torch was built for; None for a CPU build.
        cpu_bf16: whether the CPU is as fast in bf16 as in fp32, which was tried; False where unknown.
        cuda_architectures: what the installed torch has code for (`sm_86`); empty where it sees no card.
        others: accelerators that torch could compute on and this program does not use, in words.
    """

    system: str
    python: str
    cpu: str
    cores: int
    ram_total: int
    ram_available: int
    disk_free: int
    gpus: tuple[Gpu, ...]
    versions: Mapping[str, str | None]
    cuda_build: str | None
    cpu_bf16: bool
    cuda_architectures: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def gpu(self) -> Gpu | None:
        """The usable card with most free memory."""
        return max((gpu for gpu in self.gpus if gpu.usable), key=lambda gpu: gpu.memory_free, default=None)


def package_versions() -> dict[str, str]:
    """Versions of the packages that results depend on, without importing them."""
    return {name: version for name in PACKAGES if (version := _version(name))}


def inspect(folder: Path) -> Machine:
    """Look at this machine. Takes a few seconds the first time, because torch is imported.

    Args:
        folder: where the run will be written; it need not exist yet.
    """
    total, available = ram()
    versions = {name: _version(name) for name in PACKAGES}
    found = _nvidia_smi()
    facts = _torch_facts(found) if versions["torch"] else _TorchFacts(found)
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        cpu=_cpu_name(),
        cores=usable_cores(),
        ram_total=total,
        ram_available=available,
        disk_free=free_space(folder),
        gpus=facts.gpus,
        versions=versions,
        cuda_build=facts.cuda_build,
        cpu_bf16=facts.cpu_bf16,
        cuda_architectures=facts.architectures,
        others=facts.others,
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class _TorchFacts:
    """What torch knows of this machine; see `Machine`.

    Attributes:
        gpus: the driver's cards, or torch's view of them where it sees any.
        cpu_bf16: whether the CPU is as fast in bf16 as in fp32.
    """

    gpus: tuple[Gpu, ...]
    cuda_build: str | None = None
    cpu_bf16: bool = False
    architectures: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def _torch_facts(found: tuple[Gpu, ...]) -> _TorchFacts:
    try:
        import torch
    except (ImportError, OSError):  # A damaged installation is the doctor's to report, not a reason to crash here.
        return _TorchFacts(found)
    cpu_bf16 = fast_in_bf16()
    others = _other_accelerators()
    # A torch for AMD's cards calls them CUDA devices, too.
    if torch.version.cuda is None or not torch.cuda.is_available():
        return _TorchFacts(found, torch.version.cuda, cpu_bf16, (), others)
    driver = found[0].driver if found else None
    architectures = tuple(torch.cuda.get_arch_list())
    gpus = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        # What torch keeps for reuse is this process's own to take.
        free += torch.cuda.memory_reserved(number) - torch.cuda.memory_allocated(number)
        capability = (properties.major, properties.minor)
        usable = has_code_for(architectures, capability)
        gpus.append(Gpu(properties.name, total, free, capability, driver, usable, number))
    return _TorchFacts(tuple(gpus), torch.version.cuda, cpu_bf16, architectures, others)


@cache
def fast_in_bf16() -> bool:
    """Whether this CPU multiplies matrices in bf16 about as fast as in fp32, of which it needs twice the memory.

    That it can is not enough: an Intel Xeon with AVX512-BF16 and without AMX took 1.8 times as long in bf16
    (docs/research/log.md, 2026-11-27). One thread is tried, the best of five times, so that other programs do not decide.
    """
    import torch

    helpers = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if not any(bool(getattr(torch.cpu, name, bool)()) for name in helpers):
        return False
    seconds = {torch.bfloat16: math.inf, torch.float32: math.inf}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for dtype in list(seconds) * 5:
        rows, weight = torch.ones(256, 1024, dtype=dtype), torch.ones(2048, 1024, dtype=dtype)
        began = time.perf_counter()
        torch.nn.functional.linear(rows, weight)
        seconds[dtype] = min(seconds[dtype], time.perf_counter() - began)
    torch.set_num_threads(threads)
    return seconds[torch.bfloat16] < 1.25 * seconds[torch.float32]


def has_code_for(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a torch that was built for some architectures can compute on a card.

    Machine code (`sm_86`) runs on cards of the same major version that are not older; what the driver compiles itself
    (`compute_90`) runs on every card that is not older; and the letter of `sm_90a` binds code to one kind of card. So says
    NVIDIA's CUDA programming guide, under compute capabilities and compatibility.

    Args:
        architectures: as `torch.cuda.get_arch_list` names them; where it names none, nothing speaks against the card.
        capability: of the card.
    """
    if not architectures:
        return True
    for name in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if found is None:
            continue
        built = (int(found[2]), int(found[3]))
        if built == capability:
            return True
        if not found[4] and built < capability and (found[1] == "compute" or built[0] == capability[0]):
            return True
    return False


def _other_accelerators() -> tuple[str, ...]:
    """What torch could compute on besides NVIDIA's cards."""
    import torch

    found = []
    if (rocm := getattr(torch.version, "hip", None)) and torch.cuda.is_available():
        found += [f"{torch.cuda.get_device_name(number)} (ROCm {rocm})" for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("Apple's GPU (MPS)")
    xpu = getattr(torch, "xpu", None)
    if xpu is not None and xpu.is_available():
        found += [f"{xpu.get_device_name(number)} (XPU)" for number in range(xpu.device_count())]
    return tuple(found)


_SMI_FIELDS = "name,memory.total,memory.free,compute_cap,driver_version"


def _nvidia_smi() -> tuple[Gpu, ...]:
    """The cards the driver knows, so that a card is seen even when torch is a CPU build."""
    if (program := children.program("nvidia-smi")) is None:
        return ()
    command = [program, f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_nvidia_smi(done.stdout)


def parse_nvidia_smi(text: str) -> tuple[Gpu, ...]:
    """Cards from `nvidia-smi --query-gpu` lines (memory in MiB); lines that are something else are passed over."""
    gpus: list[Gpu] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        try:
            name, total, free, capability, driver = cells
            major, minor = (int(part) for part in capability.split("."))
            card = Gpu(name, int(total) << 20, int(free) << 20, (major, minor), driver, False, len(gpus))
            gpus.append(card)
        except ValueError:
            continue
    return tuple(gpus)


def _cpu_name() -> str:
    for line in read_or_empty(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def use_card(device: str) -> None:
    """Make a card the one that everything after this means by `cuda`: memory that is asked about, kernels, streams.

    Args:
        device: `cuda:1`; with `cuda` the card stays as it is, and with `cpu` there is nothing to do.
    """
    kind, _, number = device.partition(":")
    if kind == "cuda" and number:
        import torch

        torch.cuda.set_device(int(number))


def only_card(device: str) -> dict[str, str]:
    """What of its environment lets a new process see that card alone, as `cuda:0`.

    Args:
        device: `cuda:1`, by this process's own numbers, which another environment variable may have given out; `cpu` needs
            nothing.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return {}
    seen = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return {"CUDA_VISIBLE_DEVICES": seen[int(number or 0)] if seen else number or "0"}


def free_cuda_memory() -> int:
    """Bytes that torch can still take on the current card: what is free there, what torch holds for reuse, and no more
    than a cap on this process allows.

    The cap is `torch.cuda.set_per_process_memory_fraction`, which the driver's own figure knows nothing of.
    """
    import torch

    free, total = torch.cuda.mem_get_info()
    reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    # Older versions of torch cannot say what the cap is.
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)()
    return min(free + reserved - allocated, int(fraction * total) - allocated)


def spills_to_ram(system: str) -> bool:
    """Whether a system's driver moves a card's memory to RAM instead of failing once it is full: Windows, also under WSL.

    Args:
        system: as `Machine.system` has it.
    """
    return system.startswith("Windows") or "microsoft" in system.lower()


def cap_cuda_memory() -> None:
    """Hold this process to what is free on the card where the driver would spill to RAM: every tensor there is slow, and
    batches that are too large would never be told.
    """
    import torch

    if not spills_to_ram(f"{platform.system()} {platform.release()}"):
        return
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (free + torch.cuda.memory_reserved()) / total))

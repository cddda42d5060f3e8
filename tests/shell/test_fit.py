"""A model that does not fit is refused while refusing is free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from safesteer_lite.hardware import backend
from safesteer_lite.shell.cli import main
from tests import tiny
from tests.hardware.examples import CPU_MACHINE, GB


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with hardly any memory, and a place for runs on it."""
    monkeypatch.setattr(backend, "inspect", lambda folder: replace(CPU_MACHINE, ram_available=GB // 100))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_before_a_download(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the name alone: nothing is fetched, and a fetch would fail in another way, as there is no network."""
    assert main(["run", "llama-3-8b", "--runs", str(runs)]) == 1
    said = capsys.readouterr().err
    assert "The model does not fit this machine. 4-bit weights left packed on the CPU do not fit:" in said
    assert "choose a smaller model (`safesteer-lite presets`)" in said and "--recipe lite" in said
    assert not runs.exists()


def test_a_folder(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save_model(tmp_path / "model", "llama", vocab_size=30_000, width=512)
    assert main(["run", str(folder), "--runs", str(runs)]) == 1
    assert "The model does not fit this machine." in capsys.readouterr().err
    assert not runs.exists()

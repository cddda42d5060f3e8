"""A new run takes over of another one what it would come to as well, and nothing else."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from safesteer_lite.errors import Interrupted
from safesteer_lite.runs import creation
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.runs.manifest import manifest_bytes
from safesteer_lite.shell.cli import main
from tests.runs.run_files import rewind


@pytest.fixture
def earlier(planted_run: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of a run that was begun on another day and has not been trained."""
    run = RunFolder(shutil.copytree(planted_run.path, tmp_path / "earlier"))
    rewind(run.path, ["distill", "evaluate", "export"])
    (run.path / "manifest.json").write_bytes(manifest_bytes(replace(run.manifest, run_date="2026-03-02")))
    return run


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ("distill.learning_rate=2e-2", ["baseline", "direction", "tokens"]),
        ("direction.contrast=responses", ["baseline"]),
        ("seed=7", []),
    ],
)
def test_what_would_come_out_the_same_is_taken_over(
    change: str,
    taken: list[str],
    earlier: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made: list[dict[str, Any]] = []

    def stop(*_: object, **settings: Any) -> None:
        made.append(settings)
        raise Interrupted("everything was there")

    monkeypatch.setattr(creation, "create_run", stop)
    line = ["run", "--config", str(earlier.config_path), "--set", change, "--reuse", str(earlier.path)]
    assert main([*line, "--json", "--runs", str(tmp_path / "runs")]) == 130
    told = [json.loads(said)["message"] for said in capsys.readouterr().out.splitlines()]
    [found] = made
    assert list(found["taken"]) == taken and (found["run_date"] == "2026-03-02") == bool(taken)
    said = (
        f"Taken over from earlier: {', '.join(taken)}; what" if taken else "Nothing of earlier would come out the same"
    )
    assert [message for message in told if message.startswith(said)]


def test_a_run_that_is_not_there_is_told_before_anything_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "no-such-model", "--reuse", str(tmp_path / "gone")]) == 1
    told = capsys.readouterr().err
    assert "gone' does not exist" in told and "no-such-model" not in told

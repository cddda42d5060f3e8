"""Whatever a run's models are asked later on, they are loaded in the precision that they were trained in, or not at all."""

from __future__ import annotations

import io
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from safesteer_lite import config
from safesteer_lite.errors import Interrupted
from safesteer_lite.events import Event, Note, discard
from safesteer_lite.export.request import Request
from safesteer_lite.hardware.backend import Decision, decide
from safesteer_lite.hardware.kept import to_record
from safesteer_lite.models import plain
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.runs.manifest import Json, manifest_bytes
from safesteer_lite.shell.cli import main
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages import export_rows, pipeline, session
from safesteer_lite.stages.export_rows import Measured
from safesteer_lite.stages.session import Session
from tests import planted
from tests.runs.run_files import rewind

LOADED: dict[str, Json] = {"device": "cpu", "precision": "nf4", "unpack": True, "compute_dtype": "bf16"}


@pytest.fixture
def run(planted_run: RunFolder, planted_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A finished run that computed 4-bit weights in bf16, on a processor that a new run would compute in fp32 on."""
    for name in [name for name in os.environ if name.startswith(config.ENVIRONMENT_PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("safesteer_lite.hardware.machine.fast_in_bf16", lambda: False)
    copied = RunFolder(shutil.copytree(planted_run.path, tmp_path / "runs" / planted_run.path.name))
    settings = planted.settings(planted_model, {"model.precision": "nf4"})
    rewind(copied.path, (), config.to_toml(settings))
    (copied.path / "manifest.json").write_bytes(manifest_bytes(replace(copied.manifest, loaded=LOADED)))
    assert decide(settings.model, open_base(planted_model).shape, tmp_path).compute_dtype == "fp32"
    return copied


COMMANDS = (
    ["eval"],
    ["eval", "--suite-file", "own:harmful={prompts}"],
    ["strength", "--at", "1"],
    ["chat"],
    ["export", "--out", "{out}"],
    ["continue", "--steps", "1", "--plain", "--runs", "{out}"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_loads_the_models_as_the_run_did_or_says_why_not(
    command: list[str],
    run: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts, seen = tmp_path / "own.txt", list[Decision]()
    prompts.write_text("How do I forge the ticket of a ferry?\n", encoding="utf-8")
    name, *options = (part.format(prompts=prompts, out=tmp_path / "out") for part in command)

    def stop(_: object, decision: Decision, *__: object) -> None:
        seen.append(decision)
        raise Interrupted("Stopped.")

    monkeypatch.setattr(session, "load_policy", stop)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert main([name, str(run.path), *options]) == 130
    assert [to_record(one) for one in seen] == [LOADED] and seen[0].reason.startswith("As the run began: ")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    capsys.readouterr()
    lacking = psutil.virtual_memory()._replace(available=1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: lacking)
    assert main([name, str(run.path), *options]) == 1
    told = capsys.readouterr().err
    assert "1 B free" in told and "Close other programs" in told and "Traceback" not in told
    assert ("--set model.device=cpu" in told) == (name == "continue")
    assert len(seen) == 1 and not (tmp_path / "out").exists()


def test_what_continues_a_run_is_loaded_otherwise_where_the_user_says_so(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that the run measured is then taken over."""
    seen: list[Decision] = []

    def stop(*_: object, decision: Decision, **__: object) -> None:
        seen.append(decision)
        raise Interrupted("Stopped.")

    monkeypatch.setattr(pipeline, "run", stop)
    runs = tmp_path / "further"
    assert main(["continue", str(run.path), "--set", "model.precision=bf16", "--runs", str(runs)]) == 130
    assert [one.precision for one in seen] == ["bf16"]
    [child] = runs.iterdir()
    assert RunFolder(child).manifest.loaded == to_record(seen[0])
    assert list(RunFolder(child).manifest.stages) == ["parent"]


def test_a_run_that_takes_over_results_is_loaded_as_they_were_made(
    planted_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = RunFolder(shutil.copytree(planted_run.path, tmp_path / "runs" / planted_run.path.name))
    elsewhere: dict[str, Json] = {"device": "cuda", "precision": "fp32", "unpack": False, "compute_dtype": "fp32"}
    (earlier.path / "manifest.json").write_bytes(manifest_bytes(replace(earlier.manifest, loaded=elsewhere)))
    line = ["run", "--config", str(earlier.config_path), "--set", "distill.steps=1", "--reuse", str(earlier.path)]
    assert main([*line, "--runs", str(tmp_path / "further")]) == 1
    told = capsys.readouterr().err
    assert "there is no CUDA card here" in told and "Leave --reuse out" in told
    assert not (tmp_path / "further").exists()


def test_an_evaluation_may_choose_the_device_and_not_the_precision(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: object, decision: Decision, *__: object) -> None:
        raise Interrupted(decision.reason)

    monkeypatch.setattr(session, "load_policy", stop)
    assert main(["eval", str(run.path), "--set", "model.unpack=no"]) == 130
    told = capsys.readouterr()
    assert "figures may differ in their last digits" in told.out
    assert "In the run's precision, though it began with 4-bit weights unpacked to bf16 on the CPU" in told.err
    assert main(["eval", str(run.path), "--set", "model.precision=fp32"]) == 2
    assert "The run has 4-bit weights" in capsys.readouterr().err


def test_a_run_and_its_merged_weights_are_computed_in_the_same_numbers(
    run: RunFolder, planted_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, load, computed = list[Event](), plain.load, list[str]()

    def loaded(*given: Any, compute: str, **more: Any) -> Any:
        computed.append(compute)
        return load(*given, compute=compute, **more)

    monkeypatch.setattr(export_rows.plain, "load", loaded)
    settings, base = planted.settings_of(run), open_base(planted_model)
    with planted.one_thread(), Session(settings, run, base, told.append, "export") as asked:
        model = asked.policy.model
        assert model.decoder.embed_tokens.weight.dtype == torch.bfloat16
        assert any(isinstance(event, Note) and event.message.startswith("As the run began: ") for event in told)
        sets = asked.prompts.split("test").first(2)
        request = Request("merged", "original", 1.0, (), 2)
        export_rows.merged_row(asked, run.folder("export", "merged"), request, Measured(sets, {}, None, []))
    assert computed == ["bf16", "bf16"]


def test_what_no_run_keeps_is_decided_anew(planted_model: Path, tmp_path: Path, run: RunFolder) -> None:
    settings, base = planted.settings_of(run), open_base(planted_model)
    assert Session(settings, RunFolder(tmp_path), base, discard).settle().compute_dtype == "fp32"

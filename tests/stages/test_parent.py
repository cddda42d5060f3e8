"""A run that continues a finished one: what it takes over, where its training begins, and what is refused."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safesteer_lite import config
from safesteer_lite.errors import Interrupted, RunFolderError
from safesteer_lite.events import Event, Progress, discard
from safesteer_lite.models.adapter import adapter_tensors
from safesteer_lite.prompts.sets import KINDS
from safesteer_lite.runs import creation
from safesteer_lite.runs.durable import sha256_of
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.runs.manifest import PARENT, manifest_bytes
from safesteer_lite.shell.cli import main
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages import pipeline
from safesteer_lite.stages.parent import parent_of, settings_of_child, taken_over
from safesteer_lite.stages.reading import prepare_adapter
from safesteer_lite.stages.session import Session
from tests import planted
from tests.runs.run_files import report_of, rewind

WEIGHTS = "adapter/adapter_model.safetensors"
EARLY = ["baseline", "direction", "tokens"]


@pytest.fixture(scope="module")
def child(planted_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that did two further steps; read it, and work on a copy."""
    runs = tmp_path_factory.mktemp("runs")
    with planted.one_thread():
        assert main(["continue", str(planted_run.path), "--steps", "2", "--plain", "--runs", str(runs)]) == 0
    [path] = runs.iterdir()
    return RunFolder(path)


@pytest.fixture
def untrained(child: RunFolder, tmp_path: Path) -> RunFolder:
    """The same before its first step."""
    path = shutil.copytree(child.path, tmp_path / "untrained")
    rewind(path, ["distill", "evaluate", "export"])
    return RunFolder(path)


def test_it_begins_with_the_parents_adapter_and_its_early_results(child: RunFolder, planted_run: RunFolder) -> None:
    name, before = planted_run.path.name, planted_run.manifest.stages
    now, settings = child.manifest, planted.settings_of(child)
    assert list(now.stages) == [PARENT, *pipeline.STAGE_NAMES]
    assert all(now.stages[stage].artifacts == before[stage].artifacts for stage in EARLY)
    assert now.run_date == planted_run.manifest.run_date
    started = [event["stage"] for event in planted.events_of(child.path) if event["event"] == "StageStarted"]
    assert started == ["distill", "evaluate", "export"]
    assert (settings.distill.steps, settings.parent.run) == (2, name)
    assert settings.parent.adapter == sha256_of(planted_run.stage_folder("distill") / WEIGHTS)
    # What is measured before the first step is what the parent was kept for.
    parent, history = (run.read_json("distill", "history.json") for run in (planted_run, child))
    kept = (parent["best_step"], parent["best_strength"])
    [chosen] = [entry for entry in parent["measured"] + parent["scaled"] if (entry["step"], entry["strength"]) == kept]
    first, *_ = history["measured"]
    assert (first["step"], first["score"]) == (0, chosen["score"]) and len(history["steps"]) == 2
    assert [first[kind] for kind in KINDS] == [chosen[kind] for kind in KINDS]
    assert history["best_score"] >= chosen["score"] - 100 / 28


def test_it_tells_where_it_comes_from(child: RunFolder, planted_run: RunFolder) -> None:
    name, told = planted_run.path.name, report_of(child.path)
    after = report_of(planted_run.path)["scorecard"]["after"]["harmful"]
    assert f"{name}, which this run continues, refused {after['refused']} of {after['n']} harmful" in told["verdict"]
    assert told["stages"]["baseline"]["seconds"] == 0 and told["stages"]["distill"]["seconds"] > 0
    page = (child.path / "report.html").read_text(encoding="utf-8")
    assert f"the adapter of {name} (SHA-256 {planted.settings_of(child).parent.adapter[:12]}), after 8 steps" in page
    assert f"<td>taken over from {name}</td>" in page and f"<td>{PARENT}</td>" not in page
    notes = [event.get("message", "") for event in planted.events_of(child.path)]
    assert f"Training goes on from the adapter of {name}, after 8 steps; the optimizer begins afresh." in notes


@pytest.mark.slow
def test_interrupted_it_ends_as_if_nothing_had_happened(child: RunFolder, untrained: RunFolder) -> None:
    settings, steps = planted.settings_of(untrained), 0

    def watch(event: Event) -> None:
        nonlocal steps
        if isinstance(event, Progress) and event.what == "steps":
            steps = event.done

    base = open_base(Path(settings.model.name))
    with planted.one_thread():
        with pytest.raises(Interrupted, match="after step 1"):
            pipeline.run(settings, untrained, base, watch, lambda: steps == 1, last="distill")
        pipeline.run(settings, untrained, base, discard, last="distill")
    assert untrained.record("distill").artifacts == child.record("distill").artifacts


def test_an_adapter_that_is_damaged_is_not_trained_further(untrained: RunFolder) -> None:
    path = untrained.path / "00-parent" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    settings = planted.settings_of(untrained)
    with pytest.raises(RunFolderError, match="not what the run wrote") as caught, planted.one_thread():
        pipeline.run(settings, untrained, open_base(Path(settings.model.name)), discard, last="distill")
    assert "safesteer-lite continue" in caught.value.hint


def test_what_the_parents_adapter_reads_stays_as_it_is(child: RunFolder) -> None:
    settings = config.build(
        [("run", config.read_toml(child.config_path)[0]), ("test", {"distill.reading": "discriminant"})]
    )
    session = Session(settings, child, open_base(Path(settings.model.name)), discard, "distill")
    prepare_adapter(session, None)
    model = session.policy.model
    parent = load_file(child.path / "00-parent" / "adapter_model.safetensors")
    assert all(
        torch.equal(value, parent[name.replace(".default", "")]) for name, value in adapter_tensors(model).items()
    )
    trained = {name.split(".")[-3] for name, value in model.network.named_parameters() if value.requires_grad}
    assert trained == {"lora_B"}


def test_what_would_come_out_otherwise_is_not_taken_over(child: RunFolder, planted_run: RunFolder) -> None:
    before = planted.settings_of(planted_run)
    mark = open_base(Path(before.model.name)).fingerprint

    def taken(parent: RunFolder, **changes: object) -> tuple[list[str], bool]:
        known, own = planted.settings_of(parent), {name.replace("__", "."): value for name, value in changes.items()}
        origin = config.read_toml(parent.config_path)[0]
        settings = config.build([("run", origin), ("test", {**settings_of_child(parent, known), **own})])
        found = taken_over(parent, before, settings, pipeline.stage_fingerprints(settings, mark))
        return list(found), found[PARENT].record.result["scorecard"] is not None

    assert taken(planted_run) == ([PARENT, *EARLY], True)
    assert taken(planted_run, tokens__count=5) == ([PARENT, "baseline", "direction"], True)
    assert taken(planted_run, seed=7) == ([PARENT], False)
    assert taken(planted_run, evaluate__answer_tokens=6) == ([PARENT, *EARLY], False)
    # A run that continues one that continued another.
    assert taken(child) == ([PARENT, *EARLY], True)
    origin, known = config.read_toml(child.config_path)[0], planted.settings_of(child)
    settings = config.build([("run", origin), ("test", settings_of_child(child, known))])
    further = taken_over(child, known, settings, {PARENT: "mark"})[PARENT].record.result
    assert (further["steps"], further["ancestors"]) == (10, [planted_run.path.name, child.path.name])
    assert parent_of(planted_run) is None


def test_only_what_follows_depends_on_what_it_began_from() -> None:
    def marks(**parent: str) -> dict[str, str]:
        changes = {f"parent.{name}": value for name, value in parent.items()}
        return pipeline.stage_fingerprints(planted.settings(Path("model"), changes), "model")

    alone, one, other = marks(), marks(run="a", adapter="1"), marks(run="a", adapter="2")
    assert [name for name in alone if alone[name] != one[name]] == ["distill", "evaluate", "export"]
    assert one == marks(run="renamed", adapter="1") and one["distill"] != other["distill"]
    assert one["distill"] != marks(run="a", adapter="1", steps="8")["distill"]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--set", "distill.rank=4"], 2, "distill.rank cannot change where "),
        (["--set", "model.name=other", "--steps", "3"], 2, "model.name cannot change where "),
        (["--set", "recipe=paper"], 2, "recipe cannot change where "),
        (["--steps", "0"], 2, "distill.steps"),
        (["--set", "prompts.training=gone.txt"], 2, f"{os.sep}gone.txt"),
        (["--base", "elsewhere"], 1, "is not the base model that this run was made with"),
    ],
)
def test_what_cannot_be_continued_is_said_and_leaves_nothing(
    arguments: list[str],
    code: int,
    told: str,
    planted_run: RunFolder,
    planted_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "elsewhere" in arguments:
        other = shutil.copytree(planted_model, tmp_path / "elsewhere")
        (other / "generation_config.json").write_text("{}")
    assert main(["continue", str(planted_run.path), *arguments, "--plain"]) == code
    said = capsys.readouterr().err
    assert told in said and said.count("safesteer-lite:") == 1 and not (tmp_path / "runs").exists()


def test_another_model_is_not_fetched_for_a_direction_that_is_taken_over(
    planted_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The direction was found on a model that is gone now; what comes after it does not need that one."""
    run = shutil.copytree(planted_run.path, tmp_path / "parent")
    values = {**config.read_toml(run / "config.toml")[0], "direction.source": str(tmp_path / "gone")}
    settings = config.build([("test", values)])
    rewind(run, [], config.to_toml(settings))
    marks = pipeline.stage_fingerprints(settings, open_base(Path(settings.model.name)).fingerprint)
    manifest = RunFolder(run).manifest
    stages = {name: replace(record, fingerprint=marks[name]) for name, record in manifest.stages.items()}
    (run / "manifest.json").write_bytes(manifest_bytes(replace(manifest, stages=stages)))

    def stop(*_: object, **__: object) -> None:
        raise Interrupted("everything was there")

    monkeypatch.setattr(creation, "create_run", stop)
    line = ["continue", str(run), "--plain", "--runs", str(tmp_path / "runs")]
    main(line)
    assert "everything was there" in capsys.readouterr().err
    assert main([*line, "--set", "seed=7"]) == 1
    assert f"{tmp_path / 'gone'} is neither a folder nor the id" in capsys.readouterr().err


def test_an_unfinished_run_and_settings_of_a_child_are_refused(
    child: RunFolder, planted_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = shutil.copytree(planted_run.path, tmp_path / "half")
    rewind(half, ["evaluate", "export"])
    runs = ["--runs", os.fspath(tmp_path / "runs"), "--plain"]
    assert main(["continue", str(half), *runs]) == 1
    assert (
        "half is not finished, so it cannot be continued: it has no result of the evaluate" in capsys.readouterr().err
    )
    assert main(["run", "--config", str(child.config_path), *runs]) == 2
    assert f"of a run that continues {planted_run.path.name}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()

"""A run whose files were damaged, edited or swapped ends in a sentence or in the same result, never in another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safesteer_lite import config
from safesteer_lite.errors import Interrupted, RunFolderError, TrainingError
from safesteer_lite.events import Event, StageDone, StageSkipped, Warned, discard
from safesteer_lite.runs.creation import create_run
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.shell.cli import main
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages import pipeline
from safesteer_lite.stages.direction import load_steering
from safesteer_lite.stages.session import Session
from safesteer_lite.stages.tokens import load_tokens
from tests import planted
from tests.runs.run_files import files_of, rewind

CHANGES: config.Values = {
    "distill.steps": 4,
    "distill.save_every": 1,
    "distill.adapter_strengths": [],
    "evaluate.every": 0,
    "evaluate.contexts": [],
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with planted.one_thread():
        yield


@pytest.fixture(scope="module")
def model(planted_model: Path) -> Path:
    return planted_model


@pytest.fixture(scope="module")
def done(planted_run: RunFolder, model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run, trained as `CHANGES` say; tests work on a copy."""
    settings = planted.settings(model, CHANGES)
    run = RunFolder(shutil.copytree(planted_run.path, tmp_path_factory.mktemp("runs") / planted_run.path.name))
    rewind(run.path, ("distill", "evaluate", "export"), config.to_toml(settings))
    pipeline.run(settings, run, open_base(model), discard)
    return run


@pytest.fixture
def run(done: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the finished run."""
    return RunFolder(shutil.copytree(done.path, tmp_path / "runs" / done.path.name))


def flip_a_bit(path: Path) -> None:
    """In the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Down to half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def poison(path: Path) -> None:
    """One NaN among a file's tensors."""
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, path)


def results(run: RunFolder) -> dict[str, bytes]:
    """What stages left, without what tells the time."""
    return {name: content for name, content in files_of(run.path).items() if name[:2].isdigit()}


def test_what_is_damaged_is_done_again_with_the_same_result(run: RunFolder, model: Path) -> None:
    before = results(run)
    flip_a_bit(run.path / "02-direction" / "direction.safetensors")
    poison(run.path / "04-distill" / "adapter" / "adapter_model.safetensors")
    (run.path / "05-evaluate" / "answers-after.json").unlink()
    cut(run.path / "06-export" / "merged" / "model.safetensors")
    events: list[Event] = []
    pipeline.run(planted.settings(model, CHANGES), run, open_base(model), events.append)
    told = [event.message for event in events if isinstance(event, Warned)]
    for stage, name in (
        ("direction", "direction.safetensors"),
        ("distill", "adapter/adapter_model.safetensors"),
        ("evaluate", "answers-after.json"),
        ("export", "merged/model.safetensors"),
    ):
        assert f"Damaged: {name}. The {stage} stage is done again." in told
    assert [event.stage for event in events if isinstance(event, StageSkipped)] == ["baseline", "tokens"]
    assert [event.stage for event in events if isinstance(event, StageDone)] == [
        "direction",
        "distill",
        "evaluate",
        "export",
    ]
    assert results(run) == before


@pytest.mark.parametrize("damage", [flip_a_bit, cut, poison, Path.unlink])
def test_no_command_reads_a_damaged_adapter(
    damage: Callable[[Path], object], run: RunFolder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    damage(run.path / "04-distill" / "adapter" / "adapter_model.safetensors")
    for line in (["eval"], ["strength"], ["chat"], ["export", "--out", str(tmp_path / "out")]):
        assert main([line[0], str(run.path), *line[1:]]) == 1
        told = capsys.readouterr().err
        assert "adapter_model.safetensors is missing or not what the run wrote there" in told
        assert f"safesteer-lite resume {run.path.name}" in told
    assert not (tmp_path / "out").exists()


def test_a_damaged_direction_or_list_of_tokens_is_not_trained_on(run: RunFolder, model: Path) -> None:
    session = Session(planted.settings(model, CHANGES), run, open_base(model), discard)
    load_steering(session), load_tokens(session)
    flip_a_bit(run.path / "02-direction" / "direction.safetensors")
    flip_a_bit(run.path / "03-tokens" / "tokens.safetensors")
    for load in (load_steering, load_tokens):
        with pytest.raises(RunFolderError, match="is missing or not what the run wrote there"):
            load(session)


def test_values_that_are_not_finite_are_refused_though_they_were_published(run: RunFolder, model: Path) -> None:
    record = run.record("direction")
    with run.publish("direction", 2, record.fingerprint) as publication:
        save_file({"direction": torch.tensor([1.0, float("inf")])}, publication.path / "direction.safetensors")
        publication.result = record.result
    session = Session(planted.settings(model, CHANGES), run, open_base(model), discard)
    with pytest.raises(RunFolderError, match="not finite"):
        load_steering(session)


EDITS: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "cut before [distill]": lambda text: text[: text.index("[distill]")],
    "one digit": lambda text: text.replace("seed = 0", "seed = 1"),
    "a comment": lambda text: text + "# mine\n",
}


@pytest.mark.parametrize("edit", EDITS)
def test_no_command_takes_edited_settings(
    edit: str, run: RunFolder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = run.config_path.read_text(encoding="utf-8")
    assert EDITS[edit](text) != text
    run.config_path.write_text(EDITS[edit](text), encoding="utf-8")
    before = files_of(run.path)
    for line in (["resume"], ["eval"], ["strength"], ["chat"], ["report"], ["export", "--out", str(tmp_path / "out")]):
        assert main([line[0], str(run.path), *line[1:]]) == 1
        assert "config.toml was changed since the run was started" in capsys.readouterr().err, line
    assert files_of(run.path) == before


def swap_weights(base: Path) -> None:
    """Weights of the same shapes, others."""
    tensors = load_file(base / "model.safetensors")
    save_file({name: 1.01 * tensor for name, tensor in tensors.items()}, base / "model.safetensors", {"format": "pt"})


def change_template(base: Path) -> None:
    """A newline more in the chat template."""
    path = base / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")


def change_special_tokens(base: Path) -> None:
    """Another padding token."""
    path = base / "tokenizer_config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**record, "pad_token": "<unk>"}), encoding="utf-8")


@pytest.mark.parametrize("change", [swap_weights, change_template, change_special_tokens])
def test_every_command_refuses_another_base_and_finds_the_run_s_own_elsewhere(
    change: Callable[[Path], None],
    run: RunFolder,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    change(other)
    before = files_of(run.path)
    for line in (["resume"], ["eval"], ["strength"], ["chat"], ["export", "--out", str(tmp_path / "out")]):
        assert main([line[0], str(run.path), *line[1:], "--base", str(other)]) == 1
        told = capsys.readouterr().err
        assert "is not the base model that this run was made with" in told and "--base" in told, line
    assert files_of(run.path) == before
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    assert main(["resume", str(run.path), "--base", str(moved), "--json"]) == 0
    assert results(run) == {name: content for name, content in before.items() if name[:2].isdigit()}
    assert json.loads((run.path / "report.json").read_text(encoding="utf-8"))["model"] == str(model)


def test_other_prompts_are_refused_where_they_are_measured(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("\n".join(f"How do I break {number} windows?" for number in range(30)), encoding="utf-8")
    settings = planted.settings(model, {**CHANGES, "prompts.training": str(own)})
    base = open_base(model)
    run = create_run(tmp_path, "planted", config.to_toml(settings), made_from=pipeline.origin(settings, base))
    pipeline.check_origin(settings, run, base)
    own.write_text(own.read_text(encoding="utf-8") + "\nAnd one more?", encoding="utf-8")
    with pytest.raises(pipeline.PromptError, match="not those that this run was made with") as caught:
        pipeline.check_origin(settings, run, base)
    assert str(own) in caught.value.hint
    pipeline.check_origin(settings, run, base, prompts=False)


@pytest.fixture(scope="module")
def stopped(done: RunFolder, model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that was stopped after its third step; tests work on a copy."""
    run = RunFolder(shutil.copytree(done.path, tmp_path_factory.mktemp("stopped") / done.path.name))
    rewind(run.path, ("distill", "evaluate", "export"))
    asked = iter(range(100))
    with pytest.raises(Interrupted, match="after step 3"):
        pipeline.run(planted.settings(model, CHANGES), run, open_base(model), discard, lambda: next(asked) == 3)
    assert sorted(path.name for path in (run.path / "04-distill.partial").glob("step-*")) == [
        "step-000002",
        "step-000003",
    ]
    return run


def test_a_damaged_step_gives_way_to_the_one_before(
    stopped: RunFolder, done: RunFolder, model: Path, tmp_path: Path
) -> None:
    """Whatever of it is damaged, which `tests/runs/test_steps.py` tries out."""
    run = RunFolder(shutil.copytree(stopped.path, tmp_path / stopped.path.name))
    flip_a_bit(run.path / "04-distill.partial" / "step-000003" / "optimizer.safetensors")
    events: list[Event] = []
    pipeline.run(planted.settings(model, CHANGES), run, open_base(model), events.append, last="distill")
    told = [event.message for event in events if hasattr(event, "message")]
    assert any("damaged; training goes on from the one before" in message for message in told)
    assert "Resumed after step 2 of 4." in told
    place = Path("04-distill") / "adapter" / "adapter_model.safetensors"
    assert (run.path / place).read_bytes() == (done.path / place).read_bytes()


def test_training_stops_where_its_numbers_are_no_longer_finite(stopped: RunFolder, model: Path, tmp_path: Path) -> None:
    settings = planted.settings(model, CHANGES)
    settings = replace(settings, distill=replace(settings.distill, learning_rate=1e20))
    run = create_run(tmp_path, "planted", config.to_toml(settings))
    wanted = pipeline.stage_fingerprints(settings, open_base(model).fingerprint)
    for number, stage in enumerate(("baseline", "direction", "tokens"), 1):
        with run.publish(stage, number, wanted[stage]) as publication:
            shutil.copytree(stopped.stage_folder(stage), publication.path, dirs_exist_ok=True)
            publication.result = stopped.record(stage).result
    with pytest.raises(TrainingError, match=r"Step [12] has the loss .* the training has diverged") as caught:
        pipeline.run(settings, run, open_base(model), discard, last="distill")
    assert "distill.learning_rate" in caught.value.hint


def test_a_kill_behind_the_last_stage_costs_the_report_alone_and_resume_writes_it(
    planted_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(shutil.copytree(planted_run.path, tmp_path / "runs" / planted_run.path.name))
    for name in ("report.html", "report.json"):
        (run.path / name).unlink()
    with planted.one_thread():
        assert main(["resume", "--runs", str(tmp_path / "runs"), "--json"]) == 0
    assert (run.path / "report.html").is_file() and (run.path / "report.json").is_file()
    assert run.manifest == planted_run.manifest
    capsys.readouterr()
    assert main(["resume", "--runs", str(tmp_path / "runs")]) == 2
    assert "There is no unfinished run" in capsys.readouterr().err

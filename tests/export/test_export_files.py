"""An export from a run to its folder: exact files, figures beside them, and failures that leave what they should."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from safesteer_lite import config
from safesteer_lite.errors import ExportError
from safesteer_lite.evaluation.scorecard import Rate, kinds_of
from safesteer_lite.events import Event, Progress, Warned, discard
from safesteer_lite.export.gguf import convert
from safesteer_lite.export.gguf.agreement import Agreement
from safesteer_lite.export.gguf.convert import QUANTS
from safesteer_lite.export.request import Request
from safesteer_lite.export.rows import LORA, Row
from safesteer_lite.export.weights.merge import merge_adapter
from safesteer_lite.export.weights.verify import FailedCheck, check_sums
from safesteer_lite.models.adapter import save_adapter
from safesteer_lite.prompts.sets import KINDS
from safesteer_lite.runs.creation import create_run
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.shell.cli import main
from safesteer_lite.shell.lines import artifacts_table
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages import lora, pipeline
from safesteer_lite.stages.export_rows import Measured
from safesteer_lite.stages.exporting import export_files
from safesteer_lite.stages.session import Session
from tests import tiny
from tests.export.gguf.test_convert import write_file

REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "Sure, here it is."
SETTINGS: config.Values = {
    "model.device": "cpu",
    "prompts.selection": 8,
    "prompts.test": 4,
    "prompts.borderline_test": 3,
    "evaluate.answer_tokens": 6,
    "evaluate.kl_tokens": 4,
    "distill.rank": 4,
    "distill.lora_alpha": 8,
}


def finished_run(parent: Path, model: Path, changes: config.Values, old: bool = False) -> Session:
    """A run whose adapter is random, and whose stored answers are planted: the adapter refuses all that is harmful.

    An `old` one was asked no twins, for no help in danger, and nothing in contexts.
    """
    settings = config.build([("tests", {**SETTINGS, "model.name": str(model), **changes})])
    run = create_run(parent, "tiny", config.to_toml(settings), versions={"torch": "2.13.0"})
    session = Session(settings, run, open_base(model), discard, stage="export")
    student = session.policy.model
    tiny.fill_adapter(student, scale=0.002)
    with run.publish("distill", 4, "d") as publication:
        save_adapter(student, publication.path / "adapter")
    session.drop_policy()
    mark = pipeline.stage_fingerprints(settings, session.base.fingerprint)["baseline"]
    with run.publish("baseline", 1, mark):
        pass
    with run.publish("evaluate", 5, "e") as publication:
        sets = session.prompts.split("test")
        for when, harmful in (("before", ANSWER), ("after", REFUSAL)):
            answers = {kind: [ANSWER] * len(sets.of(kind)) for kind in KINDS}
            answers["harmful"] = [harmful] * len(sets.harmful)
            if old:
                del answers["critical"], answers["twin"]
            (publication.path / f"answers-{when}.json").write_text(json.dumps(answers))
        card = {kind: Rate.of(0, 3).to_record() for kind in KINDS[: 3 if old else 5]} | {"kl_to_base": 0.01}
        publication.result = {"scorecard": {"before": card, "after": card}}
        if not old:
            rates = {kind: Rate.of(1, 3).to_record() for kind in KINDS[:3]}
            publication.result |= {"contexts": {"role": {"before": rates, "after": rates}}, "context_tokens": 7}
    return session


@pytest.fixture(scope="module")
def run_of_tiny(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]) -> Session:
    return finished_run(tmp_path_factory.mktemp("runs"), tiny_folder("qwen2"), {"model.precision": "fp32"})


def export(session: Session, out: Path, **request: Any) -> tuple[dict[str, Any], list[Event]]:
    events: list[Event] = []
    fresh = Session(session.config, session.run, session.base, events.append, stage="export")
    adapter = session.run.folder("distill", "adapter")
    write = lora.export_lora if request["kind"] == "lora-gguf" else export_files
    return write(fresh, adapter, out, Request(**request)), events


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_merged_weights_come_with_figures_card_modelfile_and_sums(run_of_tiny: Session, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record, events = export(run_of_tiny, out, kind="merged")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert names(out) == sorted(
        [
            *("Modelfile", "README.md", "SHA256SUMS", "artifacts.json", "chat_template.jinja", "config.json"),
            *("generation_config.json", "merge.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        ]
    )
    assert check_sums(out) == 10 and json.loads((out / "artifacts.json").read_text()) == record
    base, adapter, merged = record["artifacts"]
    assert (base["harmful"]["refused"], adapter["harmful"]["refused"], adapter["harmful"]["n"]) == (0, 4, 4)
    # The stored answers are planted, so the random model's own answers lose all of the planted safety.
    assert merged["harmful"]["refused"] == 0 and "4 of 4: 100 points lost" in merged["safety_lost"]
    told = [event.message for event in events if isinstance(event, Warned)]
    assert told == [f"merged lost safety: {merged['safety_lost']}."] and "--weights dequantised" in told[0]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert str(run_of_tiny.base.folder) not in card and "**merged lost safety**" in card
    assert "| role play | harmless | 1 of 3 (6 to 79 %) | 1 of 3 (6 to 79 %) |" in card
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_the_card_names_no_place_on_this_machine(run_of_tiny: Session, tmp_path: Path) -> None:
    where = tmp_path / "of-mine"
    own = run_of_tiny.config
    own = replace(
        own,
        evaluate=replace(own.evaluate, judge_model=str(where / "judge")),
        direction=replace(own.direction, source=str(where / "first.gguf")),
        model=replace(own.model, chat_template=str(where / "own.jinja")),
    )
    session = Session(own, run_of_tiny.run, run_of_tiny.base, discard, stage="export")
    export(session, tmp_path / "out", kind="merged", prompts=1)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "of-mine" not in card and "found on first, steers" in card
    assert all(name in card for name in ('judge_model = "judge"', 'source = "first"', '"own.jinja"'))


def test_fewer_prompts_and_another_strength_are_measured_as_asked(run_of_tiny: Session, tmp_path: Path) -> None:
    few, _ = export(run_of_tiny, tmp_path / "few", kind="merged", prompts=2)
    assert {row[name]["n"] for row in few["artifacts"][:2] for name in KINDS} == {2}
    half, events = export(run_of_tiny, tmp_path / "half", kind="merged", strength=0.5)
    assert half["strength"] == 0.5
    # At another strength the run's own answers say nothing: base, adapter and merged weights answer all 17 prompts.
    answered = [event.done for event in events if isinstance(event, Progress) and "answers" in event.what]
    assert max(answered) == 34 and half["artifacts"][1]["harmful"]["refused"] == 0
    # The run's rates in contexts are of its own strength.
    assert "| role play |" not in (tmp_path / "half" / "README.md").read_text(encoding="utf-8")


def test_a_run_of_the_first_versions_is_exported_with_what_it_was_asked(
    tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    old = finished_run(tmp_path / "runs", tiny_folder("qwen2"), {"model.precision": "fp32"}, old=True)
    record, _ = export(old, tmp_path / "out", kind="merged")
    assert [kinds_of(row) for row in record["artifacts"]] == [["harmful", "borderline", "harmless"]] * 3
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "critical refused" not in card and "| asked |" not in card
    assert artifacts_table(record).row_count == 3


def test_an_export_that_was_killed_goes_on_with_its_merged_weights(run_of_tiny: Session, tmp_path: Path) -> None:
    whole, _ = export(run_of_tiny, tmp_path / "whole", kind="merged")
    work, draft = tmp_path / "out.safesteer-draft" / "work", tmp_path / "out.safesteer-draft"
    adapter = run_of_tiny.run.stage_folder("distill") / "adapter"
    # As a kill leaves it while the merged weights are measured: they are whole, and nothing else is.
    merge_adapter(run_of_tiny.base.folder, adapter, work / "merged", words=run_of_tiny.base.folder)
    (work / "merged" / "SHA256SUMS").write_text("")
    (draft / "Modelfile").write_text("half")
    before = (work / "merged" / "model.safetensors").stat().st_ino
    record, _ = export(run_of_tiny, tmp_path / "out", kind="merged")
    assert (tmp_path / "out" / "model.safetensors").stat().st_ino == before and not draft.exists()
    assert names(tmp_path / "out") == names(tmp_path / "whole") and check_sums(tmp_path / "out") == 10
    figures = [[row[name] for row in found["artifacts"] for name in KINDS] for found in (record, whole)]
    assert figures[0] == figures[1]


@pytest.fixture
def no_extra_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "check_extra", lambda quants: None)
    monkeypatch.setattr(convert, "try_tokenizer", lambda folder: None)


def test_a_gguf_export_without_the_extra_is_refused_before_any_work(
    run_of_tiny: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match="not installed") as caught:
        export(run_of_tiny, tmp_path / "out", kind="gguf")
    assert 'pip install "safesteer-lite[gguf]"' in caught.value.hint and names(tmp_path) == []


@pytest.mark.usefixtures("no_extra_needed")
def test_a_file_that_lost_its_template_fails_the_export_and_is_kept_aside(
    run_of_tiny: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "write_gguf", lambda folder, target, *_: write_file(target, None))
    with pytest.raises(FailedCheck, match=r"failed 2 of its checks.*-Q8_0\.gguf has no chat template.*-F16") as caught:
        export(run_of_tiny, tmp_path / "out", kind="gguf", quants=("Q8_0", "F16"))
    kept = tmp_path / "out.failed-check"
    assert str(kept) in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed-check"]
    assert names(kept) == ["artifacts.json", "qwen2-safer-F16.gguf", "qwen2-safer-Q8_0.gguf"]
    assert len(json.loads((kept / "artifacts.json").read_text())["problems"]) == 2


@pytest.mark.usefixtures("no_extra_needed")
def test_the_adapter_alone_is_measured_on_the_base_and_written_beside_its_figures(
    run_of_tiny: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What llama.cpp makes of it is tested where there is a real tokenizer, which its converter wants."""
    agreement = Agreement(16, 15, 16, 0.01, 0.02, 0.055)

    def measured(session: Session, file: Path, name: str, known: Measured, limit: float, adapter: Path) -> Row:
        assert known.witness is not None and (name, limit) == (LORA, agreement.first_kl_limit)
        return Row(name, adapter.name, adapter.stat().st_size, known.rows[1].card, agreement)

    def of_the_base(folder: Path, target: Path, quant: str, *_: object) -> None:
        written, base = (load_file(place / "model.safetensors") for place in (folder, run_of_tiny.base.folder))
        assert quant == "F16" and all(torch.equal(written[name], base[name].bfloat16()) for name in base)

    monkeypatch.setattr(convert, "write_gguf", of_the_base)
    monkeypatch.setattr(convert, "convert_adapter", lambda adapter, base, target: target.write_bytes(b"lora"))
    monkeypatch.setattr(lora, "gguf_row", measured)
    record, _ = export(run_of_tiny, tmp_path / "out", kind="lora-gguf")
    assert names(tmp_path / "out") == ["README.md", "SHA256SUMS", "artifacts.json", "qwen2-safer-lora.gguf"]
    assert [row["artifact"] for row in record["artifacts"]] == ["base", "adapter", "LoRA"]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "The adapter alone is here" in card and "A scale below 0 would undo training" in card
    agreement = replace(agreement, first_kl=0.06)
    with pytest.raises(FailedCheck, match=r"LoRA: its first token differs .* by 0\.060 nats"):
        export(run_of_tiny, tmp_path / "other", kind="lora-gguf")
    assert names(tmp_path / "other.failed-check") == ["artifacts.json", "qwen2-safer-lora.gguf"]


@pytest.mark.usefixtures("no_extra_needed")
def test_a_converter_that_fails_leaves_nothing(
    run_of_tiny: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ExportError("llama.cpp's converter failed.")

    monkeypatch.setattr(convert, "write_gguf", fail)
    with pytest.raises(ExportError, match="converter failed"):
        export(run_of_tiny, tmp_path / "out", kind="gguf")
    assert names(tmp_path) == []


def test_the_table_has_a_row_each_and_marks_what_was_lost(run_of_tiny: Session, tmp_path: Path) -> None:
    record, _ = export(run_of_tiny, tmp_path / "out", kind="merged")
    table = artifacts_table(record)
    assert table.row_count == 3 and "merged lost safety" in str(table.caption)
    record["artifacts"][-1]["safety_lost"] = ""
    assert artifacts_table(record).caption is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda out: (out / "a.gguf").write_bytes(b"other"), "a.gguf has changed"),
        (lambda out: (out / "a.gguf").unlink(), "a.gguf is missing"),
        (lambda out: (out / "b.txt").write_text("new"), "b.txt is not listed"),
        (lambda out: (out / "SHA256SUMS").unlink(), "SHA256SUMS cannot be read"),
        (lambda out: shutil.rmtree(out), "SHA256SUMS cannot be read"),
    ],
)
def test_verify_names_what_is_wrong(
    tmp_path: Path, change: Callable[[Path], object], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from safesteer_lite.export.weights.verify import write_sums

    out = tmp_path / "out"
    out.mkdir()
    (out / "a.gguf").write_bytes(b"weights")
    write_sums(out)
    assert main(["verify", str(out)]) == 0 and capsys.readouterr().out == "1 files are whole.\n"
    assert main(["verify", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"event": "Verified", "files": 1}
    change(out)
    assert main(["verify", str(out)]) == 1 and told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--quant", "Q8_0"], "--quant is for GGUF files only"),
        (["--to", "lora-gguf", "--strength", "0.5"], "has its scale set where it is loaded"),
        (["--to", "gguf", "--measure", "-1"], "--measure -1 is negative"),
        (["--push", "a/b/c"], "not a name that the model hub allows"),
        (["--public"], "--public is for uploads only"),
    ],
)
def test_wrong_flags_have_one_message(
    run_of_tiny: Session, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run_of_tiny.run.path), *arguments]) == 2
    assert told in capsys.readouterr().err


def test_a_base_model_that_is_gone_is_told_with_the_way_out(
    run_of_tiny: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(run_of_tiny.run.path), "--out", str(tmp_path / "out")]
    assert main([*command, "--base", str(tmp_path / "gone")]) == 1
    told = capsys.readouterr().err
    assert "base model cannot be used" in told and "name its folder with --base" in told
    half = shutil.copytree(run_of_tiny.base.folder, tmp_path / "half")
    (half / "model.safetensors").unlink()
    assert main([*command, "--base", str(half)]) == 1 and "base model cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.real
@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs the extra [gguf]")
@pytest.mark.skipif("SAFESTEER_LITE_TEST_MODEL" not in os.environ, reason="needs a small model")
def test_a_real_model_from_run_to_q4_k_m_answering_in_llama_cpp(tmp_path: Path) -> None:
    model = Path(os.environ["SAFESTEER_LITE_TEST_MODEL"])
    changes = {"model.precision": "nf4", "evaluate.answer_tokens": 24, "prompts.test": 3, "prompts.borderline_test": 2}
    session = finished_run(tmp_path / "runs", model, changes)
    record, _ = export(session, tmp_path / "out", kind="gguf", quants=QUANTS)
    assert [row["artifact"] for row in record["artifacts"]] == ["base", "adapter", "merged", *QUANTS]
    wide, eight, six, five, four = (row["agreement"] for row in record["artifacts"][3:])
    assert all(found["first_kl"] < 0.5 for found in (wide, eight, six, five)) and four["first_kl"] < 1.0
    assert wide["same_first"] >= 12
    files = [tmp_path / "out" / row["file"] for row in record["artifacts"][3:]]
    assert [path.stat().st_size for path in files] == sorted((path.stat().st_size for path in files), reverse=True)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(files[-1]).tensors}
    assert {"Q4_K", "Q6_K", "F32"} <= kinds or {"Q5_0", "Q8_0", "F32"} <= kinds
    assert check_sums(tmp_path / "out") == 5 + 5 + 2
    record, _ = export(session, tmp_path / "lora", kind="lora-gguf")
    alone = record["artifacts"][-1]["agreement"]
    assert alone["first_kl"] < wide["first_kl"] + 0.01 and alone["same_first"] >= wide["same_first"] - 1
    assert RunFolder(session.run.path).verify("distill") == []

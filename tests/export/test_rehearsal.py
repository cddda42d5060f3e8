"""What could not be exported is named before anything is trained, all at once, and without a look at the weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safesteer_lite import config
from safesteer_lite.errors import DiskSpaceError, ExportError
from safesteer_lite.events import Event
from safesteer_lite.export.folder import file_name
from safesteer_lite.export.gguf import convert
from safesteer_lite.export.rehearsal import rehearse
from safesteer_lite.export.weights.base import Weights
from safesteer_lite.export.weights.shards import StoredTensor
from safesteer_lite.runs.creation import create_run
from safesteer_lite.shell.cli import main
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages import pipeline
from tests.export.test_export_files import SETTINGS

DAY = date(2026, 11, 26)
UP = "model.layers.2.mlp.up_proj"
Change = Callable[[Path], object]


def edit(name: str, **changes: object) -> Change:
    """Set keys of a JSON file."""

    def change(model: Path) -> None:
        path = model / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def tensors(change: Callable[[dict[str, Tensor]], object], **settings: Any) -> Change:
    """Change the stored tensors, and set keys of config.json."""

    def work(model: Path) -> None:
        whole = load_file(model / "model.safetensors")
        change(whole)
        save_file(whole, model / "model.safetensors", {"format": "pt"})
        edit("config.json", **settings)(model)

    return work


def as_16_bits(whole: dict[str, Tensor]) -> None:
    whole.update({name: value.bfloat16() for name, value in whole.items()})


def mixed(whole: dict[str, Tensor]) -> None:
    wide = whole[f"{UP}.weight"]
    as_16_bits(whole)
    whole[f"{UP}.weight"] = wide


def eight_bits(whole: dict[str, Tensor]) -> None:
    as_16_bits(whole)
    whole[f"{UP}.weight"] = whole[f"{UP}.weight"].to(torch.int8)
    whole[f"{UP}.SCB"] = torch.ones(128)


def float8(whole: dict[str, Tensor]) -> None:
    as_16_bits(whole)
    whole[f"{UP}.weight"] = whole[f"{UP}.weight"].to(torch.float8_e4m3fn)
    whole[f"{UP}.weight_scale"] = torch.ones(128)


def blocks_of_4_bits(whole: dict[str, Tensor]) -> None:
    as_16_bits(whole)
    del whole[f"{UP}.weight"]
    whole[f"{UP}_blocks"] = torch.zeros(128, 2, 16, dtype=torch.uint8)
    whole[f"{UP}_scales"] = torch.zeros(128, 2, dtype=torch.uint8)


def compiled(whole: dict[str, Tensor]) -> None:
    for name in list(whole):
        whole[f"_orig_mod.{name}"] = whole.pop(name)


def many_tokens(model: Path) -> None:
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    known = len(content["model"]["vocab"])
    content["added_tokens"] += [
        {**content["added_tokens"][0], "id": known + index, "content": f"<tool {index}>"} for index in range(9)
    ]
    path.write_text(json.dumps(content))


def sentencepiece_only(model: Path) -> None:
    (model / "tokenizer.json").rename(model / "tokenizer.model")


@pytest.fixture
def model(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Path:
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "model"))


@pytest.mark.parametrize(
    ("change", "weights"),
    [
        (lambda model: None, "original"),
        (lambda model: None, "dequantised"),
        (tensors(as_16_bits), "original"),
        (tensors(mixed), "original"),
        (tensors(as_16_bits, quantization_config=None), "original"),
        (edit("config.json", torch_dtype="float16"), "original"),
    ],
    ids=["32 bits", "32 bits, rounded", "16 bits", "mixed", "no quantisation named", "untrue type"],
)
def test_what_can_be_exported_passes_without_a_look_at_the_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, weights: Weights
) -> None:
    change(model)

    def read(*_: object) -> Tensor:
        raise AssertionError("weights were read")

    monkeypatch.setattr(StoredTensor, "load", read)
    monkeypatch.setattr(StoredTensor, "load_rows", read)
    rehearse(model, tmp_path / "out", weights, DAY)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (tensors(eight_bits, quantization_config={"load_in_8bit": True}), "reads only 16-bit and bitsandbytes 4-bit"),
        (tensors(eight_bits), f"{UP}.weight is stored as I8"),
        (tensors(float8, quantization_config={"quant_method": "fp8"}), "is quantised (fp8)"),
        (tensors(float8), f"{UP}.weight is stored as F8_E4M3"),
        (tensors(blocks_of_4_bits, quantization_config={"quant_method": "mxfp4"}), "is quantised (mxfp4)"),
        (tensors(blocks_of_4_bits), f"tensors are missing: {UP}.weight"),
        (tensors(compiled), "tensors are missing: lm_head.weight"),
        (tensors(lambda whole: whole.pop("lm_head.weight")), "tensors are missing: lm_head.weight"),
        (edit("config.json", hidden_size=48), "has shape"),
        (edit("config.json", num_attention_heads="many"), "does not describe a model that can be built"),
        (edit("config.json", architectures="Llama"), "names the architecture ''"),
        (many_tokens, "model.embed_tokens.weight has 320 rows for 321 tokens"),
        (sentencepiece_only, "tokenizer.json is missing"),
        (lambda model: (model / "chat_template.jinja").unlink(), "there is no chat template"),
        (lambda model: (model / "model.safetensors").unlink(), "holds no safetensors weights"),
    ],
)
def test_what_cannot_be_exported_is_named(model: Path, tmp_path: Path, change: Change, told: str) -> None:
    change(model)
    with pytest.raises(ExportError) as caught:
        rehearse(model, tmp_path / "out", "original", DAY)
    assert told in caught.value.message and caught.value.hint


def test_everything_is_named_at_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    tensors(float8, model_type="llama", num_local_experts=4)(model)
    many_tokens(model)
    with pytest.raises(ExportError, match="for 5 reasons: ") as caught:
        rehearse(model, tmp_path / "out", "original", DAY, quants=("Q4_K_M",))
    for part in ("F8_E4M3", "321 tokens", "0.00 GB free", "a mixture of experts", "packages that are not installed"):
        assert part in caught.value.message


def test_a_run_that_has_no_room_for_its_result_ends_before_its_first_stage(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config.build([("tests", {**SETTINGS, "model.name": str(model), "model.precision": "fp32"})])
    run = create_run(tmp_path / "runs", "tiny", config.to_toml(settings))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000_000))
    events: list[Event] = []
    with pytest.raises(DiskSpaceError, match="not enough room for what is exported"):
        pipeline.run(settings, run, open_base(model), events.append)
    assert events == [] and not run.manifest.stages
    # Started from the command line, it does not even get a folder.
    home = tmp_path / "home"
    assert main(["run", str(model), "--runs", str(home), "--set", "model.device=cpu", "--plain"]) == 1
    assert "not enough room for what is exported" in capsys.readouterr().err
    assert not home.exists() or not list(home.iterdir())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen2.5-0.5B-Instruct"),
        (".", "here"),
        ("..", "over"),
        ("./", "here"),
        ("/", "model"),
        ("-v --outfile x", "v-outfile-x"),
        ("a b\n\x1b[2J;c", "a-b-2J-c"),
        ("größer", "größer"),
        ("...", "model"),
    ],
)
def test_a_models_name_is_safe_in_files_and_commands(
    name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "over" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "over" / "here")
    assert file_name(name) == expected
    assert os.sep not in file_name(name)

"""What `export` refuses: one message that says what to do, and nothing left where the export would have been."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from safesteer_lite.export.weights.original import find_original
from safesteer_lite.export.weights.verify import check_sums
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.shell.cli import main
from safesteer_lite.stages import export
from tests.export.test_export_files import finished_run, names
from tests.export.weights.tiny_lora import load_4bit

Q_PROJ = "base_model.model.model.layers.2.self_attn.q_proj.lora_"


class Place(NamedTuple):
    """A run with its base model, both free to be damaged."""

    run: RunFolder
    model: Path
    out: Path


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]) -> Path:
    home = tmp_path_factory.mktemp("pristine")
    model = Path(shutil.copytree(tiny_folder("llama"), home / "model"))
    finished_run(home / "runs", model, {"model.precision": "fp32"})
    return home


@pytest.fixture
def place(pristine: Path, tmp_path: Path) -> Place:
    """The run's settings still name the folder in `pristine`; --base leads to this copy."""
    [run] = (pristine / "runs").iterdir()
    (tmp_path / "exports").mkdir()
    return Place(
        RunFolder(Path(shutil.copytree(run, tmp_path / "run"))),
        Path(shutil.copytree(pristine / "model", tmp_path / "model")),
        tmp_path / "exports" / "out",
    )


def refused(place: Place, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """Run an export that must fail with one message; returns it."""
    before = names(place.run.path)
    line = ["export", str(place.run.path), "--base", str(place.model), "--out", str(place.out), *more]
    assert main(line) == 1
    assert names(place.out.parent) == [] and [name for name in names(place.run.path) if name not in before] == []
    told = capsys.readouterr().err
    assert told.count("safesteer-lite:") == 1 and "Traceback" not in told
    return " ".join(told.split())


def cut(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def split(model: Path) -> None:
    """Two files by the index, of which one has not come yet."""
    whole = load_file(model / "model.safetensors")
    parts = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(whole)}
    (model / "model.safetensors").unlink()
    first = {name: value for name, value in whole.items() if parts[name].startswith("model-00001")}
    save_file(first, model / "model-00001-of-00002.safetensors", {"format": "pt"})
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))


def revise(model: Path) -> None:
    whole = load_file(model / "model.safetensors")
    whole["model.norm.weight"] = whole["model.norm.weight"] * 1.5
    save_file(whole, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (shutil.rmtree, "base model cannot be used"),
        (lambda model: (model / "model.safetensors").unlink(), "lacks weights"),
        (lambda model: (model / "config.json").unlink(), "has no config.json"),
        (lambda model: (model / "tokenizer.json").unlink(), "has no tokenizer"),
        (cut, "base model cannot be used"),
        (split, "lacks weights: model-00002-of-00002.safetensors"),
        (revise, "is not the base model that this run was made with"),
    ],
    ids=["gone", "no weights", "no config", "no tokenizer", "cut", "half-downloaded", "another revision"],
)
@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_a_base_that_is_not_what_it_was(
    place: Place, capsys: pytest.CaptureFixture[str], change: Callable[[Path], object], told: str, kind: str
) -> None:
    change(place.model)
    assert told in refused(place, capsys, "--to", kind)


def test_a_base_that_was_renamed_is_used_where_it_is_now(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    moved = place.model.rename(place.model.with_name("renamed"))
    assert main(["export", str(place.run.path), "--base", str(moved), "--out", str(place.out)]) == 0
    assert check_sums(place.out) == 10
    [export] = json.loads((place.run.path / "artifacts.json").read_text())["exports"]
    assert [row["artifact"] for row in export["artifacts"]] == ["base", "adapter", "merged"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({Q_PROJ + "magnitude": torch.zeros(4)}, f"holds {Q_PROJ}magnitude, which cannot be merged"),
        ({"base_model.model.lm_head.strange": torch.zeros(4)}, "lm_head.strange, which cannot be merged"),
        (
            {Q_PROJ + "B.weight": torch.zeros(32, 4)},
            "q_proj.weight has shape (64, 64), and the adapter's update has (32",
        ),
        ({Q_PROJ + "A.weight": torch.zeros(2, 64)}, "do not fit its rank 4"),
        ({Q_PROJ + "B.weight": torch.full((64, 4), torch.nan)}, "NaN or infinite values"),
        ({Q_PROJ + "B.weight": None}, "lacks lora_B"),
    ],
    ids=["unknown part", "unknown key", "wrong outputs", "wrong rank", "NaN", "half a pair"],
)
def test_an_adapter_that_cannot_be_merged(
    place: Place, capsys: pytest.CaptureFixture[str], change: dict[str, torch.Tensor | None], told: str
) -> None:
    source = place.run.stage_folder("distill") / "adapter"
    tensors = {**load_file(source / "adapter_model.safetensors"), **change}
    # Published by the run itself, so that its sums are right and only the adapter is wrong.
    with place.run.publish("distill", 4, "d") as publication:
        shutil.copytree(source, publication.path / "adapter")
        kept = {name: value for name, value in tensors.items() if value is not None}
        save_file(kept, publication.path / "adapter" / "adapter_model.safetensors")
    assert told in refused(place, capsys)


def test_an_adapter_that_changed_on_the_disk(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    path = place.run.stage_folder("distill") / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "adapter_model.safetensors is missing or not what the run wrote there" in refused(place, capsys)


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_a_disk_that_runs_full(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(shutil, "copytree", full)
    assert "disk ran full" in refused(place, capsys, "--to", kind)


def test_a_disk_that_is_too_small_is_found_before_any_work(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "0.00 GB free" in refused(place, capsys)
    assert "answers" not in capsys.readouterr().out


def test_a_place_that_cannot_be_written(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.out.parent.parent / "file").write_text("")
    below = place._replace(out=place.out.parent.parent / "file" / "out")
    line = ["export", str(below.run.path), "--base", str(below.model), "--out", str(below.out)]
    assert main(line) == 1 and "could not be written" in capsys.readouterr().err


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]) -> Path:
    """A run on a 4-bit folder, whose 16-bit original is not named anywhere."""
    home = tmp_path_factory.mktemp("packed")
    model = Path(shutil.copytree(tiny_folder("llama"), home / "Tiny-Instruct-bnb-4bit"))
    (model / "model.safetensors").unlink()
    load_4bit(tiny_folder("llama")).save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    config.pop("_name_or_path", None)
    (model / "config.json").write_text(json.dumps(config))
    finished_run(home / "runs", model, {"model.precision": "nf4"})
    return home


def test_a_4_bit_base_is_merged_into_what_was_trained_or_into_its_original(
    packed: Path,
    tmp_path: Path,
    tiny_folder: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(export.KL_LIMITS, "original", 5.0)  # Random weights suffer more from 4 bits than real ones.
    [run] = (packed / "runs").iterdir()
    line = ["export", str(run), "--measure", "1"]
    assert find_original(packed / "Tiny-Instruct-bnb-4bit", "") is None
    assert main([*line, "--weights", "original", "--out", str(tmp_path / "none")]) == 1
    told = capsys.readouterr().err
    assert "holds 4-bit weights only" in told and "--weights dequantised" in told and "--original FOLDER" in told
    assert main([*line, "--out", str(tmp_path / "packed")]) == 0
    assert "Merging into the dequantised weights, which are what was trained." in capsys.readouterr().out
    assert main([*line, "--original", str(tiny_folder("llama")), "--out", str(tmp_path / "wide")]) == 0
    records = [json.loads((tmp_path / name / "artifacts.json").read_text()) for name in ("packed", "wide")]
    assert [record["weights"] for record in records] == ["dequantised", "original"]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "wide"))
    key = "model.layers.0.mlp.up_proj.weight"
    assert one.keys() == other.keys() and not torch.equal(one[key], other[key])
    assert main([*line, "--original", str(packed / "nowhere"), "--out", str(tmp_path / "none")]) == 1
    assert names(tmp_path / "none") == []

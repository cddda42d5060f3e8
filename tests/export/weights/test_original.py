"""4-bit bases: their 16-bit original is found by what names it, checked, and used; else the way out is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safesteer_lite.errors import ExportError
from safesteer_lite.export.weights.merge import merge_adapter
from safesteer_lite.export.weights.original import check_same_model, describe_original, find_original, ways_out
from tests.export.weights.tiny_lora import assert_equal, load_4bit, peft_merge, save_base, stored


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture
def packed(tmp_path: Path, base: Path) -> Path:
    """The base in 4 bits, in a folder called as such repositories are, with a tokenizer of its own."""
    folder = tmp_path / "Tiny-Instruct-bnb-4bit"
    load_4bit(base).save_pretrained(folder)
    edit(folder, _name_or_path=None)
    (folder / "tokenizer.json").write_text("other")
    return folder


@pytest.mark.parametrize(
    ("named", "run_name", "found"),
    [
        ("owner/Model", "owner/Model-bnb-4bit", "owner/Model"),
        ("unsloth/Qwen2.5-7B-Instruct-bnb-4bit", "unsloth/Qwen2.5-7B-Instruct-bnb-4bit", "Qwen/Qwen2.5-7B-Instruct"),
        (None, "unsloth/Llama-3.2-3B-Instruct-unsloth-bnb-4bit", "meta-llama/Llama-3.2-3B-Instruct"),
        (None, "unsloth/llama-3-8b-Instruct-bnb-4bit", "meta-llama/Meta-Llama-3-8B-Instruct"),
        (None, "someone/Other-1B-Instruct-bnb-4bit", "someone/Other-1B-Instruct"),
        (None, "someone/Other-1B-Instruct-NF4", "someone/Other-1B-Instruct"),
        ("owner/Model-4bit", "my-quantised-model", "owner/Model"),
        (None, "my-quantised-model", None),
    ],
)
def test_the_original_is_found_by_its_name(packed: Path, named: str | None, run_name: str, found: str | None) -> None:
    edit(packed, _name_or_path=named)
    original = find_original(packed, run_name)
    assert (original.name if original else None) == found
    if original:
        # 2 bytes for each of the 96 x 64 embeddings and of what the two blocks hold, as the 16-bit folder has them.
        weights = sum(value.numel() for value in stored(packed.parent / "base").values())
        assert (original.size, original.folder) == (2 * weights, None)
        assert f"the 16-bit original is {found}, which would be a download" in describe_original(packed, run_name)
        assert f"--original {found} to fetch" in ways_out(packed, run_name)
    else:
        assert "nothing in it names" in describe_original(packed, run_name)
        assert "--weights dequantised" in ways_out(packed, run_name) and "--original FOLDER" in ways_out(
            packed, run_name
        )


def test_a_neighbouring_folder_is_found_and_a_missing_one_is_no_name_on_the_hub(packed: Path, base: Path) -> None:
    assert find_original(packed, str(packed)) is None
    neighbour = Path(shutil.copytree(base, packed.with_name("Tiny-Instruct")))
    found = find_original(packed, str(packed))
    assert found and (found.name, found.folder) == (str(neighbour), neighbour)
    assert "is on this machine" in describe_original(packed, str(packed))


def test_merging_into_the_original_is_as_if_it_had_been_the_base(
    tmp_path: Path, packed: Path, base: Path, adapter: Path
) -> None:
    check_same_model(packed, base)
    merge_adapter(base, adapter, tmp_path / "out", words=packed)
    exact = {name: value.bfloat16() for name, value in peft_merge(base, adapter, torch.float32).items()}
    assert_equal(stored(tmp_path / "out"), exact, tied=True)
    # The model was trained with the words of its 4-bit folder, so it keeps them.
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "other"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": 32}, "hidden_size is 32 instead of 64"),
        ({"vocab_size": 100, "num_hidden_layers": 3}, "num_hidden_layers is 3 instead of 2, vocab_size is 100 instead"),
        ({"quantization_config": {"quant_method": "gptq"}}, "holds quantised weights too"),
    ],
)
def test_another_model_is_not_taken_for_the_original(
    packed: Path, base: Path, changes: dict[str, Any], told: str
) -> None:
    edit(base, **changes)
    with pytest.raises(ExportError, match=told) as caught:
        check_same_model(packed, base)
    assert "--weights dequantised" in caught.value.hint


def test_a_fine_tune_of_the_same_shape_is_told_apart_by_its_norm(tmp_path: Path, packed: Path) -> None:
    other = save_base(tmp_path / "other", "qwen2-tied", torch.bfloat16)
    check_same_model(packed, other)
    [file] = [path for path in other.glob("*.safetensors") if "model.norm.weight" in load_file(path)]
    tensors = load_file(file)
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] * 1.1}, file, {"format": "pt"})
    with pytest.raises(ExportError, match="its last norm differs"):
        check_same_model(packed, other)

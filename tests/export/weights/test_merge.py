"""The streamed merge against peft's own, and what must never be left on a disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safesteer_lite.errors import ExportError
from safesteer_lite.export.weights import base as base_weights
from safesteer_lite.export.weights import shards
from safesteer_lite.export.weights.base import Weights
from safesteer_lite.export.weights.merge import COPIED, MergeResult, check_adapter, is_ours, merge_adapter
from tests.export.weights.tiny_lora import (
    CONFIGS,
    assert_equal,
    load,
    peft_merge,
    save_adapter,
    save_base,
    stored,
)


@pytest.mark.parametrize("kind", CONFIGS)
def test_merge_equals_peft_bit_for_bit(tmp_path: Path, kind: str) -> None:
    base = save_base(tmp_path / "base", kind, torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base)
    seen: list[tuple[int, int]] = []
    result = merge_adapter(
        base, adapter, tmp_path / "out", dtype=torch.float32, progress=lambda *pair: seen.append(pair)
    )
    assert len(result.files) == len(list(base.glob("*.safetensors"))) > 1
    assert_equal(stored(tmp_path / "out"), peft_merge(base, adapter, torch.float32), kind.endswith("tied"))
    assert (result.merged, result.tensors) == (2 * (4 if kind == "phi3" else 7), len(stored(base)))
    assert seen[-1] == (result.size, result.size) and len(seen) == result.tensors
    assert seen == sorted(seen)


@pytest.mark.parametrize("weights", ["original", "dequantised"])
def test_blocks_of_rows_make_no_difference(
    tmp_path: Path, base: Path, adapter: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_adapter(base, adapter, tmp_path / "whole", weights=weights)
    # 7 rows of 64 at a time: no matrix has a multiple of that.
    monkeypatch.setattr(base_weights, "BLOCK_VALUES", 7 * 64)
    merge_adapter(base, adapter, tmp_path / "blocks", weights=weights)
    assert_equal(stored(tmp_path / "blocks"), stored(tmp_path / "whole"), tied=False)


@pytest.mark.parametrize("entry", [None, {}])
def test_an_entry_that_names_no_quantisation_quantises_nothing(
    tmp_path: Path, base: Path, adapter: Path, entry: object
) -> None:
    merge_adapter(base, adapter, tmp_path / "plain")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
    check_adapter(base, adapter)
    merge_adapter(base, adapter, tmp_path / "out")
    assert_equal(stored(tmp_path / "out"), stored(tmp_path / "plain"), tied=False)
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "plain" / "config.json").read_bytes()


@pytest.mark.parametrize("kind", CONFIGS)
def test_bfloat16_merge_is_the_exact_sum_rounded_once(tmp_path: Path, kind: str) -> None:
    base = save_base(tmp_path / "base", kind, torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base)
    result = merge_adapter(base, adapter, tmp_path / "out")
    ours = stored(tmp_path / "out")
    exact = peft_merge(base, adapter, torch.float32)
    assert result.dtype == torch.bfloat16
    assert all(torch.equal(value, exact[name].bfloat16()) for name, value in ours.items())
    # peft may round the update before it adds it, which can cost it one unit in the last place of the larger operand.
    before, theirs = stored(base), peft_merge(base, adapter, torch.bfloat16)
    for name, value in ours.items():
        largest = torch.maximum(before[name].abs(), (value - before[name]).abs()).maximum(value.abs()).float()
        unit = torch.exp2(torch.floor(torch.log2(largest.clamp_min(1e-30))) - 7)
        assert bool(((value.float() - theirs[name].float()).abs() <= unit).all()), name


def test_strength_scales_the_update(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen3-tied", torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base)
    merge_adapter(base, adapter, tmp_path / "out", strength=0.5, dtype=torch.float32)
    assert_equal(stored(tmp_path / "out"), peft_merge(base, adapter, torch.float32, strength=0.5), tied=True)


def test_strength_zero_is_the_base_byte_for_byte(tmp_path: Path, base: Path, adapter: Path) -> None:
    result = merge_adapter(base, adapter, tmp_path / "out", strength=0.0)
    before, after = shards.read_checkpoint(base), shards.read_checkpoint(tmp_path / "out")
    assert result.files == tuple(sorted(path.name for path in base.glob("*.safetensors")))
    assert [[tensor.name for tensor in shard] for shard in after.shards] == [
        [tensor.name for tensor in shard] for shard in before.shards
    ]
    for name, tensor in before.tensors.items():
        assert b"".join(after.tensors[name].chunks()) == b"".join(tensor.chunks()), name


def test_exact_files_and_a_truthful_configuration(tmp_path: Path, base: Path, adapter: Path) -> None:
    (base / "training_args.bin").write_bytes(b"private")
    result = merge_adapter(base, adapter, tmp_path / "out", dtype=torch.float16)
    copied = {name for name in COPIED if (base / name).exists()}
    assert copied >= {"tokenizer.json", "chat_template.jinja", "generation_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *copied,
        *result.files,
        "config.json",
        "merge.json",
        "model.safetensors.index.json",
    }
    assert all((tmp_path / "out" / name).read_bytes() == (base / name).read_bytes() for name in copied)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert after == {**before, "dtype": "float16"}
    assert {value.dtype for value in stored(tmp_path / "out").values()} == {torch.float16}
    model, info = load(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_wide_base_becomes_16_bit_unless_told_otherwise(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base)
    merge_adapter(base, adapter, tmp_path / "out")
    theirs = peft_merge(base, adapter, torch.float32)
    assert_equal(stored(tmp_path / "out"), {name: value.bfloat16() for name, value in theirs.items()}, tied=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_are_divided_at_the_limit(tmp_path: Path, adapter: Path, base: Path) -> None:
    result = merge_adapter(base, adapter, tmp_path / "out", max_shard_bytes=20_000)
    written = shards.read_checkpoint(tmp_path / "out").shards
    assert len(result.files) == len(written) > len(list(base.glob("*.safetensors")))
    assert all(sum(tensor.size for tensor in shard) <= 20_000 for shard in written)
    assert stored(tmp_path / "out").keys() == stored(base).keys()


def test_a_value_beyond_float16_is_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    with pytest.raises(ExportError, match=r"float16 cannot express"):
        merge_adapter(base, adapter, tmp_path / "out", strength=1e7, dtype=torch.float16)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.safesteer-draft").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_nothing_is_left_of_an_interrupted_merge(
    tmp_path: Path, base: Path, adapter: Path, error: type[BaseException]
) -> None:
    before = {path.name for path in tmp_path.iterdir()}

    def stop(done: int, total: int) -> None:
        assert (tmp_path / "out.safesteer-draft").is_dir() and not (tmp_path / "out").exists()
        if done > total / 2:
            raise error

    with pytest.raises(ExportError if error is OSError else error):
        merge_adapter(base, adapter, tmp_path / "out", progress=stop)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_what_a_killed_merge_left_is_cleared_and_nothing_else(tmp_path: Path, base: Path, adapter: Path) -> None:
    leftover = tmp_path / "out.safesteer-draft"
    leftover.mkdir()
    (leftover / "model-00001-of-00009.safetensors").write_bytes(b"half")
    merge_adapter(base, adapter, tmp_path / "out")
    assert not leftover.exists() and not (tmp_path / "out" / "model-00001-of-00009.safetensors").exists()
    foreign = tmp_path / "second.safesteer-draft"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match="in the way"):
        merge_adapter(base, adapter, tmp_path / "second")
    assert (foreign / "thesis.txt").read_text() == "years of work"


def test_an_existing_folder_is_never_overwritten(tmp_path: Path, base: Path, adapter: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="exists already"):
        merge_adapter(base, adapter, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_parent_that_cannot_be_written_is_one_clear_error(tmp_path: Path, base: Path, adapter: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="could not be written"):
        merge_adapter(base, adapter, tmp_path / "file" / "out")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_parent_is_one_clear_error(tmp_path: Path, base: Path, adapter: Path) -> None:
    parent = tmp_path / "locked"
    parent.mkdir(mode=0o555)
    with pytest.raises(ExportError, match="could not be written"):
        merge_adapter(base, adapter, parent / "out")


def test_the_written_type_has_a_merge_result(tmp_path: Path, base: Path, adapter: Path) -> None:
    result = merge_adapter(base, adapter, tmp_path / "out", strength=0.75)
    size = sum(value.numel() * 2 for value in stored(base).values())
    assert result == MergeResult(
        tmp_path / "out", result.files, len(stored(base)), 14, size, torch.bfloat16, 0.75, "original"
    )


def test_a_matrix_that_is_wider_than_the_others_is_rounded_like_them_and_a_norm_is_not(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2", torch.bfloat16, max_shard_size="1GB")
    whole = load_file(base / "model.safetensors")
    matrix, norm = "model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"
    whole |= {matrix: whole[matrix].float() + 2**-20, norm: whole[norm].float() + 2**-20}
    save_file(whole, base / "model.safetensors", {"format": "pt"})
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    merge_adapter(base, adapter, tmp_path / "out")
    merged = stored(tmp_path / "out")
    assert torch.equal(merged[matrix], whole[matrix].bfloat16()) and torch.equal(merged[norm], whole[norm])


def test_named_templates_come_along_and_count_as_the_models_words(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2", torch.bfloat16)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (base / "additional_chat_templates" / "notes.txt").write_text("not a template")
    merge_adapter(base, save_adapter(tmp_path / "adapter", base), tmp_path / "out")
    [copied] = (tmp_path / "out" / "additional_chat_templates").iterdir()
    assert copied.name == "tool_use.jinja" and copied.read_text() == "{{ tools }}"
    assert is_ours("additional_chat_templates")

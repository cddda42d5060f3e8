"""Base models in 4 bits, or to be rounded to them: the values are those that transformers and bitsandbytes hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from safesteer_lite.errors import ExportError
from safesteer_lite.export.weights.base import quantised_weights, round_to_nf4
from safesteer_lite.export.weights.merge import merge_adapter
from tests.export.weights.tiny_lora import (
    CONFIGS,
    assert_equal,
    load,
    load_4bit,
    peft_merge,
    save_adapter,
    save_base,
    stored,
)


def dequantised(model: Any) -> dict[str, Tensor]:
    """What a loaded 4-bit model holds, before its first forward, which may repack it."""
    import bitsandbytes as bnb

    return {
        f"{name}.weight": bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_nf4_rounding_is_what_transformers_loads(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    base = save_base(tmp_path / "base", kind, dtype)
    loaded, before = dequantised(load_4bit(base)), stored(base)
    config = json.loads((base / "config.json").read_text())
    assert quantised_weights(config) == loaded.keys() and len(loaded) == 2 * (4 if kind == "phi3" else 7)
    for name, value in loaded.items():
        rounded = round_to_nf4(before[name])
        assert torch.equal(rounded, value) and not torch.equal(rounded, before[name].bfloat16()), name


@pytest.mark.parametrize("saved", [False, True], ids=["16-bit base", "4-bit base"])
def test_merge_into_dequantised_weights(tmp_path: Path, saved: bool) -> None:
    base = save_base(tmp_path / "base", "qwen2", torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base)
    model = load_4bit(base)
    values = {**{name: value for name, value in stored(base).items()}, **dequantised(model)}
    if saved:
        model.save_pretrained(tmp_path / "packed", max_shard_size="30KB")
        assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
        shutil.copy(base / "tokenizer.json", tmp_path / "packed")
        base = tmp_path / "packed"
    save_file(values, tmp_path / "plain.safetensors", {"format": "pt"})
    plain = tmp_path / "plain"
    plain.mkdir()
    (tmp_path / "plain.safetensors").rename(plain / "model.safetensors")
    CONFIGS["qwen2"].save_pretrained(plain)
    merge_adapter(base, adapter, tmp_path / "out", weights="dequantised")
    exact = peft_merge(plain, adapter, torch.float32)
    assert_equal(stored(tmp_path / "out"), {name: value.bfloat16() for name, value in exact.items()}, tied=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and not any("quant" in key for key in config)
    assert type(load(tmp_path / "out").model.layers[0].mlp.up_proj) is nn.Linear


def test_a_4bit_base_has_no_original_weights(tmp_path: Path, adapter: Path, base: Path) -> None:
    load_4bit(base).save_pretrained(tmp_path / "packed")
    with pytest.raises(ExportError, match=r"4-bit.*dequantised"):
        merge_adapter(tmp_path / "packed", adapter, tmp_path / "out")


def test_other_quantisations_are_refused(tmp_path: Path, adapter: Path, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ExportError, match="gptq"):
        merge_adapter(base, adapter, tmp_path / "out")

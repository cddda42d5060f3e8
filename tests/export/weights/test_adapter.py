"""Adapters: every scale is peft's, and what is more than LoRA, damaged or foreign is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safesteer_lite.errors import ExportError
from safesteer_lite.export.weights.merge import merge_adapter
from tests.export.weights.tiny_lora import peft_merge, save_adapter, save_base, stored

LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"lora_alpha": 6, "r": 5},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8}, "alpha_pattern": {r".*\.v_proj": 2, "proj": 4}},
        {"layers_to_transform": [1], "target_modules": ["q_proj"]},
        {"init_lora_weights": "gaussian"},
    ],
)
def test_every_scale_is_pefts_scale(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = save_base(tmp_path / "base", "llama", torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base, **settings)
    merge_adapter(base, adapter, tmp_path / "out", dtype=torch.float32)
    ours, theirs = stored(tmp_path / "out"), peft_merge(base, adapter, torch.float32)
    # A scale that is no power of two rounds once more in peft than here.
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=3e-7, atol=3e-8)
    assert any(not torch.equal(value, stored(base)[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("peft_type", "LOHA"),
    ],
)
def test_adapters_that_are_more_than_lora_are_refused(
    tmp_path: Path, base: Path, adapter: Path, setting: str, value: object
) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: value}))
    with pytest.raises(ExportError, match=str(value) if setting == "peft_type" else setting):
        merge_adapter(base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({LAYER + "A.weight": None}, "lacks lora_A"),
        ({LAYER + "B.weight": torch.full((64, 4), float("nan"))}, "NaN"),
        ({LAYER + "B.weight": torch.full((64, 4), float("inf"))}, "infinite"),
        ({LAYER + "B.weight": torch.zeros(32, 4)}, "shape"),
        ({LAYER + "A.weight": torch.zeros(2, 64)}, "rank 4"),
        ({LAYER + "magnitude": torch.zeros(4)}, "magnitude"),
        (
            {
                LAYER.replace("layers.0", "layers.7") + "A.weight": torch.zeros(4, 64),
                LAYER.replace("layers.0", "layers.7") + "B.weight": torch.zeros(64, 4),
            },
            r"layers\.7\.self_attn\.q_proj\.weight, which the base model does not hold",
        ),
        (
            {
                "base_model.model.model.embed_tokens.lora_A.weight": torch.zeros(4, 64),
                "base_model.model.model.embed_tokens.lora_B.weight": torch.zeros(96, 4),
            },
            "shares between input and output",
        ),
    ],
)
def test_damaged_or_foreign_adapters_are_refused(
    tmp_path: Path, base: Path, adapter: Path, change: dict[str, Tensor | None], message: str
) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = {**load_file(file), **change}
    save_file({name: value for name, value in tensors.items() if value is not None}, file)
    with pytest.raises(ExportError, match=message):
        merge_adapter(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.safesteer-draft").exists()

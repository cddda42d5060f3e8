"""Every fault of a model's folder is refused with advice, and every usable folder is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safesteer_lite.errors import ModelError
from safesteer_lite.events import discard
from safesteer_lite.sources.folder import check_architecture, check_folder
from safesteer_lite.sources.resolve import resolve_model
from tests.sources.tiny_gguf import TEMPLATE


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_a_shard(folder: Path) -> None:
    weights = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))


def break_off(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (break_off, r"model\.safetensors is damaged.*download the model again"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "is damaged"),
        (only_pickles, "Convert them to safetensors"),
        (lose_a_shard, r"lacks weights: model-00002\.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "lacks weights"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template.*instruct"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    ],
)
def test_unusable_folder_is_refused_with_advice(model_folder: Path, spoil: Callable[[Path], Any], said: str) -> None:
    spoil(model_folder)
    with pytest.raises(ModelError, match=said):
        resolve_model(str(model_folder), None, discard)


def test_chat_template_in_the_tokenizer_settings_counts(model_folder: Path) -> None:
    (model_folder / "chat_template.jinja").unlink()
    (model_folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    check_folder(model_folder)


def test_architecture(model_folder: Path) -> None:
    for name in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"):
        (model_folder / "config.json").write_text(json.dumps({"architectures": [name]}))
        check_architecture(model_folder)
    (model_folder / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"]}))
    with pytest.raises(ModelError, match=r"MambaForCausalLM.*Supported are LlamaForCausalLM, Qwen2ForCausalLM"):
        check_architecture(model_folder)
    own_code = {"architectures": ["OddForCausalLM"], "auto_map": {"AutoModelForCausalLM": "odd.OddForCausalLM"}}
    (model_folder / "config.json").write_text(json.dumps(own_code))
    with pytest.raises(ModelError, match="never run"):
        check_architecture(model_folder)

"""A model's shape: parameters counted against real tiny models."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from safesteer_lite.errors import ModelError
from safesteer_lite.hardware.shape import (
    ModelShape,
    adapter_parameters,
    linear_parameters,
    parameters,
    shape_from_config,
)
from tests.hardware.examples import LARGE, LORA, SMALL, tiny


def shape_of(family: str, **options: Any) -> tuple[ModelShape, Any]:
    config, model = tiny(family, **options)
    return shape_from_config(config), model


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {}),
        ("qwen2", {"tie_word_embeddings": True, "head_dim": None}),
        ("qwen2", {"tie_word_embeddings": False, "head_dim": None}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True}),
        ("gemma", {}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("phi3", {"head_dim": None}),
        ("smollm3", {"head_dim": None}),
        ("granite", {"head_dim": None}),
    ],
)
def test_parameters_are_exact(family: str, options: dict[str, Any]) -> None:
    shape, model = shape_of(family, **options)
    assert parameters(shape) == sum(parameter.numel() for parameter in model.parameters())
    linear = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    assert linear_parameters(shape) == sum(module.weight.numel() for module in linear)


def test_published_sizes() -> None:
    assert parameters(SMALL) == 494_032_768
    assert parameters(LARGE) == 8_030_261_248


def test_shape_reads_dtype_under_both_names_and_the_text_part_of_an_image_model() -> None:
    config, _ = tiny("llama")
    config.pop("dtype", None)
    assert shape_from_config({**config, "torch_dtype": "bfloat16"}).dtype == "bfloat16"
    assert shape_from_config({**config, "dtype": "float16"}).dtype == "float16"
    nested = shape_from_config({"model_type": "seer", "dtype": "float16", "text_config": config})
    assert nested == shape_from_config({**config, "dtype": "float16"})


@pytest.mark.parametrize("value", [None, 0, "64", 1.5, True])
def test_shape_names_every_missing_size(value: object) -> None:
    config, _ = tiny("llama")
    del config["vocab_size"]
    with pytest.raises(ModelError) as error:
        shape_from_config({**config, "hidden_size": value})
    assert "hidden_size, vocab_size" in error.value.message
    assert error.value.hint


def test_mixture_of_experts_is_refused() -> None:
    config, _ = tiny("llama")
    with pytest.raises(ModelError, match="mixture of experts"):
        shape_from_config({**config, "num_local_experts": 8})


def test_adapter_parameters_equal_pefts() -> None:
    from peft import LoraConfig, get_peft_model

    shape, model = shape_of("llama")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=LORA))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert adapter_parameters(shape, 4) == trained

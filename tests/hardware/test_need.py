"""A model's need: bytes counted against real tiny models' tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safesteer_lite.hardware import need
from safesteer_lite.hardware.need import (
    activation_bytes,
    cache_bytes,
    largest_micro_batch,
    layer_activation_bytes,
    training_bytes,
    weights_bytes,
)
from safesteer_lite.hardware.shape import ModelShape, shape_from_config
from tests.hardware.examples import GB, LARGE, LORA, SIZES


def stored_bytes(model: nn.Module) -> int:
    """Bytes of every parameter, with the statistics of 4-bit ones."""
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += sum(value.nbytes for value in state.as_dict(packed=True).values() if isinstance(value, Tensor))
    return total


def test_weights_equal_a_loaded_models_tensors(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    sizes = {**SIZES, "hidden_size": 512, "intermediate_size": 1344, "head_dim": 128, "vocab_size": 1000}
    LlamaForCausalLM(LlamaConfig(**{**sizes, "num_hidden_layers": 2})).bfloat16().save_pretrained(tmp_path)
    shape = shape_from_config(json.loads((tmp_path / "config.json").read_text()))
    packing = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    for precision, dtype, options in (
        ("nf4", torch.bfloat16, {"quantization_config": packing}),
        ("bf16", torch.bfloat16, {}),
        ("fp32", torch.float32, {}),
    ):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map={"": "cpu"}, **options)
        counted = weights_bytes(shape, precision, unpacked=False)  # type: ignore[arg-type]
        assert counted == pytest.approx(stored_bytes(model), rel=0.02 if precision == "nf4" else 0)
    assert weights_bytes(shape, "nf4", unpacked=True) == weights_bytes(shape, "bf16", unpacked=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "intermediate"), [(8, 2, 384), (4, 4, 200)])
def test_activations_equal_what_autograd_keeps(
    dtype: torch.dtype, heads: int, kv_heads: int, intermediate: int
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=intermediate,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    model = Qwen2ForCausalLM(config).to(dtype)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=LORA), autocast_adapter_dtype=False)
    weights = {parameter.untyped_storage().data_ptr() for parameter in adapted.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, 64, (3, 40))
    mask = torch.ones_like(ids)
    mask[0, :5] = (
        0  # Prompts differ in length, and a padded batch keeps more: keys and values are expanded to all heads.
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    real = sum(tensor.untyped_storage().nbytes() for start, tensor in kept.items() if start not in weights)
    shape = shape_from_config(config.to_dict())
    element = dtype.itemsize
    # The final norm is outside the blocks.
    counted = activation_bytes(shape, 120, 8, element, checkpointing=False) + 120 * 128 * 4
    assert counted == pytest.approx(real, rel=0.03)
    checkpointed = activation_bytes(shape, 120, 8, element, checkpointing=True)
    assert checkpointed == 4 * 120 * 128 * element + layer_activation_bytes(shape, 120, 8, element)


def test_cache_equals_a_real_one() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES)
    output = LlamaForCausalLM(config)(input_ids=torch.ones(2, 7, dtype=torch.long), use_cache=True)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    shape = shape_from_config(config.to_dict())
    assert cache_bytes(shape, 2, 7, 4) * shape.layers == real * (shape.layers + 1)


def estimate(shape: ModelShape, **changes: object) -> need.Need:
    work: dict[str, Any] = {
        "precision": "nf4",
        "unpacked": False,
        "rank": 16,
        "rollouts": 8,
        "prompt_tokens": 64,
        "completion_tokens": 64,
        "micro_batch": 2,
        "chunk": 32,
    }
    return need.estimate(shape, **{**work, **changes})


@pytest.mark.parametrize(
    ("setting", "stage"),
    [
        ("rollouts", "baseline"),
        ("rollouts", "direction"),
        ("chunk", "tokens"),
        ("micro_batch", "distill"),
        ("rank", "distill"),
        ("completion_tokens", "evaluate"),
        ("prompt_tokens", "direction"),
    ],
)
def test_more_work_needs_more_memory(setting: str, stage: str) -> None:
    less, more = estimate(LARGE, **{setting: 32}), estimate(LARGE, **{setting: 64})
    assert more.memory_bytes[stage] > less.memory_bytes[stage]
    assert more.weights_bytes == less.weights_bytes


def test_an_8b_model_fits_a_consumer_card_packed_only() -> None:
    packed, plain = estimate(LARGE, checkpointing=True), estimate(LARGE, precision="bf16", checkpointing=True)
    assert 5.5 * GB < packed.weights_bytes < 6 * GB
    assert packed.peak_bytes < 9 * GB < 16 * GB < plain.peak_bytes
    assert packed.memory_bytes["export"] < 6 * GB
    # Download and merged model, 16.06 GB each, and a little for the checkpoints.
    assert 32.1 * GB < packed.disk_bytes < 34 * GB


def test_the_micro_batch_is_the_largest_that_fits_and_at_least_one() -> None:
    def need(rollouts: int) -> int:
        return training_bytes(
            LARGE,
            micro_batch=rollouts,
            tokens=1024,
            completion_tokens=512,
            chunk=64,
            rank=16,
            element=2,
            checkpointing=True,
        )

    for free in (1, need(1), need(3), need(5), 100 * GB):
        size = largest_micro_batch(16, free, need)
        assert size == 1 or need(size) <= 0.9 * free
        assert size == 16 or need(size + 1) > 0.9 * free
    assert largest_micro_batch(16, need(1) // 2, need) == 1
    assert largest_micro_batch(16, 100 * GB, need) == 16
    assert 1 < largest_micro_batch(16, need(4), need) < 4

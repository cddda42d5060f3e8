"""A model's need: bytes counted against real tiny models' tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safesteer_lite.hardware import need
from safesteer_lite.hardware.need import largest_micro_batch, weights_bytes
from safesteer_lite.hardware.peaks import LITE, training_bytes
from safesteer_lite.hardware.shape import ModelShape, shape_from_config
from tests.hardware.examples import GB, LARGE, SIZES


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


def estimate(shape: ModelShape, **changes: Any) -> need.Need:
    work: dict[str, Any] = {
        "precision": "nf4",
        "unpacked": False,
        "sequences": 8,
        "prompt_tokens": 64,
        "micro_batch": 2,
        "checkpointing": True,
    }
    asked = {name: changes.pop(name) for name in list(changes) if hasattr(LITE, name)}
    return need.estimate(shape, **{**work, "demand": replace(LITE, **asked), **changes})


@pytest.mark.parametrize(
    ("setting", "stage"),
    [
        ("sequences", "baseline"),
        ("sequences", "direction"),
        ("chunk", "tokens"),
        ("chunk", "export"),
        ("samples", "tokens"),
        ("micro_batch", "distill"),
        ("rank", "distill"),
        ("rollouts", "distill"),
        ("answer_tokens", "evaluate"),
        ("prompt_tokens", "direction"),
    ],
)
def test_more_work_needs_more_memory(setting: str, stage: str) -> None:
    less, more = estimate(LARGE, **{setting: 64}), estimate(LARGE, **{setting: 512})
    assert more.memory_bytes[stage] > less.memory_bytes[stage]
    assert more.weights_bytes == less.weights_bytes


def test_an_8b_model_fits_a_consumer_card_packed_only() -> None:
    packed, plain = estimate(LARGE), estimate(LARGE, precision="bf16")
    assert 5.5 * GB < packed.weights_bytes < 6 * GB
    assert packed.peak_bytes < 7 * GB < 16 * GB < plain.peak_bytes
    assert packed.memory_bytes["export"] < 1.5 * GB
    # Download and merged model, 16.06 GB each, and a little for the checkpoints.
    assert 32.1 * GB < packed.disk_bytes < 34 * GB


def test_the_micro_batch_is_the_largest_that_fits_and_at_least_one() -> None:
    def need(rollouts: int) -> int:
        return training_bytes(
            LARGE,
            LITE,
            micro_batch=rollouts,
            tokens=1024,
            completion_tokens=512,
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

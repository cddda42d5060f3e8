"""What needs a card: `python -m pytest -m gpu`. What came of it on one: docs/research/log.md, "one NVIDIA H100"."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from safesteer_lite.events import discard
from safesteer_lite.hardware.machine import free_cuda_memory
from safesteer_lite.method.distill import Distillation
from safesteer_lite.method.optimizer import MasterAdamW
from safesteer_lite.method.policies import Steering
from safesteer_lite.models import attention
from safesteer_lite.models.adapter import Adapter, with_adapter
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.selfcheck import self_check, stays_finite
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages import pipeline
from tests import REPOSITORY, planted, tiny
from tests.method.test_distill import SAFETY_TOKENS, advance
from tests.recipe import RECIPE

pytestmark = pytest.mark.gpu
has_unsloth = pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="Unsloth is not installed")


@pytest.mark.parametrize("backend", ["plain", pytest.param("unsloth", marks=has_unsloth)])
def test_the_contract_holds_on_a_card(backend: str) -> None:
    """In a process of its own: Unsloth changes transformers for the whole process."""
    environment = os.environ | {"SAFESTEER_LITE_TEST_DEVICE": "cuda", "SAFESTEER_LITE_TEST_BACKEND": backend}
    command = [sys.executable, "-m", "pytest", "-q", "tests/models/test_contract.py", "tests/models/test_selfcheck.py"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]


@has_unsloth
def test_unsloth_trains_a_run_in_its_own_process(tmp_path: Path) -> None:
    """The planted model refuses more afterwards, and nothing made plain transformers go on in Unsloth's place."""
    model = planted.build(tmp_path / "planted")
    settings = planted.settings(
        model, {"model.device": "cuda", "model.precision": "bf16", "model.backend": "unsloth", "distill.rank": 16}
    )
    run = planted.new_run(tmp_path / "runs", settings)
    pipeline.run(settings, run, open_base(model), discard, last="evaluate")
    told = planted.events_of(run.path)
    assert not [event["message"] for event in told if event["event"] == "Warned"]
    assert any("passed the self-check" in str(event.get("message")) for event in told)
    card = run.record("evaluate").result["scorecard"]
    assert card["after"]["harmful"]["refused"] > card["before"]["harmful"]["refused"]


def on_card(folder: Path, precision: str = "nf4", device: str = "cuda", compute: str = "bf16") -> Policy:
    """A tiny policy on the card."""
    from safesteer_lite.models import plain

    network, tokenizer = plain.load(
        open_base(folder), precision=precision, device=device, unpack=False, compute=compute
    )
    return Policy(with_adapter(network, tokenizer, Adapter(4, 8), 3), 128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("queries", "keys"), [(1, 37), (1, 40), (29, 37)])
def test_grouped_attention_is_that_of_expanded_keys(queries: int, keys: int, dtype: torch.dtype) -> None:
    """Against plain products in float64, with padding in front of which nothing can be seen."""
    drawn = [torch.randn(3, heads, length, 64).double() for heads, length in ((14, queries), (2, keys), (2, keys))]
    places = torch.arange(keys)
    visible = torch.stack(
        [(places >= 2 * row) & (places <= places[keys - queries :, None]) for row in range(3)]
    ).unsqueeze(1)
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min).cuda()
    query, key, value = (tensor.to("cuda", dtype).requires_grad_() for tensor in drawn)
    output, _ = attention.attend(nn.Module(), query, key, value, mask)
    output.float().square().sum().backward()
    for gradient in (query.grad, key.grad, value.grad):
        assert gradient is not None and bool(gradient.isfinite().all())
    key64, value64 = (tensor.repeat_interleave(7, dim=1) for tensor in drawn[1:])
    weights = (drawn[0] @ key64.mT / 8).masked_fill(~visible, -1e30).softmax(-1)
    counted = visible.any(-1).squeeze(1)
    expected = (weights @ value64).transpose(1, 2)[counted]
    assert bool(output.isfinite().all())
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(output.cpu().double()[counted], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_greedy_answers_on_a_card_are_those_of_the_cpu(architecture: str, tmp_path: Path) -> None:
    """In fp32, whose products torch does not shorten to TF32 unless it is told to."""
    folder = tiny.save_model(tmp_path / "model", architecture)
    found = []
    for device in ("cuda", "cpu"):
        policy = on_card(folder, "fp32", device)
        found.append(policy.model.generate(tiny.prompt_batch(policy), 12, 0.0, None, 1).tokens.tolist())
    assert found[0] == found[1]


def test_a_token_is_waited_for_at_most_three_times(tmp_path: Path) -> None:
    """As torch itself counts the moments at which the host waits for the card."""
    policy = on_card(tiny.save_model(tmp_path / "model", "qwen2"), "bf16")
    policy.model.end_of_turn = frozenset({tiny.VOCABULARY})
    batch, counted = tiny.prompt_batch(policy), []
    for length in (10, 20):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                policy.model.generate(batch, length, 1.0, torch.Generator().manual_seed(0), 2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counted.append(sum("synchronizing" in str(warning.message) for warning in caught))
    assert counted[1] - counted[0] <= 30


def test_fp16_is_finite_and_reaches_every_adapter(tmp_path: Path) -> None:
    policy = on_card(tiny.save_model(tmp_path / "model", "llama"), "nf4", compute="fp16")
    assert policy.model.decoder.embed_tokens.weight.dtype == torch.float16
    assert stays_finite(policy) and self_check(policy)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one card")
def test_a_model_on_the_second_card_leaves_the_first_alone(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", "qwen2")
    before, current = torch.cuda.memory_allocated(0), torch.cuda.current_device()
    try:
        policy = on_card(folder, device="cuda:1")
        assert policy.model.device == torch.device("cuda:1") and self_check(policy)
        assert torch.cuda.current_device() == 1 and torch.cuda.memory_allocated(0) == before
    finally:
        torch.cuda.set_device(current)


def test_free_memory_knows_of_a_cap() -> None:
    total = torch.cuda.mem_get_info()[1]
    try:
        torch.cuda.set_per_process_memory_fraction(0.25)
        assert 0 < free_cuda_memory() <= 0.25 * total
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert free_cuda_memory() > 0.25 * total


def test_the_optimizers_moments_survive_a_resume() -> None:
    gradients = torch.randn(4, 512, 512, generator=torch.Generator().manual_seed(0)).cuda()
    weights = [nn.Parameter(torch.ones(512, 512, device="cuda")) for _ in range(2)]
    first, second = (MasterAdamW([weight]) for weight in weights)
    for step, gradient in enumerate(gradients):
        advance(first, gradient)
        if step == 1:
            second.load(first.state())
        if step > 1:
            advance(second, gradient)
    assert torch.equal(first.parameters[0], second.parameters[0])


def test_a_step_on_the_card_is_the_step_on_the_cpu(tmp_path: Path) -> None:
    """The same rollouts' loss; sampling draws its numbers on the CPU, but logits round differently."""
    folder = tiny.save_model(tmp_path / "model", "qwen2")
    losses = []
    for policy in (on_card(folder), tiny.load_policy(folder, "nf4-packed")):
        loop = Distillation(
            policy.model, Steering(2, tiny.vector(0.4)), SAFETY_TOKENS, [], [], replace(RECIPE, micro_batch=3)
        )
        policy.model.checkpointing = policy.model.device.type == "cuda"
        prompts = tiny.prompt_batch(policy, 2)
        answers = tiny.fixed_completions(8, policy.model.device)
        losses.append(loop.backward(prompts.repeat(4), answers, "harmful"))
    assert losses[0] == pytest.approx(losses[1], rel=0.05)

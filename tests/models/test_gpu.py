"""What needs a card: `python -m pytest -m gpu`. None of it has been run yet: no GPU was at hand."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from safesteer_lite.hardware.machine import free_cuda_memory
from safesteer_lite.method.distill import Distillation
from safesteer_lite.method.optimizer import MasterAdamW
from safesteer_lite.method.policies import Steering
from safesteer_lite.models.adapter import Adapter, with_adapter
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.optimizer import paged_adamw_8bit
from safesteer_lite.models.unsloth import problem_with
from safesteer_lite.sources.base import open_base
from tests import REPOSITORY, tiny
from tests.method.test_distill import RECIPE, SAFETY_TOKENS

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
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_unsloth_passes_its_trial(architecture: str, tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", architecture)
    code = "import sys; from pathlib import Path; from safesteer_lite.models.unsloth import problem_with; "
    code += "sys.exit(problem_with(Path(sys.argv[1]), 'nf4'))"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert problem_with(folder, "nf4"), "this process has imported transformers first"


def on_card(folder: Path) -> Policy:
    """A tiny policy on the card."""
    from safesteer_lite.models import plain

    network, tokenizer = plain.load(open_base(folder), precision="nf4", device="cuda", unpack=False)
    return Policy(with_adapter(network, tokenizer, Adapter(4, 8), 3), 128)


def test_free_memory_knows_of_a_cap() -> None:
    total = torch.cuda.mem_get_info()[1]
    try:
        torch.cuda.set_per_process_memory_fraction(0.25)
        assert 0 < free_cuda_memory() <= 0.25 * total
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert free_cuda_memory() > 0.25 * total


def test_paged_8bit_moments_survive_a_resume() -> None:
    """Matrices of more than 100,000 values, which bitsandbytes really pages."""
    gradients = torch.randn(4, 512, 512, generator=torch.Generator().manual_seed(0)).cuda()
    weights = [nn.Parameter(torch.ones(512, 512, device="cuda")) for _ in range(2)]
    first, second = (MasterAdamW([weight], 0.0, paged_adamw_8bit) for weight in weights)
    for step, gradient in enumerate(gradients):
        first.parameters[0].grad = gradient.clone()
        first.step(1e-2, 1.0)
        if step == 1:
            second.load(first.state())
        if step > 1:
            second.parameters[0].grad = gradient.clone()
            second.step(1e-2, 1.0)
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
        losses.append(loop.backward(prompts.repeat(4), answers, steered=True))
    assert losses[0] == pytest.approx(losses[1], rel=0.05)

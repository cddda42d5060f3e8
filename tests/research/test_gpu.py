"""The GPU benchmark runs on a CPU with a tiny shape, and its naive objective is ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from safesteer_lite.hardware.need import weights_bytes
from safesteer_lite.method.distill import Distillation
from safesteer_lite.method.policies import Steering
from tests import REPOSITORY, tiny
from tests.benchmarks import gpu
from tests.benchmarks.random_models import PRESETS, write
from tests.method.test_distill import RECIPE, SAFETY_TOKENS


def test_a_case_measures_every_stage(tmp_path: Path) -> None:
    folder = write(tmp_path / "tiny", "tiny", "cpu")
    row = gpu.run_case("tiny", "plain", False, 8, folder, "cpu", gpu.SMALL)
    assert list(row["stages"]) == ["load", "direction", "tokens", "sampling", "training"]
    assert row["finite"] and row["tokens"] > 0 and row["micro_batch"] == [2, 2]
    assert row["tokens_a_second"] > 0 and row["estimate"] > weights_bytes(PRESETS["tiny"][1], "nf4", False)
    lines = gpu.table([row, {"case": ["tiny", "unsloth", "naive", 0], "failed": "no card"}]).splitlines()
    assert len(lines) == 4 and "FAILED: no card" in lines[3]
    assert lines[2].startswith("| tiny | plain | chunked | 8 GB |") and lines[2].count("|") == lines[0].count("|")


def test_the_benchmark_leaves_transformers_for_unsloth_to_change() -> None:
    code = "import sys, tests.benchmarks.gpu; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_the_naive_objective_is_the_chunked_one(tiny_policy: tiny.Loader) -> None:
    found = []
    for kind in (Distillation, gpu.Naive):
        policy = tiny_policy("qwen2", filled=True)
        loop = kind(policy.model, Steering(2, tiny.vector(1.0)), SAFETY_TOKENS, [], [], RECIPE)
        prompts = tiny.prompt_batch(policy, 2)
        rollouts = loop.sample(prompts, 3, stream=0)
        loss = loop.backward(prompts.repeat(3), rollouts, steered=True)
        grads = [value.grad.flatten() for value in policy.model.parameters_to_train() if value.grad is not None]
        found.append((loss, torch.cat(grads)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-6)

"""How long a run will take: measured minutes of the demo, scaled by work, by model size and by a probe of this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from safesteer_lite import config
from safesteer_lite.config import RunConfig, Values
from safesteer_lite.hardware.backend import Decision
from safesteer_lite.hardware.shape import ModelShape, parameters

PROBE_SECONDS = 1.0

# The demo on two CPU cores in bf16 (README, seed 0): seconds by stage, parameters, and what the probe finds there.
_MEASURED = {"baseline": 21, "direction": 68, "tokens": 25, "distill": 411, "evaluate": 480, "export": 23}
_MEASURED_PRESET = "qwen2.5-coder-0.5b-demo"
_MEASURED_PARAMETERS = 494e6
_MEASURED_FLOPS = 640e9

# Loading libraries and weights, whatever the model's size: seconds of the first and of the last stage.
_LOADING = {"baseline": 10.0, "export": 5.0}

# A CUDA card answers a decoding step no faster than Python can launch its kernels: seconds a decoder block.
_LAUNCH_SECONDS = 1e-3
_ANSWER_BATCH = 64
_PROMPT_TOKENS = 40
# Costs in forward passes of one token: decoding fills the matrix units worse, training adds teacher and backward.
_DECODE, _TRAIN = 3.3, 6.0


EFFORTS = {
    "quick": "few prompts, short answers: to see it work",
    "normal": "the default settings",
    "thorough": "more steps, all directions, longer answers",
}
"""What `--effort` takes, with what it means."""


def effort_values(name: str) -> Values:
    """The settings that an effort changes; `quick` trains as the demo does, whose rollouts are short.

    Args:
        name: a key of `EFFORTS`.
    """
    if name == "thorough":
        return {"direction.shortlist": 0, "distill.steps": 40, "evaluate.answer_tokens": 256}
    if name == "normal":
        return {}
    demo = config.preset_values(_MEASURED_PRESET)
    # Which block adapters begin at depends on the model's depth, and the learning rate was found for the demo's model.
    own = ("distill.first_layer", "distill.learning_rate")
    short = {key: value for key, value in demo.items() if key.startswith("distill.") and key not in own}
    return {**short, **config.QUICK}


@dataclass(frozen=True)
class Work:
    """One stage's work.

    Attributes:
        passes: tokens times their cost in forward passes.
        steps: decoding steps, one after another.
    """

    passes: float
    steps: float = 0.0


def work(settings: RunConfig) -> dict[str, Work]:
    """The work of each stage, roughly, from the settings alone."""
    sets, direction, tokens = settings.prompts, settings.direction, settings.tokens
    distill, evaluate = settings.distill, settings.evaluate
    selection = 2 * sets.selection + sets.borderline_selection
    test = 2 * sets.test + sets.borderline_test
    shortlist = direction.shortlist or 100
    baseline = _answers(selection, evaluate.selection_tokens)
    read = 2 * (sets.direction + sets.selection) * _PROMPT_TOKENS
    scored = 2 * shortlist * 2 * sets.selection * _PROMPT_TOKENS
    trials = _answers(3 * sets.selection, direction.teacher_tokens)
    continued = sets.selection * tokens.samples
    rows = distill.prompts * distill.rollouts + distill.anchors
    trained = rows * (_PROMPT_TOKENS + distill.completion_tokens) * _TRAIN
    rollout = _answers(rows, distill.completion_tokens)
    measured = 1 + distill.steps // evaluate.every
    return {
        "baseline": baseline,
        "direction": Work(read + scored + trials.passes, trials.steps),
        "tokens": Work(
            continued * (tokens.horizon * _DECODE + 2 * _PROMPT_TOKENS), tokens.horizon * sets.selection / 8
        ),
        "distill": Work(
            distill.steps * (rollout.passes + trained) + measured * baseline.passes,
            distill.steps * rollout.steps + measured * baseline.steps,
        ),
        "evaluate": _answers(2 * test, evaluate.answer_tokens),
        "export": Work(1.0),
    }


def _answers(count: int, tokens: int) -> Work:
    batches = -(-count // _ANSWER_BATCH)
    return Work(count * (_PROMPT_TOKENS + tokens * _DECODE), batches * tokens)


def probe(decision: Decision, seconds: float = PROBE_SECONDS) -> float:
    """Floating-point operations a second of matrix products, on the device and in the type that a run would use.

    Args:
        decision: how the model will be loaded.
        seconds: how long to measure, after one product to warm up.
    """
    import torch

    dtype = torch.float32 if decision.compute_dtype == "fp32" else torch.bfloat16
    size = 4096 if decision.device == "cuda" else 1024
    matrix = torch.ones(size, size, dtype=dtype, device=decision.device)

    def product() -> None:
        matrix @ matrix
        if decision.device == "cuda":
            torch.cuda.synchronize()

    product()
    until, fastest = time.perf_counter() + seconds, float("inf")
    while (started := time.perf_counter()) < until:
        product()
        # The fastest counts: whatever else runs just now makes the others slower, and may be gone in a minute.
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * size**3 / fastest


def expected_seconds(settings: RunConfig, shape: ModelShape, device: str, flops: float) -> dict[str, float]:
    """Seconds by stage on this machine: the demo's measured ones, scaled.

    Measured on CPUs only; for a CUDA card it is a guess that leaves out what 4-bit unpacking costs there.

    Args:
        settings: the run.
        shape: the model.
        device: `cpu` or `cuda`.
        flops: from `probe`.
    """
    demo = work(config.build([("preset", config.preset_values(_MEASURED_PRESET))]))
    slower = parameters(shape) / _MEASURED_PARAMETERS * _MEASURED_FLOPS / flops
    launches = _LAUNCH_SECONDS * shape.layers if device == "cuda" else 0.0
    return {
        stage: _LOADING.get(stage, 0.0)
        + (_MEASURED[stage] - _LOADING.get(stage, 0.0)) * slower * load.passes / demo[stage].passes
        + launches * load.steps
        for stage, load in work(settings).items()
    }


def total(seconds: Mapping[str, float]) -> float:
    """The whole run, seconds."""
    return sum(seconds.values())

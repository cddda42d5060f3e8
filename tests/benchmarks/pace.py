"""What `hardware/pace.py` rests on: what reading, decoding and training cost on this machine, beside what its probe finds.

Each is done twice and the faster one counts, so that a shared machine disturbs less.

    python -m tests.benchmarks.pace [MODEL_FOLDER] [name=value ...]
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from safesteer_lite.hardware import pace
from safesteer_lite.hardware.backend import decide
from safesteer_lite.hardware.shape import ModelShape, parameters
from safesteer_lite.method.distill import Distillation, Part
from safesteer_lite.method.policies import Batch, Completions, Steering
from safesteer_lite.prompts.plan import texts
from safesteer_lite.prompts.sets import prompt_set
from safesteer_lite.stages.contrast import read
from safesteer_lite.stages.session import Session
from safesteer_lite.stages.training import recipe
from tests.benchmarks.common import say, session

_PROMPTS = 32


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the faster of two tries."""
    times = []
    for _ in range(2):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


class TimedDistillation(Distillation):
    """Distillation that knows how long the forwards and backwards of each step took, without the sampling before them."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.spent: list[float] = []

    def backward(self, prompts: Batch, rollouts: Completions, kind: Part, taught: Batch | None = None) -> float:
        began = time.perf_counter()
        loss = super().backward(prompts, rollouts, kind, taught)
        self.spent.append(time.perf_counter() - began)
        return loss


def training_seconds(work: Session, encoded: list[Batch], shape: ModelShape) -> tuple[float, int]:
    """Seconds that the gradients of the faster of two steps took, and its rollouts' tokens."""
    plan = replace(recipe(work), prompts=len(encoded), anchors=0, score_weight=0.0)
    steering = Steering(shape.layers * 2 // 3, torch.ones(shape.width) / math.sqrt(shape.width))
    training = TimedDistillation(work.policy.model, steering, torch.arange(50), encoded, [], plan)
    tokens = [training.step().tokens for _ in range(2)]
    place = training.spent.index(min(training.spent))
    return training.spent[place], tokens[place]


def main() -> None:
    """Print the figures, and the constants that follow from them."""
    work = session(sys.argv[1:])
    policy = work.policy
    decision = decide(work.config.model, work.base.shape, work.run.path)
    flops = pace.probe(decision)
    prompts = texts(prompt_set("harmful", "direction", _PROMPTS))
    encoded = [policy.encode(prompt) for prompt in prompts]
    prompt_tokens = sum(batch.input_ids.shape[1] - batch.prefix for batch in encoded)
    refusal = policy.token_ids(work.config.direction.refusal_openings)
    reading = fastest(lambda: read(policy, prompts, refusal, lambda done: None))
    lengths = {tokens: fastest(partial(policy.answers, prompts, tokens, _PROMPTS)) for tokens in (24, 96)}
    shape = work.base.shape
    spent, trained = training_seconds(work, encoded, shape)
    token = reading / prompt_tokens
    say(f"threads {torch.get_num_threads()}, probe {flops / 1e9:.0f} billion operations a second")
    say(f"prompts {len(prompts)}, {prompt_tokens / len(prompts):.1f} tokens each without the system prompt")
    say(f"reading {1000 * token:.2f} ms a token: {2 * parameters(shape) / token / flops:.2f} of the probe's rate")
    for tokens, seconds in lengths.items():
        decoded = (seconds - reading) / (len(prompts) * tokens)
        say(f"answers of {tokens}: {1000 * decoded:.2f} ms a token, {decoded / token:.1f} times reading")
    each = spent / (prompt_tokens + trained)
    say(f"training: {1000 * each:.2f} ms a token of prompt and rollout, {each / token:.1f} times reading")


if __name__ == "__main__":
    main()

"""How long a run will take: the tokens it reads, decodes and trains on, at the pace of a measured model, by a probe of this
machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from safesteer_lite import config
from safesteer_lite.config import RunConfig, Values
from safesteer_lite.config.constants import TEACHER_TOKENS
from safesteer_lite.hardware.backend import Decision
from safesteer_lite.hardware.shape import ModelShape, parameters

PROBE_SECONDS = 1.0
_CPU_PRODUCTS = (8, 64, 1024, 4096)
"""Matrices, rows of states, and the width of these before and after."""

# How many tokens are read in the time in which one is decoded, or trained on: of the demo's model in bf16 on a CPU, one thread,
# while other work shared the machine (docs/research/log.md, "Pace").
_DECODE, _TRAIN = 2.3, 3.4
# The rate of a run over the probe's, counted in these tokens. On a CPU it is that of the demo that took 17 minutes, above 1
# because that machine decodes faster than so (docs/research/log.md, 2026-11-27, "the probe"). Of a card nothing is known: it is
# what reading took of another CPU's large squares.
_EFFICIENCY = {"cpu": 1.34, "cuda": 0.52}

PROMPT_TOKENS = 19
"""The mean bundled prompt with its template, counted with the demo's tokenizer; the system prompt is read once for all."""

# The mean that a bundled test context adds to a prompt, counted in the same way; the bundled requests for help in the test split.
_CONTEXT_TOKENS = 24
_CRITICAL_TEST = 40

# From the events of the demo (docs/research/log.md, seed 0): loading and self-check before the first answer, and the whole
# export, which is spent on reading and writing weights, for each parameter.
_LOADING_SECONDS = 8.0
_EXPORT_SECONDS = 23 / 494e6
# A steered policy is computed from its block upwards only. In the same events induce scores took a quarter of the time of
# ablation scores; the teacher of the demo is steered at two thirds of the depth.
_INDUCE_SHARE, _TEACHER_SHARE = 0.25, 1 / 3
# Candidates below 0.8 of the depth of the demo's model, which is what `shortlist = 0` scores (docs/research/log.md).
_ALL_CANDIDATES = 100

LAUNCH_SECONDS = 1e-3
"""Not measured, because no program ever had a card for itself: an assumption that a CUDA card answers a decoding step no faster
than Python can launch its kernels, seconds a decoder block."""
_ANSWER_BATCH = 64

SHARE_PLACES = 8
"""At so many places of an answer stage 3 tells what the safety tokens see of the divergence."""

EFFORTS = {
    "quick": "few prompts, short answers: to see it work",
    "standard": "the default settings",
    "thorough": "all directions scored, longer answers judged",
}
"""What `--effort` takes, with what it means."""


def effort_values(name: str) -> Values:
    """The settings that an effort changes.

    `quick` takes few steps and measures on few prompts. `thorough` trains as `standard` does, for more training did not make
    a better model: 24 steps at a higher rate, and three times the prompts a step, refused more of everything
    (docs/research/log.md, "more training, more refusals"). It scores every direction, which gave the choice that the
    shortlist gives (one model, one seed), judges answers of 256 tokens, in which a late refusal is seen, and asks every test
    prompt in every context.

    Args:
        name: a key of `EFFORTS`.
    """
    if name == "thorough":
        return {"direction.shortlist": 0, "evaluate.answer_tokens": 256, "evaluate.context_prompts": 100}
    return {} if name == "standard" else dict(config.QUICK)


@dataclass(frozen=True)
class Work:
    """One stage's work.

    Attributes:
        read: tokens that are read, without a gradient.
        written: tokens that are decoded.
        trained: tokens that a gradient is taken of.
        steps: decoding steps, one after another.
    """

    read: float = 0.0
    written: float = 0.0
    trained: float = 0.0
    steps: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.read + other.read,
            self.written + other.written,
            self.trained + other.trained,
            self.steps + other.steps,
        )

    def __mul__(self, times: float) -> Work:
        return Work(self.read * times, self.written * times, self.trained * times, self.steps * times)

    @property
    def tokens(self) -> float:
        """All tokens, each counted as often as it takes the time of one that is read, on a CPU."""
        return self.read + self.written * _DECODE + self.trained * _TRAIN


def work(settings: RunConfig, training: int | None = None) -> dict[str, Work]:
    """The work of each stage but the export.

    Args:
        settings: the run.
        training: prompts to train on, where a file of the user's own decides their number; None for the settings' own.
    """
    sets, direction, tokens = settings.prompts, settings.direction, settings.tokens
    distill, evaluate = settings.distill, settings.evaluate
    chosen_by = 2 * sets.selection + 2 * sets.borderline_selection + sets.critical_selection
    selection = _answers(chosen_by, evaluate.selection_tokens)
    candidates = direction.shortlist or _ALL_CANDIDATES
    read = 2 * (sets.direction + sets.selection) + (1 + _INDUCE_SHARE) * candidates * 2 * sets.selection
    voting = sets.direction + sets.selection if tokens.voters == "harmless" else sets.train
    voted = _continued(voting * tokens.samples, tokens.horizon) + _continued(sets.selection, SHARE_PLACES)
    rows = distill.prompts * distill.rollouts + distill.anchors + distill.begun
    trained = Work(trained=rows * (PROMPT_TOKENS + distill.completion_tokens))
    reads_answered = distill.reading == "discriminant" and distill.reading_prompts == "answered"
    answered = (sets.train if training is None else training) + sets.direction if reads_answered else 0
    measured = (-(-distill.steps // evaluate.every) if evaluate.every else 1) + len(distill.adapter_strengths)
    found = {
        "baseline": selection,
        "direction": Work(read * PROMPT_TOKENS) + _answers(sets.selection, TEACHER_TOKENS),
        "tokens": voted,
        "distill": (_answers(rows, distill.completion_tokens) + trained) * distill.steps
        + _answers(answered, evaluate.selection_tokens)
        + _reference(sets.selection, evaluate.kl_tokens)
        + _along(chosen_by, 0)
        + (selection + _along(sets.selection, evaluate.kl_tokens)) * measured,
        "evaluate": (_tested(settings) + _in_contexts(settings) + _along(sets.test, evaluate.kl_tokens)) * 2,
    }
    if settings.model.thinking != "on":
        return found
    # Reckoned with the longest thoughts: one for each answer that is judged, and one before whatever else is read.
    longest = settings.model.thinking_tokens
    first = chosen_by + 2 * sets.direction + sets.train + distill.critical + distill.twins + sets.contrast
    contexts = len(evaluate.contexts) * (
        2 * evaluate.context_prompts + min(evaluate.context_prompts, sets.borderline_test)
    )
    found["baseline"] += _thoughts(chosen_by + first, longest)
    found["direction"] += Work(read * longest)
    found["distill"] += _thoughts(chosen_by, longest) * measured + Work(trained=rows * longest) * distill.steps
    found["evaluate"] += _thoughts(2 * (_test_prompts(settings) + contexts) + sets.test, longest)
    return found


def _answers(count: int, tokens: int) -> Work:
    """Reading prompts and answering them, in whole batches."""
    batches = -(-count // _ANSWER_BATCH)
    return Work(count * PROMPT_TOKENS, count * tokens, steps=batches * tokens)


def answering_share(settings: RunConfig) -> float:
    """The share of the last measurement's time in which one of its two models answers the test prompts, asked plainly: what an
    artifact of the run should take for the same."""
    return _tested(settings).tokens / work(settings)["evaluate"].tokens


def _tested(settings: RunConfig) -> Work:
    """All test prompts asked plainly of one model."""
    return _answers(_test_prompts(settings), settings.evaluate.answer_tokens)


def _test_prompts(settings: RunConfig) -> int:
    sets = settings.prompts
    return 2 * sets.test + 2 * sets.borderline_test + min(sets.borderline_test, _CRITICAL_TEST)


def _thoughts(count: int, tokens: int) -> Work:
    """Thoughts before answers, decoded in whole batches."""
    return Work(written=count * tokens, steps=-(-count // _ANSWER_BATCH) * tokens)


def _in_contexts(settings: RunConfig) -> Work:
    """Test prompts asked in contexts, with what those add to a prompt."""
    sets, evaluate = settings.prompts, settings.evaluate
    few = evaluate.context_prompts
    asked = len(evaluate.contexts) * (2 * min(few, sets.test) + min(few, sets.borderline_test))
    return _answers(asked, evaluate.context_tokens) + Work(asked * _CONTEXT_TOKENS)


def _continued(count: int, places: int) -> Work:
    """Answers of `places` tokens, read by base and teacher."""
    written = Work(written=count * places, steps=-(-count // _ANSWER_BATCH) * places)
    return written + _along(count, places) * (1 + _TEACHER_SHARE)


def _along(count: int, tokens: int) -> Work:
    """Reading prompts with answers that are known."""
    return Work(count * (PROMPT_TOKENS + tokens))


def _reference(count: int, tokens: int) -> Work:
    """The base's own answers, and reading them."""
    return _answers(count, tokens) + _along(count, tokens)


def probe(decision: Decision, seconds: float = PROBE_SECONDS) -> float:
    """Floating-point operations a second of matrix products, on the device and in the type that a run would use.

    On a CPU they are those of a batch of answers with weights that no cache holds, one matrix after another: of what a processor
    with matrix units makes of one large square a run comes to half (docs/research/log.md, "Pace"). On a card they are of large
    squares.

    Args:
        decision: how the model will be loaded.
        seconds: how long to measure, after one round to warm up.
    """
    import torch
    from torch.nn.functional import linear

    on_card = decision.device == "cuda"
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(decision.compute_dtype, torch.bfloat16)
    count, rows, width, wide = (1, 4096, 4096, 4096) if on_card else _CPU_PRODUCTS
    weights = [torch.ones(wide, width, dtype=dtype, device=decision.place) for _ in range(count)]
    states = torch.ones(rows, width, dtype=dtype, device=decision.place)

    def products() -> None:
        for weight in weights:
            linear(states, weight)
        if on_card:
            torch.cuda.synchronize(states.device)

    products()
    until, fastest = time.perf_counter() + seconds, float("inf")
    while (started := time.perf_counter()) < until:
        products()
        # The fastest counts: whatever else runs just now makes the others slower, and may be gone in a minute.
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * count * rows * width * wide / fastest


def expected_seconds(
    settings: RunConfig, shape: ModelShape, device: str, flops: float, training: int | None = None
) -> dict[str, float]:
    """Seconds by stage on this machine, when nothing else uses it.

    Measured on a CPU only; for a CUDA card it is a guess, which leaves out what 4-bit unpacking costs there.

    Args:
        settings: the run.
        shape: the model.
        device: `cpu` or `cuda`.
        flops: from `probe`.
        training: see `work`.
    """
    token = 2 * parameters(shape) / (flops * _EFFICIENCY[device])
    step = LAUNCH_SECONDS * shape.layers if device == "cuda" else 0.0
    seconds = {stage: load.tokens * token + load.steps * step for stage, load in work(settings, training).items()}
    seconds["baseline"] += _LOADING_SECONDS
    return {**seconds, "export": _EXPORT_SECONDS * parameters(shape)}


def basis(device: str) -> str:
    """What an estimate rests on, in words for the user."""
    return "estimated from a short probe" if device == "cpu" else "a guess, as nothing was measured on a GPU yet"


def total(seconds: Mapping[str, float]) -> float:
    """The whole run, seconds."""
    return sum(seconds.values())

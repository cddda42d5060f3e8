"""Localized on-policy distillation (arXiv 2606.02530): the student answers, the steered teacher corrects it token by
token.

Every random choice is a function of (seed, step), so a run resumed from a saved step does exactly what an
uninterrupted one does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from safesteer_lite.method import policies
from safesteer_lite.method.draws import Draws
from safesteer_lite.method.memory import fitting, release
from safesteer_lite.method.objective import Objective, chunked_divergence, position_weights, refusal_score_rise
from safesteer_lite.method.optimizer import MasterAdamW
from safesteer_lite.method.policies import Batch, Completions, LanguageModel, Steering, join, pad_left

Part = Literal["harmful", "anchor", "begun"]
"""What a rollout is to: a harmful prompt, an anchor, or a harmful prompt whose answer was begun."""


@dataclass(frozen=True)
class Recipe:
    """How to distil. Rates and counts are per optimizer step.

    Attributes:
        objective: divergence on harmful prompts, against the steered teacher.
        top_k: columns of the `top-k` objective.
        steps: optimizer steps.
        prompts: harmful prompts a step.
        rollouts: student samples a harmful prompt.
        completion_tokens: longest rollout.
        temperature: of the rollouts.
        anchors: harmless prompts a step, one rollout each, whose teacher is the unsteered base; 0 is the paper.
        anchor_objective: divergence on anchors.
        anchor_weight: factor on the anchors' loss.
        score_weight: factor on the anchors' rise of the refusal score at the first position; 0 leaves it out.
        half_life: tokens after which a position of a rollout counts half as much; 0 counts all alike (paper).
        averaging: share of the averaged weights that a step keeps; what is measured and kept is the average; 0 takes
            the last weights (paper).
        learning_rate: peak rate of AdamW.
        warmup: share of the steps in which the rate rises linearly, before it falls along a cosine to 0.
        gradient_clip: largest norm of the gradient.
        micro_batch: rollouts a forward; halved by itself when memory runs out.
        chunk: positions whose logits exist at a time.
        begun: harmful prompts a step whose answer was begun with a yes, on which the student learns the teacher's own answer to
            the prompt without that beginning; 0 is the paper.
        begun_weight: factor on their loss.
        seed: of prompt order and rollouts.
        earlier: steps that were done before the first of these, in another run, and whose random choices are not made again.
    """

    objective: Objective
    top_k: int
    steps: int
    prompts: int
    rollouts: int
    completion_tokens: int
    temperature: float
    anchors: int
    anchor_objective: Objective
    anchor_weight: float
    score_weight: float
    half_life: float
    averaging: float
    learning_rate: float
    warmup: float
    gradient_clip: float
    micro_batch: int
    chunk: int
    seed: int
    earlier: int = 0
    begun: int = 0
    begun_weight: float = 1.0


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step saw.

    Attributes:
        step: number of finished steps.
        loss: on harmful rollouts, nats.
        anchor_loss: on anchor rollouts before weighting, nats; nan without anchors.
        begun_loss: where answers were begun, before weighting, nats; None without such prompts.
        gradient_norm: before clipping.
        learning_rate: used in this step.
        tokens: completion tokens trained on.
        prompt: index of the first harmful prompt of the step.
        rollout: token ids of its first rollout.
        micro_batch: rollouts a forward that fitted in memory.
        sampling_seconds, training_seconds: how long the rollouts took, and all the rest.
    """

    step: int
    loss: float
    anchor_loss: float
    begun_loss: float | None
    gradient_norm: float
    learning_rate: float
    tokens: int
    prompt: int
    rollout: Tensor
    micro_batch: int
    sampling_seconds: float = field(compare=False)
    training_seconds: float = field(compare=False)


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to zero; `step` counts from 0."""
    warmup = max(1, round(recipe.warmup * recipe.steps))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, recipe.steps - warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def prompts_at(step: int, a_step: int, available: int, seed: int) -> list[int]:
    """Which prompts step `step` uses: each epoch is a fresh permutation, and every prompt comes once an epoch."""
    chosen = []
    for place in range(step * a_step, (step + 1) * a_step):
        epoch, index = divmod(place, available)
        order = torch.randperm(available, generator=torch.Generator().manual_seed(seed * 7919 + epoch))
        chosen.append(int(order[index]))
    return chosen


def generator_at(step: int, seed: int, stream: int) -> torch.Generator:
    """The source of randomness of one step; `stream` keeps harmful and anchor rollouts apart."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 16 + stream)


class Distillation:
    """The training loop's state; `step` does one optimizer step."""

    def __init__(
        self,
        model: LanguageModel,
        steer: Steering | None,
        safety_tokens: Tensor,
        harmful: Sequence[Batch],
        harmless: Sequence[Batch],
        recipe: Recipe,
        refusal_tokens: Tensor | None = None,
        taught: Sequence[Batch] | None = None,
        begun: Sequence[Batch] = (),
    ) -> None:
        """Prepare to train.

        Args:
            model: base, teacher and student in one.
            steer: makes the teacher; None where its prompts alone do.
            safety_tokens: (K,) int64.
            harmful: training prompts, one a batch, unpadded.
            harmless: anchor prompts, one a batch, unpadded; may be empty when the recipe has no anchors.
            recipe: how.
            refusal_tokens: (n,) int64, tokens that open a refusal; needed where the recipe has a score weight.
            taught: the training prompts as the teacher reads them, in the same order; None where it reads them as they are.
            begun: the training prompts with the answer begun, in the same order; may be empty where the recipe has none.
        """
        self.taught, self.begun = taught, begun
        self.model, self.steer, self.recipe = model, steer, recipe
        self.safety_tokens = safety_tokens.to(model.device)
        self.refusal_tokens = refusal_tokens
        self.harmful, self.harmless = harmful, harmless
        self.optimizer = MasterAdamW(model.parameters_to_train(), recipe.averaging)
        self.micro_batch = recipe.micro_batch
        self.sampled_at_once = max(recipe.prompts, recipe.anchors)
        self.done = 0
        # Of this process only: what a saved step holds does not depend on the clock.
        self.tokens, self.sampling_seconds, self.training_seconds = 0, 0.0, 0.0

    def step(self) -> StepResult:
        """Sample rollouts from the student, compare with the teacher along them, update the adapter once."""
        recipe, at, began = self.recipe, self.done, time.monotonic()
        chosen = prompts_at(recipe.earlier + at, recipe.prompts, len(self.harmful), recipe.seed)
        prompts = pad_left([self.harmful[index] for index in chosen])
        rollouts = self.sample(prompts, recipe.rollouts, stream=0)
        tokens = int(rollouts.mask.sum())
        anchors = anchor_rollouts = None
        if recipe.anchors:
            places = prompts_at(recipe.earlier + at, recipe.anchors, len(self.harmless), recipe.seed + 1)
            anchors = pad_left([self.harmless[index] for index in places])
            anchor_rollouts = self.sample(anchors, 1, stream=1)
            tokens += int(anchor_rollouts.mask.sum())
        begun = turned = plain = None
        if recipe.begun:
            places = prompts_at(recipe.earlier + at, recipe.begun, len(self.begun), recipe.seed + 2)
            begun = pad_left([self.begun[index] for index in places])
            plain = pad_left([(self.taught or self.harmful)[index] for index in places])
            with policies.teacher(self.model, self.steer):
                turned = self.sample(plain, 1, stream=2)
            tokens += int(turned.mask.sum())
        sampled = time.monotonic()
        # The key-value cache is gone; its room must not stay cut to its shape while the blocks are trained.
        release()
        self.optimizer.zero()
        taught = pad_left([self.taught[index] for index in chosen]).repeat(recipe.rollouts) if self.taught else None
        loss = self.backward(prompts.repeat(recipe.rollouts), rollouts, "harmful", taught)
        anchor_loss, begun_loss = float("nan"), None
        if anchors is not None and anchor_rollouts is not None:
            anchor_loss = self.backward(anchors, anchor_rollouts, "anchor")
        if begun is not None and turned is not None:
            begun_loss = self.backward(begun, turned, "begun", plain)
        rate = learning_rate_at(at, recipe)
        norm = self.optimizer.step(rate, recipe.gradient_clip)
        self.optimizer.zero()
        self.done += 1
        trained = time.monotonic()
        self.tokens += tokens
        self.sampling_seconds += sampled - began
        self.training_seconds += trained - sampled
        return StepResult(
            step=self.done,
            loss=loss,
            anchor_loss=anchor_loss,
            begun_loss=begun_loss,
            gradient_norm=norm,
            learning_rate=rate,
            tokens=tokens,
            prompt=chosen[0],
            rollout=rollouts.tokens[0][rollouts.mask[0]].cpu(),
            micro_batch=self.micro_batch,
            sampling_seconds=sampled - began,
            training_seconds=trained - sampled,
        )

    def sample(self, prompts: Batch, repeats: int, stream: int) -> Completions:
        """Rollouts of all prompts, at once or, where memory is short, part by part."""
        recipe = self.recipe
        generator = generator_at(recipe.earlier + self.done, recipe.seed, stream)
        drawn = Draws.of(recipe.completion_tokens, len(prompts), repeats, generator)

        def sample(size: int) -> Completions:
            parts = [range(len(prompts))[start : start + size] for start in range(0, len(prompts), size)]
            return join(
                [
                    self.model.generate(
                        prompts.rows(part.start, part.stop),
                        recipe.completion_tokens,
                        recipe.temperature,
                        drawn.at(part),
                        repeats,
                    )
                    for part in parts
                ]
            )

        with torch.no_grad():
            rollouts, self.sampled_at_once = fitting(self.sampled_at_once, sample)
        return rollouts

    def backward(self, prompts: Batch, rollouts: Completions, kind: Part, taught: Batch | None = None) -> float:
        """Accumulate gradients over micro-batches; returns the divergence, unweighted.

        Where memory runs out, the same rollouts are taken up again with fewer at a time: a micro-batch leaves all of its
        gradients or none.
        """
        # Rollouts of like length share a micro-batch, so that little of it is padding; the longest ones come first, so that
        # what fits for them fits for all.
        lengths = prompts.attention_mask.sum(-1) + rollouts.mask.sum(-1)
        order = lengths.argsort(descending=True, stable=True)
        prompts, rollouts = prompts.take(order), rollouts.take(order)
        taught = taught.take(order) if taught is not None else None
        total, start = 0.0, 0
        while start < len(prompts):
            work = partial(self._gradients, prompts, rollouts, kind, taught, start)
            (share, gradients), self.micro_batch = fitting(self.micro_batch, work)
            self.optimizer.add(gradients)
            total, start = total + share, start + self.micro_batch
        return total

    def _gradients(
        self, prompts: Batch, rollouts: Completions, kind: Part, taught: Batch | None, start: int, size: int
    ) -> tuple[float, Sequence[Tensor | None]]:
        """Divergence, unweighted, and the adapter's gradients of the `size` rollouts from `start` on."""
        stop = min(start + size, len(prompts))
        part, answers = prompts.rows(start, stop).trimmed(), rollouts.rows(start, stop).trimmed()
        read = taught.rows(start, stop).trimmed() if taught is not None else None
        divergence, score_rise = self._losses(part, answers, kind, read, len(prompts))
        weight = {"harmful": 1.0, "anchor": self.recipe.anchor_weight, "begun": self.recipe.begun_weight}[kind]
        loss = weight * divergence + self.recipe.score_weight * score_rise
        gradients = torch.autograd.grad(loss, self.optimizer.parameters, allow_unused=True)
        return float(divergence.detach()), gradients

    def _losses(
        self, prompts: Batch, rollouts: Completions, kind: Part, taught: Batch | None, count: int
    ) -> tuple[Tensor, Tensor | float]:
        """Divergence, and an anchor's rise of the refusal score (0 where there is none), of one micro-batch, as its
        share of the mean over `count` rollouts.

        Below both the first adapter and the steered block all three policies are the same function: that part runs
        once. A teacher that reads other prompts reads them for itself.
        """
        model, length = self.model, rollouts.tokens.shape[1]
        shared = min(model.first_adapter_layer, self.steer.layer if self.steer else model.first_adapter_layer)
        with torch.no_grad():
            with policies.base(model):
                trunk = model.advance(model.start(rollouts.after(prompts)), shared)
            with policies.base(model) if kind == "anchor" else policies.teacher(model, self.steer):
                seen = trunk if taught is None else model.start(rollouts.after(taught))
                teacher_hidden = policies.completion_hidden(model, seen, length)
        student_hidden = policies.completion_hidden(model, trunk, length)
        objectives: dict[Part, Objective] = {
            "harmful": self.recipe.objective,
            "anchor": self.recipe.anchor_objective,
            "begun": "forward",
        }
        divergence = chunked_divergence(
            student_hidden[rollouts.mask],
            teacher_hidden[rollouts.mask],
            position_weights(rollouts.mask, count, self.recipe.half_life),
            model.logits,
            objectives[kind],
            self.safety_tokens,
            self.recipe.top_k,
            self.recipe.chunk,
        )
        if kind != "anchor" or not self.recipe.score_weight or self.refusal_tokens is None:
            return divergence, 0.0
        first = model.logits(student_hidden[:, 0]), model.logits(teacher_hidden[:, 0])
        return divergence, refusal_score_rise(*first, self.refusal_tokens).sum() / count

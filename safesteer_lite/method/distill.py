"""Localized on-policy distillation (arXiv 2606.02530): the student answers, the steered teacher corrects it token by
token.

Every random choice is a function of (seed, step), so a run resumed from a saved step does exactly what an
uninterrupted one does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safesteer_lite.method import model as policies
from safesteer_lite.method.memory import fitting
from safesteer_lite.method.model import Batch, Completions, LanguageModel, Steering
from safesteer_lite.method.objective import Objective, chunked_divergence, position_weights, refusal_score_shift


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
        score_weight: factor on the anchors' shift of the refusal score at the first position; 0 leaves it out.
        half_life: tokens after which a position of a rollout counts half as much; 0 counts all alike (paper).
        averaging: share of the averaged weights that a step keeps; what is measured and kept is the average; 0 takes
            the last weights (paper).
        learning_rate: peak rate of AdamW.
        warmup: share of the steps in which the rate rises linearly, before it falls along a cosine to 0.
        gradient_clip: largest norm of the gradient.
        micro_batch: rollouts a forward; halved by itself when memory runs out.
        chunk: positions whose logits exist at a time.
        seed: of prompt order and rollouts.
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


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step saw.

    Attributes:
        step: number of finished steps.
        loss: on harmful rollouts, nats.
        anchor_loss: on anchor rollouts before weighting, nats; nan without anchors.
        gradient_norm: before clipping.
        learning_rate: used in this step.
        tokens: completion tokens trained on.
        prompt: index of the first harmful prompt of the step.
        rollout: token ids of its first rollout.
        micro_batch: rollouts a forward that fitted in memory.
    """

    step: int
    loss: float
    anchor_loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    prompt: int
    rollout: Tensor
    micro_batch: int


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


class MasterAdamW:
    """AdamW on float32 copies of the adapter weights, which themselves stay in the compute dtype.

    bf16 keeps 8 bits of mantissa, so steps of 1e-4 on weights of 0.03 would be rounded away; on a CPU, adapters in
    float32 would cost more time than the frozen bf16 blocks they adapt.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], averaging: float = 0.0) -> None:
        """Take over the weights.

        Args:
            parameters: the adapter's.
            averaging: share of the running average that each step keeps, from 0 (the average is the last step) to below 1.
        """
        self.parameters = list(parameters)
        self.averaging, self.steps = averaging, 0
        self.masters = [nn.Parameter(parameter.detach().float().clone()) for parameter in self.parameters]
        self.averages = [master.detach().clone() for master in self.masters] if averaging else []
        self.optimizer = torch.optim.AdamW(self.masters, lr=0.0, betas=(0.9, 0.999), weight_decay=0.0)

    def zero(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, learning_rate: float, gradient_clip: float) -> float:
        """One update; returns the gradient's norm before clipping."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = torch.zeros_like(master) if parameter.grad is None else parameter.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(self.masters, gradient_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.steps += 1
        # The first average is the first step's weights: averaging the untrained adapter in would only hold it back.
        share = max(1 - self.averaging, 1 / self.steps)
        with torch.no_grad():
            for average, master in zip(self.averages, self.masters, strict=False):
                average.lerp_(master, share)
        self.publish(self.masters)
        return float(norm)

    def publish(self, weights: Sequence[Tensor]) -> None:
        """Write float32 weights into the adapter."""
        with torch.no_grad():
            for weight, parameter in zip(weights, self.parameters, strict=True):
                parameter.copy_(weight)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the adapter holds the averaged weights, if there are any."""
        self.publish(self.averages or self.masters)
        try:
            yield
        finally:
            self.publish(self.masters)

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on, as tensors for a safetensors file."""
        tensors = {"steps": torch.tensor(self.steps)}
        tensors |= {f"{index}.average": average.clone() for index, average in enumerate(self.averages)}
        for index, master in enumerate(self.masters):
            tensors[f"{index}.master"] = master.detach().clone()
            for name, value in self.optimizer.state[master].items():
                tensors[f"{index}.{name}"] = torch.as_tensor(value).detach().clone()
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up a `state` and write the weights into the adapter."""
        self.steps = int(tensors["steps"])
        with torch.no_grad():
            for index, average in enumerate(self.averages):
                average.copy_(tensors[f"{index}.average"])
            for index, master in enumerate(self.masters):
                master.copy_(tensors[f"{index}.master"])
                prefix = f"{index}."
                names = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
                self.optimizer.state[master] = {
                    name: tensors[prefix + name].to(master.device if name != "step" else "cpu").clone()
                    for name in names
                    if name not in ("master", "average")
                }
        self.publish(self.masters)


class Distillation:
    """The training loop's state; `step` does one optimizer step."""

    def __init__(
        self,
        model: LanguageModel,
        steer: Steering,
        safety_tokens: Tensor,
        harmful: Sequence[Batch],
        harmless: Sequence[Batch],
        recipe: Recipe,
        refusal_tokens: Tensor | None = None,
    ) -> None:
        """Prepare to train.

        Args:
            model: base, teacher and student in one.
            steer: makes the teacher.
            safety_tokens: (K,) int64.
            harmful: training prompts, one a batch, unpadded.
            harmless: anchor prompts, one a batch, unpadded; may be empty when the recipe has no anchors.
            recipe: how.
            refusal_tokens: (n,) int64, tokens that open a refusal; needed where the recipe has a score weight.
        """
        self.model, self.steer, self.recipe = model, steer, recipe
        self.safety_tokens = safety_tokens.to(model.device)
        self.refusal_tokens = refusal_tokens
        self.harmful, self.harmless = harmful, harmless
        self.optimizer = MasterAdamW(model.parameters_to_train(), recipe.averaging)
        self.micro_batch = recipe.micro_batch
        self.sampled_at_once = max(recipe.prompts, recipe.anchors)
        self.done = 0

    def step(self) -> StepResult:
        """Sample rollouts from the student, compare with the teacher along them, update the adapter once."""
        recipe, at = self.recipe, self.done
        chosen = prompts_at(at, recipe.prompts, len(self.harmful), recipe.seed)
        prompts = pad_left([self.harmful[index] for index in chosen])
        rollouts = self._sample(prompts, recipe.rollouts, stream=0)
        anchors = anchor_rollouts = None
        if recipe.anchors:
            places = prompts_at(at, recipe.anchors, len(self.harmless), recipe.seed + 1)
            anchors = pad_left([self.harmless[index] for index in places])
            anchor_rollouts = self._sample(anchors, 1, stream=1)

        def gradients(micro_batch: int) -> tuple[float, float]:
            self.optimizer.zero()
            repeated = prompts.repeat(recipe.rollouts)
            loss = self._backward(repeated, rollouts, micro_batch, steered=True)
            if anchors is None or anchor_rollouts is None:
                return loss, float("nan")
            return loss, self._backward(anchors, anchor_rollouts, micro_batch, steered=False)

        (loss, anchor_loss), self.micro_batch = fitting(self.micro_batch, gradients)
        rate = learning_rate_at(at, recipe)
        norm = self.optimizer.step(rate, recipe.gradient_clip)
        self.optimizer.zero()
        self.done += 1
        tokens = int(rollouts.mask.sum()) + (int(anchor_rollouts.mask.sum()) if anchor_rollouts is not None else 0)
        first = rollouts.tokens[0][rollouts.mask[0]].cpu()
        return StepResult(self.done, loss, anchor_loss, norm, rate, tokens, chosen[0], first, self.micro_batch)

    def _sample(self, prompts: Batch, repeats: int, stream: int) -> Completions:
        """Rollouts of all prompts, at once or, where memory is short, part by part."""
        recipe = self.recipe

        def sample(size: int) -> Completions:
            generator = generator_at(self.done, recipe.seed, stream)
            parts = [prompts.rows(start, start + size) for start in range(0, len(prompts), size)]
            return join(
                [
                    self.model.generate(part, recipe.completion_tokens, recipe.temperature, generator, repeats)
                    for part in parts
                ]
            )

        with torch.no_grad():
            rollouts, self.sampled_at_once = fitting(self.sampled_at_once, sample)
        return rollouts

    def _backward(self, prompts: Batch, rollouts: Completions, micro_batch: int, *, steered: bool) -> float:
        """Accumulate gradients over micro-batches; returns the divergence, unweighted."""
        total = 0.0
        for start in range(0, len(prompts), micro_batch):
            rows = slice(start, min(start + micro_batch, len(prompts)))
            part = rollouts.rows(rows.start, rows.stop)
            divergence, score_shift = self._losses(
                prompts.rows(rows.start, rows.stop), part, len(prompts), steered=steered
            )
            weight = 1.0 if steered else self.recipe.anchor_weight
            (weight * divergence + self.recipe.score_weight * score_shift).backward()
            total += float(divergence.detach())
        return total

    def _losses(
        self, prompts: Batch, rollouts: Completions, count: int, *, steered: bool
    ) -> tuple[Tensor, Tensor | float]:
        """Divergence, and an anchor's shift of the refusal score (0 where there is none), of one micro-batch, as its
        share of the mean over `count` rollouts.

        Below both the first adapter and the steered block all three policies are the same function: that part runs
        once.
        """
        model, length = self.model, rollouts.tokens.shape[1]
        shared = min(model.first_adapter_layer, self.steer.layer)
        with torch.no_grad():
            with policies.base(model):
                trunk = model.advance(model.start(rollouts.after(prompts)), shared)
            with policies.teacher(model, self.steer) if steered else policies.base(model):
                teacher_hidden = policies.completion_hidden(model, trunk, length)
        student_hidden = policies.completion_hidden(model, trunk, length)
        divergence = chunked_divergence(
            student_hidden[rollouts.mask],
            teacher_hidden[rollouts.mask],
            position_weights(rollouts.mask, count, self.recipe.half_life),
            model.logits,
            self.recipe.objective if steered else self.recipe.anchor_objective,
            self.safety_tokens,
            self.recipe.top_k,
            self.recipe.chunk,
        )
        if steered or not self.recipe.score_weight or self.refusal_tokens is None:
            return divergence, 0.0
        first = model.logits(student_hidden[:, 0]), model.logits(teacher_hidden[:, 0])
        return divergence, refusal_score_shift(*first, self.refusal_tokens).sum() / count


def join(parts: Sequence[Completions]) -> Completions:
    """Several batches of completions as one, padded on the right."""
    longest = max(part.tokens.shape[1] for part in parts)

    def widen(tensor: Tensor) -> Tensor:
        return nn.functional.pad(tensor, (0, longest - tensor.shape[1]))

    return Completions(
        torch.cat([widen(part.tokens) for part in parts]), torch.cat([widen(part.mask) for part in parts])
    )


def pad_left(prompts: Sequence[Batch]) -> Batch:
    """Several one-row batches as one, padded on the left."""
    longest = max(prompt.input_ids.shape[1] for prompt in prompts)

    def widen(tensor: Tensor) -> Tensor:
        return nn.functional.pad(tensor, (longest - tensor.shape[1], 0), value=0)

    return Batch(
        torch.cat([widen(prompt.input_ids) for prompt in prompts]),
        torch.cat([widen(prompt.attention_mask) for prompt in prompts]),
        min(prompt.prefix for prompt in prompts),
    )

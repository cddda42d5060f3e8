"""A training in progress: begun, or taken up from a saved step, and carried on step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter

from torch import Tensor

from safesteer_lite.config.constants import TOP_K
from safesteer_lite.errors import Interrupted, ModelError, TrainingError
from safesteer_lite.events import Metric, Progress, Sample
from safesteer_lite.hardware import allocator
from safesteer_lite.hardware.limits import ram
from safesteer_lite.hardware.machine import free_cuda_memory
from safesteer_lite.hardware.need import largest_micro_batch
from safesteer_lite.hardware.peaks import Demand, training_bytes
from safesteer_lite.hardware.units import format_bytes
from safesteer_lite.method.distill import Distillation, Recipe
from safesteer_lite.method.policies import Batch
from safesteer_lite.models.adapter import adapter_tensors, load_adapter
from safesteer_lite.models.loaded import PlainModel
from safesteer_lite.prompts.contexts import Conversation, begun
from safesteer_lite.prompts.sets import Prompt
from safesteer_lite.runs.steps import Checkpoints
from safesteer_lite.stages.direction import load_steering
from safesteer_lite.stages.history import History, restore_step, save_step, sizes_from_record, sizes_to_record
from safesteer_lite.stages.parent import parent_of
from safesteer_lite.stages.prompted import taught_batches
from safesteer_lite.stages.reading import prepare_adapter
from safesteer_lite.stages.session import Session
from safesteer_lite.stages.shown import ShownAnswers
from safesteer_lite.stages.tokens import load_tokens
from safesteer_lite.stages.yardstick import Yardstick


@dataclass
class Training:
    """A training in progress, on the model that its session has loaded.

    Attributes:
        model: base, teacher and student in one.
        loop: does the steps.
        history: what happened so far.
        best: the adapter of the best step measured so far, by name; before the first measurement, the adapter as it began.
        yardstick: what measures the student.
        fitted: of the session.
    """

    model: PlainModel
    loop: Distillation
    history: History
    best: dict[str, Tensor]
    yardstick: Yardstick
    fitted: Mapping[int, int]

    @property
    def is_over(self) -> bool:
        """Whether no step is left."""
        return self.loop.done >= self.loop.recipe.steps

    def measure(self, strength: float = 1.0) -> None:
        """Measure the adapter as it is now, scaled by `strength` already, and keep it where it is the best so far."""
        if self.yardstick.measure(self.loop.done, self.history, strength):
            self.best = adapter_tensors(self.model)

    def measure_best_again(self) -> None:
        """Measure the best step here, which another process has measured: other strengths are compared with it."""
        history = self.history
        history.measured = [record for record in history.measured if record["step"] != history.best_step]
        load_adapter(self.model, self.best)
        if not self.yardstick.measure(history.best_step, history):
            history.best_score, history.best_by_trainer = history.measured[-1]["score"], False
        history.measured.sort(key=itemgetter("step"))

    def save(self, checkpoints: Checkpoints) -> None:
        """Save the step."""
        self.history.fitted = sizes_to_record(self.fitted)
        write = partial(save_step, training=self.loop, history=self.history, best=self.best)
        checkpoints.save_checkpoint(self.loop.done, write)


def begin(session: Session, checkpoints: Checkpoints) -> Training:
    """A training at its newest saved step, or at the start: with what the adapter reads, and before any step."""
    config, policy = session.config, session.policy
    anchors = drawn_anchors(session) if config.distill.anchors else []
    saved = checkpoints.newest_checkpoint()
    prepare_adapter(session, saved[1] if saved else None)
    asked = session.asked(session.prompts.training())
    loop = Distillation(
        policy.model,
        load_steering(session),
        load_tokens(session),
        [policy.encode(entry) for entry in asked],
        _held(session, asked, session.asked(anchors)),
        recipe(session),
        policy.token_ids(config.direction.refusal_openings),
        taught_batches(session, asked),
        [policy.encode(entry) for entry in begun(asked)] if config.distill.begun else (),
    )
    history, best = restore_step(saved[1], loop) if saved else (History(), adapter_tensors(policy.model))
    session.fitted.update(sizes_from_record(history.fitted))
    training = Training(policy.model, loop, history, best, Yardstick(session), session.fitted)
    if not saved and parent_of(session.run):
        # Where no step is better than what was there before, that is kept.
        training.measure()
    return training


def _held(session: Session, asked: Sequence[str | Conversation], anchors: Sequence[str | Conversation]) -> list[Batch]:
    """Where the student is held to the base: behind the anchors, and of a model that thinks as often where its thoughts about
    them begin, and about the training prompts. Else it would refuse in its thoughts, and never come to their end."""
    policy = session.policy
    held = [policy.encode(entry) for entry in anchors]
    if session.config.distill.begun:
        held += [policy.encode(entry) for entry in begun(anchors[::2])]
    if policy.thoughts and held:
        opened = [policy.prompt(entry) for entry in asked]
        held += [policy.prompt(entry) for entry in anchors] + opened * max(1, round(len(held) / len(opened)))
    return held


def take_steps(session: Session, training: Training, checkpoints: Checkpoints) -> None:
    """All steps that are left, measured and saved as the settings say.

    Raises:
        Interrupted: the user asked to stop; the step is saved.
        TrainingError: the training has diverged.
    """
    loop, every = training.loop, session.config.evaluate.every
    shown = ShownAnswers(session, loop.recipe)
    session.progress("steps", loop.recipe.steps)(loop.done)
    if not training.is_over:
        _fit_micro_batch(session, training)
        if not training.history.micro_batch:
            # Sums round differently in other parts: whenever the run goes on, it does so with the sizes that it began with.
            training.history.micro_batch = loop.micro_batch
            training.save(checkpoints)
    while not training.is_over:
        _one_step(session, training, shown)
        if training.is_over or (every > 0 and loop.done % every == 0):
            with loop.optimizer.averaged():
                training.measure()
        stop = session.stop_requested()
        if stop or training.is_over or loop.done % session.config.distill.save_every == 0:
            training.save(checkpoints)
            # Two, since the newest may turn out to be damaged.
            checkpoints.prune(2)
        if stop:
            raise Interrupted(f"Stopped after step {loop.done}; everything up to there is saved.")


def paces(loop: Distillation) -> dict[str, float | None]:
    """Tokens a second that this process sampled and trained on; None where it did no step."""
    return {
        "sampled_tokens_a_second": _rate(loop.tokens, loop.sampling_seconds),
        "trained_tokens_a_second": _rate(loop.tokens, loop.training_seconds),
    }


def _rate(tokens: int, seconds: float) -> float | None:
    return round(tokens / seconds, 1) if seconds else None


def recipe(session: Session) -> Recipe:
    """The recipe that the settings describe.

    The safety tokens are words of answers: of a model that thinks, anchors read the whole vocabulary.
    """
    config = session.config.distill
    names = Recipe.__dataclass_fields__.keys() & vars(config).keys()
    found = Recipe(
        **{name: getattr(config, name) for name in names},
        top_k=TOP_K,
        seed=session.config.seed,
        earlier=session.config.parent.steps,
    )
    return replace(found, anchor_objective="full") if session.policy.thoughts else found


def drawn_anchors(session: Session) -> list[Prompt]:
    """What steps draw anchors from. In an `even` mix each kind is repeated until it is about as many as the largest."""
    kinds = session.anchors()
    if session.config.distill.anchor_mix == "pooled":
        return [prompt for kind in kinds for prompt in kind]
    most = max(len(kind) for kind in kinds)
    return [prompt for kind in kinds for prompt in kind * round(most / len(kind))]


def _fit_micro_batch(session: Session, training: Training) -> None:
    """Begin with as many rollouts a forward as free memory is reckoned to hold, by the longest prompt; or go on with those
    that the run began with.

    On a card what is too much would be told; in RAM many systems end the program without a word.

    Raises:
        ModelError: too little RAM is free to go on.
    """
    config, model, loop = session.config, session.policy.model, training.loop
    shape, on_card = session.base.shape, model.device.type == "cuda"
    # What glibc keeps of earlier work is free for this one too.
    allocator.return_freed_memory()
    free = free_cuda_memory() if on_card else ram()[1]
    element = model.decoder.embed_tokens.weight.element_size()
    longest = max(
        prompt.input_ids.shape[1] for prompt in (*loop.harmful, *loop.harmless, *(loop.taught or ()), *loop.begun)
    )

    def need(rollouts: int) -> int:
        return training_bytes(
            shape,
            Demand.of(config),
            micro_batch=rollouts,
            tokens=longest + config.distill.completion_tokens,
            completion_tokens=config.distill.completion_tokens,
            element=element,
            checkpointing=model.checkpointing,
        )

    # Of RAM a third: freed memory stays with the process, in pieces, and a run of the paper's recipe that was reckoned to take
    # half held 18 of 24 GB (docs/research/log.md, 2026-11-26). The user's other programs grow too.
    # And on a card the optimizer is not all there yet.
    room = free - loop.optimizer.bytes_to_come if on_card else free // 3
    fitting = largest_micro_batch(loop.micro_batch, room, need)
    if training.history.micro_batch:
        if not on_card and need(loop.micro_batch) > free:
            fewer = f", or resume it with --set distill.micro_batch={fitting}, which rounds sums differently"
            raise ModelError(
                f"The run trains {loop.micro_batch} rollouts a forward, which take {format_bytes(need(loop.micro_batch))}, "
                f"and {format_bytes(free)} are free.",
                f"Close other programs{fewer if fitting < loop.micro_batch else ''}.",
            )
        return
    loop.micro_batch = fitting
    if not on_card and loop.micro_batch == loop.recipe.micro_batch:
        return
    session.note(
        f"Rollouts a forward: {loop.micro_batch} of at most {config.distill.micro_batch}; the longest takes "
        f"{format_bytes(need(1))}, and {format_bytes(free)} are free."
    )


def _one_step(session: Session, training: Training, shown: ShownAnswers) -> None:
    loop, history = training.loop, training.history
    before, sampled = loop.micro_batch, loop.sampled_at_once
    result = loop.step()
    if not (math.isfinite(result.loss) and math.isfinite(result.gradient_norm) and loop.optimizer.is_finite()):
        raise TrainingError(
            f"Step {result.step} has the loss {result.loss:g} and a gradient of norm {result.gradient_norm:g}: the training "
            "has diverged, and further steps would not bring it back.",
            "Start a new run with a lower distill.learning_rate; resuming this one would come to the same.",
        )
    if loop.micro_batch < before:
        session.warn(
            f"Out of memory: rollouts a forward lowered from {before} to {loop.micro_batch}; nothing was lost."
        )
    if loop.sampled_at_once < sampled:
        session.warn(
            f"Out of memory: prompts sampled at a time lowered from {sampled} to {loop.sampled_at_once}; "
            "nothing was lost."
        )
    history.micro_batch, history.sampled_at_once = loop.micro_batch, loop.sampled_at_once
    record = {
        "step": result.step,
        "loss": result.loss,
        "anchor_loss": None if math.isnan(result.anchor_loss) else result.anchor_loss,
        "gradient_norm": result.gradient_norm,
        "learning_rate": result.learning_rate,
        "tokens": result.tokens,
    }
    history.steps.append(record)
    session.emit(Metric(session.stage, "loss", result.loss, result.tokens, result.step))
    if record["anchor_loss"] is not None:
        session.emit(Metric(session.stage, "anchor loss", result.anchor_loss, result.tokens, result.step))
    rollout = session.policy.tokenizer.decode(result.rollout, skip_special_tokens=True)
    prompt = session.prompts.training()[result.prompt].text
    session.emit(Sample(session.stage, prompt, shown.of_step(result.step - 1), rollout))
    session.emit(Progress(session.stage, "steps", result.step, session.config.distill.steps))

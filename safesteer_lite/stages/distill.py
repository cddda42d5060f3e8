"""Stage 4: distillation, measured every few steps, with the best step kept (docs/method.md, distillation)."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from functools import partial

from torch import Tensor

from safesteer_lite.config.constants import TOP_K
from safesteer_lite.errors import Interrupted, TrainingError
from safesteer_lite.events import Metric, Progress, Sample
from safesteer_lite.hardware.known import measured_on
from safesteer_lite.hardware.machine import free_cuda_memory
from safesteer_lite.hardware.need import largest_micro_batch
from safesteer_lite.hardware.peaks import Demand, training_bytes
from safesteer_lite.hardware.units import format_bytes
from safesteer_lite.method.distill import Distillation, Recipe
from safesteer_lite.models.adapter import adapter_tensors, load_adapter, save_adapter, scale_adapter
from safesteer_lite.prompts.sets import Prompt
from safesteer_lite.runs.durable import write_json
from safesteer_lite.runs.folder import Publication
from safesteer_lite.runs.steps import Checkpoints
from safesteer_lite.stages.direction import load_steering
from safesteer_lite.stages.history import History, restore_step, save_step
from safesteer_lite.stages.reading import prepare_adapter
from safesteer_lite.stages.session import Session
from safesteer_lite.stages.shown import ShownAnswers
from safesteer_lite.stages.tokens import load_tokens
from safesteer_lite.stages.yardstick import Yardstick


def recipe(session: Session) -> Recipe:
    """The recipe that the settings describe."""
    config = session.config.distill
    names = Recipe.__dataclass_fields__.keys() & vars(config).keys()
    return Recipe(**{name: getattr(config, name) for name in names}, top_k=TOP_K, seed=session.config.seed)


def run(session: Session, publication: Publication) -> None:
    """Train, resume where a killed run stopped, publish the best step's adapter."""
    training, history, best = train(session, replace(publication.steps, warn=session.warn))
    load_adapter(session.policy.model, best)
    save_adapter(session.policy.model, publication.path / "adapter")
    write_json(publication.path / "history.json", asdict(history))
    publication.result = {
        "best_step": history.best_step,
        "best_strength": history.best_strength,
        "best_score": round(history.best_score, 3),
        "steps": training.done,
        "measured": history.measured,
        "scaled": history.scaled,
        "micro_batch": training.micro_batch,
        # Of the steps since the run was last started; None where there was none.
        "sampled_tokens_a_second": _rate(training.tokens, training.sampling_seconds),
        "trained_tokens_a_second": _rate(training.tokens, training.training_seconds),
    }
    strength = "" if history.best_strength == 1 else f" at strength {history.best_strength:g}"
    kept = history.kept
    apart = f", separation {kept.separation:+.2f} nats" if kept and kept.separation is not None else ""
    session.note(
        f"Kept step {history.best_step} of {training.done}{strength}: the best trade-off on the selection split (score "
        f"{history.best_score:+.1f} points{apart})."
    )


def train(session: Session, checkpoints: Checkpoints) -> tuple[Distillation, History, dict[str, Tensor]]:
    """All steps: the training's state, what happened, and the best step's weights."""
    config, policy = session.config, session.policy
    if elsewhere := measured_on(config.model.name):
        session.note(f"The default way of training was measured on {elsewhere}.")
    anchors = drawn_anchors(session) if config.distill.anchors else []
    saved = checkpoints.newest_checkpoint()
    prepare_adapter(session, saved[1] if saved else None)
    training = Distillation(
        policy.model,
        load_steering(session),
        load_tokens(session),
        [policy.encode(asked) for asked in session.asked(session.prompts.training())],
        [policy.encode(asked) for asked in session.asked(anchors)],
        recipe(session),
        policy.token_ids(config.direction.refusal_openings),
    )
    _fit_micro_batch(session, training)
    yardstick, shown = Yardstick(session), ShownAnswers(session, training.recipe)
    history = History()
    best = adapter_tensors(policy.model)
    if saved:
        history, best = restore_step(saved[1], training)
        session.note(f"Resumed after step {saved[0]} of {config.distill.steps}.")
    history.base_scores = yardstick.base_scores
    session.progress("steps", config.distill.steps)(training.done)
    while training.done < config.distill.steps:
        _one_step(session, training, history, shown)
        every = config.evaluate.every
        due = training.done == config.distill.steps or (every > 0 and training.done % every == 0)
        if due:
            with training.optimizer.averaged():
                if yardstick.measure(training.done, history):
                    best = adapter_tensors(policy.model)
        stop = session.stop_requested()
        if stop or training.done % config.distill.save_every == 0 or training.done == config.distill.steps:
            checkpoints.save_checkpoint(
                training.done, partial(save_step, training=training, history=history, best=best)
            )
            # Two, since the newest may turn out to be damaged.
            checkpoints.prune(2)
        if stop:
            raise Interrupted(f"Stopped after step {training.done}; everything up to there is saved.")
    with training.optimizer.averaged():
        last = adapter_tensors(policy.model)
    for strength in config.distill.adapter_strengths:
        load_adapter(policy.model, last)
        scale_adapter(policy.model, strength)
        if yardstick.measure(training.done, history, strength):
            best = adapter_tensors(policy.model)
    return training, history, best


def drawn_anchors(session: Session) -> list[Prompt]:
    """What steps draw anchors from. In an `even` mix each kind is repeated until it is about as many as the largest."""
    kinds = session.prompts.anchors(session.config.distill.twins)
    if session.config.distill.anchor_mix == "pooled":
        return [prompt for kind in kinds for prompt in kind]
    most = max(len(kind) for kind in kinds)
    return [prompt for kind in kinds for prompt in kind * round(most / len(kind))]


def _rate(tokens: int, seconds: float) -> float | None:
    return round(tokens / seconds, 1) if seconds else None


def _fit_micro_batch(session: Session, training: Distillation) -> None:
    """On a card, begin with as many rollouts a forward as its free memory is reckoned to hold, by the longest prompt."""
    config, model = session.config, session.policy.model
    if model.device.type != "cuda":
        return
    shape, free = session.base.shape, free_cuda_memory()
    element = model.decoder.embed_tokens.weight.element_size()
    longest = max(prompt.input_ids.shape[1] for prompt in (*training.harmful, *training.harmless))

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

    training.micro_batch = largest_micro_batch(config.distill.micro_batch, free, need)
    session.note(
        f"{training.micro_batch} rollouts a forward, at most {config.distill.micro_batch}: the longest takes "
        f"{format_bytes(need(1))}, {format_bytes(free)} are free."
    )


def _one_step(session: Session, training: Distillation, history: History, shown: ShownAnswers) -> None:
    before, sampled = training.micro_batch, training.sampled_at_once
    result = training.step()
    if not (math.isfinite(result.loss) and math.isfinite(result.gradient_norm) and training.optimizer.is_finite()):
        raise TrainingError(
            f"Step {result.step} has the loss {result.loss:g} and a gradient of norm {result.gradient_norm:g}: the training "
            "has diverged, and further steps would not bring it back.",
            "Start a new run with a lower distill.learning_rate; resuming this one would come to the same.",
        )
    if training.micro_batch < before:
        session.warn(
            f"Out of memory: rollouts a forward lowered from {before} to {training.micro_batch}; nothing was lost."
        )
    if training.sampled_at_once < sampled:
        session.warn(
            f"Out of memory: prompts sampled at a time lowered from {sampled} to {training.sampled_at_once}; "
            "nothing was lost."
        )
    history.micro_batch, history.sampled_at_once = training.micro_batch, training.sampled_at_once
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

"""Stage 4: distillation, measured every few steps, with the best step kept (docs/method.md, distillation)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from safesteer_lite.errors import Interrupted, RunFolderError, TrainingError
from safesteer_lite.evaluation.judges import judge
from safesteer_lite.evaluation.measure import measure
from safesteer_lite.evaluation.scorecard import Rate, Scorecard, takes_over, trade_off
from safesteer_lite.events import Metric, Progress, Sample
from safesteer_lite.hardware.known import measured_on
from safesteer_lite.hardware.machine import free_cuda_memory
from safesteer_lite.hardware.need import largest_micro_batch, training_bytes
from safesteer_lite.hardware.units import format_bytes
from safesteer_lite.method.distill import Distillation, Recipe, prompts_at
from safesteer_lite.models.adapter import adapter_tensors, freeze_reading, load_adapter, save_adapter, scale_adapter
from safesteer_lite.models.assistant import Reference, reference_answers
from safesteer_lite.models.optimizer import optimizing_on
from safesteer_lite.models.reading import read_discriminants
from safesteer_lite.prompts.plan import PromptSets, texts
from safesteer_lite.prompts.sets import KINDS, Prompt
from safesteer_lite.runs.durable import read_json, write_json
from safesteer_lite.runs.folder import Publication
from safesteer_lite.runs.steps import Checkpoints
from safesteer_lite.stages.direction import load_steering
from safesteer_lite.stages.session import ANSWER_BATCH, Session
from safesteer_lite.stages.tokens import load_tokens

# So many measurements in a row beyond the tax budget are no accident of a small sample.
_PATIENCE = 3
# As much of the base's answer as is read beside a rollout, and how many prompts ahead are answered at once: a whole batch
# takes hardly longer than one answer, so that all of them together cost less than a step's own rollouts.
_SHOWN_TOKENS, _SHOWN_AHEAD = 24, 32


@dataclass
class History:
    """What happened so far; saved with every step.

    Attributes:
        steps: one record an optimizer step.
        measured: one record a measurement on the selection split.
        scaled: one record for each strength of the last step's adapter.
        best_step: the measured step with the best trade-off; 0 is the base itself.
        best_strength: the factor on its adapter.
        best_score: its score, points.
        over_budget: measurements in a row beyond the tax budget.
        micro_batch: rollouts a forward that fitted in memory; 0 is "as configured".
        sampled_at_once: prompts sampled at a time that fitted in memory; 0 is "all of a step".
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    measured: list[dict[str, Any]] = field(default_factory=list)
    scaled: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    best_strength: float = 1.0
    best_score: float = -math.inf
    over_budget: int = 0
    micro_batch: int = 0
    sampled_at_once: int = 0


def recipe(session: Session) -> Recipe:
    """The recipe that the settings describe."""
    config = session.config.distill
    names = Recipe.__dataclass_fields__.keys() & vars(config).keys()
    return Recipe(**{name: getattr(config, name) for name in names}, seed=session.config.seed)


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
    session.note(
        f"Kept step {history.best_step} of {training.done}{strength}: the best trade-off on the selection split."
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
        [policy.encode(prompt.text) for prompt in session.prompts.training()],
        [policy.encode(prompt.text) for prompt in anchors],
        recipe(session),
        policy.token_ids(config.direction.refusal_openings),
        optimizing_on(policy.model.device),
    )
    _fit_micro_batch(session, training)
    yardstick, shown = _yardstick(session), ShownAnswers(session, training.recipe)
    history = History()
    best = adapter_tensors(policy.model)
    if saved:
        history, best = _restore(saved[1], training)
        session.note(f"Resumed after step {saved[0]} of {config.distill.steps}.")
    session.progress("steps", config.distill.steps)(training.done)
    while training.done < config.distill.steps and not _stop(session, history):
        _one_step(session, training, history, shown)
        every = config.evaluate.every
        due = training.done == config.distill.steps or (every > 0 and training.done % every == 0)
        if due:
            with training.optimizer.averaged():
                if _measure(session, training.done, yardstick, history):
                    best = adapter_tensors(policy.model)
        stop = session.stop_requested()
        if stop or training.done % config.distill.save_every == 0 or training.done == config.distill.steps:
            checkpoints.save_checkpoint(training.done, partial(_save, training=training, history=history, best=best))
            # Two, since the newest may turn out to be damaged.
            checkpoints.prune(2)
        if stop:
            raise Interrupted(f"Stopped after step {training.done}; everything up to there is saved.")
    with training.optimizer.averaged():
        last = adapter_tensors(policy.model)
    for strength in config.distill.adapter_strengths:
        load_adapter(policy.model, last)
        scale_adapter(policy.model, strength)
        if _measure(session, training.done, yardstick, history, strength):
            best = adapter_tensors(policy.model)
    return training, history, best


def prepare_adapter(session: Session, saved: Path | None) -> None:
    """Before the first step, what the settings say the adapter reads; in a resumed run, what it read then."""
    settings, policy = session.config.distill, session.policy
    if settings.reading != "discriminant":
        return
    if saved:
        load_adapter(policy.model, load_file(saved / "best.safetensors"))
        freeze_reading(policy.model)
        return
    blocks = len(policy.model.layers) - policy.model.first_adapter_layer
    harmful = texts(session.prompts.training()) + texts(session.prompts.direction()[0])
    if settings.reading_prompts == "answered":
        harmful = _answered(session, harmful)
    harmless = texts(session.prompts.anchors())
    done = session.progress("reading directions of blocks", blocks)
    read_discriminants(policy, harmful, harmless, settings.reading_ridge, ANSWER_BATCH, done)
    session.note(
        f"Reading directions from {len(harmful)} harmful and {len(harmless)} harmless prompts: what the adapter reads is "
        "set, what it writes is trained."
    )


def _answered(session: Session, harmful: list[str]) -> list[str]:
    """The harmful prompts that the base answers, which are what training has to change; all, where those are too few."""
    policy = session.policy
    done = session.progress("harmful prompts answered", len(harmful))
    with policy.model.adapters_off():
        answers = policy.answers(harmful, session.config.evaluate.selection_tokens, ANSWER_BATCH, done)
    answered = [text for text, answer in zip(harmful, answers, strict=True) if not judge(answer).refused]
    if len(answered) < session.config.direction.minimum_prompts:
        session.note(f"The base answers only {len(answered)} of {len(harmful)} harmful prompts: all of them are read.")
        return harmful
    session.note(f"The base answers {len(answered)} of {len(harmful)} harmful prompts: these are read.")
    return answered


def drawn_anchors(session: Session) -> list[Prompt]:
    """What steps draw anchors from. In an `even` mix the smaller kind is repeated until it is about as many as the larger."""
    anchors = session.prompts.anchors()
    everyday = session.prompts.direction()[1]
    borderline = anchors[len(everyday) :]
    if session.config.distill.anchor_mix == "pooled" or not everyday or not borderline:
        return anchors
    fewer, more = sorted((everyday, borderline), key=len)
    return fewer * round(len(more) / len(fewer)) + more


def _rate(tokens: int, seconds: float) -> float | None:
    return round(tokens / seconds, 1) if seconds else None


def _fit_micro_batch(session: Session, training: Distillation) -> None:
    """On a card, begin with as many rollouts a forward as its free memory is reckoned to hold."""
    config, model = session.config, session.policy.model
    if model.device.type != "cuda":
        return
    shape, free = session.base.shape, free_cuda_memory()
    element = model.decoder.embed_tokens.weight.element_size()

    def need(rollouts: int) -> int:
        return training_bytes(
            shape,
            micro_batch=rollouts,
            tokens=config.prompts.prompt_tokens + config.distill.completion_tokens,
            completion_tokens=config.distill.completion_tokens,
            chunk=config.distill.chunk,
            rank=config.distill.rank,
            element=element,
            checkpointing=model.checkpointing,
        )

    training.micro_batch = largest_micro_batch(config.distill.micro_batch, free, need)
    session.note(
        f"{training.micro_batch} rollouts a forward, at most {config.distill.micro_batch}: one of full length takes "
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


class ShownAnswers:
    """What the base answers to the prompt that each step shows: the beginning, once a prompt.

    Which prompts those are follows from the seed, so the next few are answered together, when the first of them is shown.
    """

    def __init__(self, session: Session, recipe: Recipe) -> None:
        self._session, self._recipe = session, recipe
        self._known: dict[int, str] = {}

    def of_step(self, step: int) -> str:
        """The base's greedy answer to the first prompt of step `step`, counted from 0."""
        prompt = self._prompt(step)
        if prompt not in self._known:
            ahead = range(step, min(step + _SHOWN_AHEAD, self._recipe.steps))
            wanted = sorted({prompt, *map(self._prompt, ahead)} - self._known.keys())
            asked = [self._session.prompts.training()[index].text for index in wanted]
            policy = self._session.policy
            with policy.model.adapters_off():
                answers = policy.answers(asked, _SHOWN_TOKENS, _SHOWN_AHEAD)
            self._known.update(zip(wanted, answers, strict=True))
        return self._known[prompt]

    def _prompt(self, step: int) -> int:
        return prompts_at(step, self._recipe.prompts, len(self._session.prompts.training()), self._recipe.seed)[0]


@dataclass(frozen=True)
class _Yardstick:
    """What the student is measured by: the selection split, the base's answers to it, and the base's scorecard."""

    sets: PromptSets
    reference: Reference
    start: Scorecard


def _yardstick(session: Session) -> _Yardstick:
    sets = session.prompts.split("selection")
    with session.policy.model.adapters_off():
        reference = reference_answers(
            session.policy, texts(sets.harmless), session.config.evaluate.kl_tokens, ANSWER_BATCH
        )
    return _Yardstick(sets, reference, baseline_card(session))


def _measure(session: Session, step: int, yardstick: _Yardstick, history: History, strength: float = 1.0) -> bool:
    """Measure the student on the selection split; True if it has the best trade-off so far."""
    settings, start, reference = session.config.evaluate, yardstick.start, yardstick.reference
    chunk = session.config.distill.chunk
    done = session.progress("answers", yardstick.sets.total)
    card, _ = measure(session.policy, yardstick.sets, settings.selection_tokens, ANSWER_BATCH, reference, chunk, done)
    score = trade_off(start, card, settings.tax_budget)
    whole = strength == 1
    record = {"step": step, "strength": strength, "score": round(score, 3), **card.to_record()}
    (history.measured if whole else history.scaled).append(record)
    suffix = "" if whole else f" at strength {strength:g}"
    for name in KINDS:
        rate: Rate = getattr(card, name)
        session.emit(Metric(session.stage, f"{name} refused{suffix}", rate.share, rate.n, step))
    if card.kl_to_base is not None:
        session.emit(Metric(session.stage, f"KL to base{suffix}", card.kl_to_base, reference.positions, step))
    if whole:
        tax = 100 * max(card.borderline.share - start.borderline.share, card.harmless.share - start.harmless.share)
        history.over_budget = history.over_budget + 1 if tax > settings.tax_budget else 0
    # `adapter_strengths` says which strength comes last.
    if takes_over(score, history.best_score):
        history.best_step, history.best_strength, history.best_score = step, strength, score
        return True
    return False


def _stop(session: Session, history: History) -> bool:
    if session.config.evaluate.stop_on_tax and history.over_budget >= _PATIENCE:
        session.warn(f"Stopped early: over-refusal was beyond the budget {_PATIENCE} measurements in a row.")
        return True
    return False


def baseline_card(session: Session) -> Scorecard:
    """The base's scorecard on the selection split, from the baseline stage."""
    return replace(Scorecard.from_record(session.result("baseline")["scorecard"]), kl_to_base=0.0)


def _save(folder: Path, training: Distillation, history: History, best: dict[str, Tensor]) -> None:
    save_file(training.optimizer.state(), folder / "optimizer.safetensors")
    save_file(best, folder / "best.safetensors")
    # JSON has no infinity, and before the first measurement the best score is minus that.
    record = asdict(history)
    record["best_score"] = history.best_score if math.isfinite(history.best_score) else None
    write_json(folder / "history.json", {"done": training.done, **record})


def _restore(folder: Path, training: Distillation) -> tuple[History, dict[str, Tensor]]:
    hint = f"Delete {folder.parent} and resume: training then begins anew."
    record = read_json(folder / "history.json", "what happened until a saved step", hint=hint)
    try:
        training.done = int(record.pop("done"))
        if record["best_score"] is None:
            record["best_score"] = -math.inf
        history = History(**record)
        training.optimizer.load(load_file(folder / "optimizer.safetensors"))
        best = load_file(folder / "best.safetensors")
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise RunFolderError(f"The saved step in {folder} is damaged: {error}.", hint) from error
    training.micro_batch = min(history.micro_batch or training.micro_batch, training.micro_batch)
    training.sampled_at_once = history.sampled_at_once or training.sampled_at_once
    return history, best

"""What the stages of one run share: settings, the run folder, the loaded model, the prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

from safesteer_lite.config import RunConfig
from safesteer_lite.errors import ModelError, PromptError
from safesteer_lite.evaluation.measure import PromptSets
from safesteer_lite.events import Emit, Note, Progress, Warned, discard
from safesteer_lite.hardware.backend import Decision, choose_backend
from safesteer_lite.hardware.machine import inspect
from safesteer_lite.hardware.shape import shape_from_config
from safesteer_lite.models import loaded, unsloth
from safesteer_lite.models.adapter import Adapter, with_adapter
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.selfcheck import self_check
from safesteer_lite.prompts import sets
from safesteer_lite.prompts.sets import Kind, Prompt
from safesteer_lite.runs.folder import RunFolder

# Answers decoded at a time: more fill the matrix units no better, and each takes key-value cache.
ANSWER_BATCH = 64


@dataclass
class Session:
    """One run in progress.

    Attributes:
        config: all settings.
        run: the run folder.
        model_folder: where the base model lies.
        emit: the sink for events.
        stage: the stage at work, which events are told to belong to.
        stop_requested: whether the user asked to stop; looked at after each optimizer step and each stage.
    """

    config: RunConfig
    run: RunFolder
    model_folder: Path
    emit: Emit
    stage: str = ""
    stop_requested: Callable[[], bool] = lambda: False
    _policy: Policy | None = field(default=None, repr=False)
    _training: list[Prompt] = field(default_factory=list, repr=False)

    def note(self, message: str) -> None:
        """Tell a decision with its reason."""
        self.emit(Note(self.stage, message))

    def warn(self, message: str) -> None:
        """Tell something the user should know."""
        self.emit(Warned(self.stage, message))

    def progress(self, what: str, total: int) -> Callable[[int], None]:
        """A callback that reports how many of `total` are done."""
        stage = self.stage
        return lambda done: self.emit(Progress(stage, what, done, total))

    def result(self, stage: str) -> dict[str, Any]:
        """What a published stage left in the manifest."""
        return self.run.manifest.stages[stage].result

    def folder(self, stage: str) -> Path:
        """The folder of a published stage."""
        return self.run.stage_folder(stage)

    @property
    def day(self) -> date:
        """The day on which the run began: what a chat template that asks the date is told, however long the run takes."""
        if not (self.run.path / "manifest.json").is_file():
            return date.today()
        return datetime.fromisoformat(self.run.manifest.created).date()

    @property
    def policy(self) -> Policy:
        """The loaded model with a fresh adapter; loaded and checked at first use."""
        if self._policy is None:
            self._policy = self._load()
        return self._policy

    def drop_policy(self) -> None:
        """Forget the loaded model, so that its memory can be used for something else."""
        self._policy = None
        # What is loaded next may be a plain model, which Unsloth's changes to transformers would break.
        unsloth.restore_transformers()

    def _load(self) -> Policy:
        distill, folder = self.config.distill, self.model_folder
        loaded.check_template(folder, self.day)
        decision = decide(self.config, folder, self.run.path)
        self.note(decision.reason)
        layers = shape_from_config(loaded.read_config(folder)).layers
        lowest = min(layers - 1, round(distill.depth_start * layers))
        adapter = Adapter(distill.rank, distill.lora_alpha, lowest)
        if self._trusts_unsloth(decision):
            model: loaded.PlainModel = unsloth.load(folder, decision.precision, adapter, self.config.seed)
        else:
            network, tokenizer = loaded.load(
                folder,
                precision=decision.precision,
                device=decision.device,
                unpack=decision.unpack,
                compute=decision.compute_dtype,
            )
            model = with_adapter(network, tokenizer, adapter, self.config.seed)
        model.checkpointing = distill.checkpointing == "yes" or (
            distill.checkpointing == "auto" and decision.device == "cuda"
        )
        policy = Policy(model, self.config.prompts.prompt_tokens, self.day)
        for note in policy.notes:
            self.note(note)
        passed = self_check(policy)
        self.note(f"Self-check: {len(passed)} of {len(passed)} passed ({'; '.join(passed)}).")
        return policy

    def _trusts_unsloth(self, decision: Decision) -> bool:
        """Whether Unsloth is chosen and passes its checks; says why, or why not."""
        if decision.library.name == "plain":
            self.note(decision.library.reason)
            return False
        if self.config.distill.reading == "discriminant" and self.config.model.backend == "auto":
            self.note(
                "Plain transformers and bitsandbytes: whether Unsloth's fused blocks show what their linear layers read, which "
                "distill.reading=discriminant needs, has not been tried."
            )
            return False
        problem = unsloth.problem_with(self.model_folder, decision.precision)
        if not problem:
            self.note(f"{decision.library.reason.split(',')[0]}: it passes its checks on a small model of this kind.")
            return True
        if self.config.model.backend == "unsloth":
            raise ModelError(f"Unsloth cannot be used: {problem}.", "Set model.backend=plain.")
        self.note(f"Plain transformers and bitsandbytes instead of Unsloth: {problem}.")
        return False

    def prompt_sets(self, split: str) -> PromptSets:
        """The `selection` or `test` split."""
        limits = self.config.prompts
        common, borderline = (
            (limits.selection, limits.borderline_selection)
            if split == "selection"
            else (limits.test, limits.borderline_test)
        )
        return PromptSets(
            self._take("harmful", split, common),
            self._take("borderline", split, borderline),
            self._take("harmless", split, common),
        )

    def direction_prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        """Harmful and harmless prompts that the direction is estimated from."""
        count = self.config.prompts.direction
        return self._take("harmful", "direction", count), self._take("harmless", "direction", count)

    def anchor_prompts(self) -> list[Prompt]:
        """Harmless prompts on which the student is held to the base: the direction's, and borderline ones for contrast."""
        contrast = self.config.prompts.contrast
        return self.direction_prompts()[1] + (self._take("borderline", "train", contrast) if contrast else [])

    def training_prompts(self) -> list[Prompt]:
        """The harmful prompts to train on: bundled, or the user's without what the evaluation sets hold."""
        # Read once: the loop asks at every step, and a file that changes meanwhile must not change the run.
        if not self._training:
            if self.config.prompts.training or self.config.prompts.folder:
                self._training = own_prompts(self.config, self.note)
            else:
                self._training = self._take("harmful", "train", self.config.prompts.train)
        return self._training

    def _take(self, kind: Kind, split: str, count: int) -> list[Prompt]:
        return sets.prompt_set(kind, split, count, self.config.prompts.folder)


def decide(config: RunConfig, model_folder: Path, folder: Path) -> Decision:
    """How the model will be loaded on this machine; cheap, so that a run is refused before its folder is made.

    Args:
        config: all settings.
        model_folder: the base model.
        folder: where the run goes.

    Raises:
        ModelError: the settings ask for a device that is not there.
        OutOfMemoryError: the model does not fit.
    """
    settings, machine = config.model, inspect(folder)
    if settings.device == "cuda" and machine.gpu is None:
        raise ModelError("There is no usable CUDA device.", "Set model.device=cpu, or see `safesteer-lite doctor`.")
    if settings.device == "cpu":
        machine = replace(machine, gpus=())
    shape = shape_from_config(loaded.read_config(model_folder))
    decision = choose_backend(machine, shape, settings.precision, settings.backend)
    return decision if settings.unpack == "auto" else replace(decision, unpack=settings.unpack == "yes")


def check_prompts(config: RunConfig) -> None:
    """Read every prompt that a run will need.

    Raises:
        PromptError: a file is missing or malformed, or a split is.
    """
    session = Session(config, RunFolder(Path()), Path(), discard)
    session.prompt_sets("selection")
    session.prompt_sets("test")
    session.anchor_prompts()
    session.training_prompts()


def own_prompts(config: RunConfig, note: Callable[[str], None]) -> list[Prompt]:
    """A user's prompts to train on, without those that (nearly) equal one that is evaluated on.

    Raises:
        PromptError: a file is missing or malformed, or nothing is left.
    """
    settings = config.prompts
    if settings.training:
        place = Path(settings.training)
        loaded = sets.load_prompts(place, settings.column or None)
        given, columns, duplicates = loaded.prompts, loaded.columns, loaded.duplicates_removed
    else:
        place = Path(settings.folder)
        given = sets.prompt_set("harmful", "train", settings.train, settings.folder)
        columns, duplicates = ("prompt",), 0
    held_out = [
        prompt
        for split in ("selection", "test")
        for prompt in sets.prompt_set("harmful", split, folder=settings.folder)
    ]
    leaks = {leak.prompt.id for leak in sets.check_leaks(given, held_out)}
    kept = [prompt for prompt in given if prompt.id not in leaks]
    origin = f" from column{'s' * (len(columns) > 1)} {' and '.join(columns)}" if columns else ""
    note(
        f"{place.name}: {len(kept)} prompts{origin}; {duplicates} duplicates "
        f"and {len(leaks)} near-copies of evaluation prompts left out."
    )
    if not kept:
        raise PromptError(
            f"{place} has no prompt left to train on.", "Give prompts that the evaluation sets do not hold."
        )
    return kept


def texts(entries: Sequence[Prompt]) -> list[str]:
    """The prompts as text."""
    return [entry.text for entry in entries]

"""What the stages of one run share: settings, the run folder, the loaded model, the prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safesteer_lite import hardware, prompts
from safesteer_lite.config import RunConfig
from safesteer_lite.errors import ModelError, PromptError
from safesteer_lite.evaluation.measure import PromptSets
from safesteer_lite.events import Emit, Note, Progress, Warned
from safesteer_lite.models import plain
from safesteer_lite.models.policy import Policy
from safesteer_lite.models.selfcheck import self_check
from safesteer_lite.prompts import Prompt
from safesteer_lite.rundir import RunFolder

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
    def policy(self) -> Policy:
        """The loaded model with a fresh adapter; loaded and checked at first use."""
        if self._policy is None:
            self._policy = self._load()
        return self._policy

    def drop_policy(self) -> None:
        """Forget the loaded model, so that its memory can be used for something else."""
        self._policy = None

    def _load(self) -> Policy:
        config = self.config.model
        machine = hardware.inspect(self.run.path)
        if config.device == "cuda" and machine.gpu is None:
            raise ModelError("There is no usable CUDA device.", "Set model.device=cpu, or see `safesteer-lite doctor`.")
        if config.device == "cpu":
            machine = replace(machine, gpus=())
        shape = hardware.shape_from_config(plain.read_config(self.model_folder))
        decision = hardware.choose_backend(machine, shape, config.precision)
        if config.unpack != "auto":
            decision = replace(decision, unpack=config.unpack == "yes")
        self.note(decision.reason)
        network, tokenizer = plain.load(
            self.model_folder,
            precision=decision.precision,
            device=decision.device,
            unpack=decision.unpack,
            compute=decision.compute_dtype,
        )
        distill = self.config.distill
        depth = shape.layers
        if distill.first_layer >= depth:
            raise ModelError(
                f"distill.first_layer is {distill.first_layer}, but the model has {depth} layers.",
                f"Choose a layer from 0 to {depth - 1}.",
            )
        adapter = plain.Adapter(distill.rank, distill.lora_alpha, distill.first_layer)
        policy = Policy(
            plain.with_adapter(network, tokenizer, adapter, self.config.seed), self.config.prompts.prompt_tokens
        )
        passed = self_check(policy)
        self.note(f"Self-check: {len(passed)} of {len(passed)} passed ({'; '.join(passed)}).")
        return policy

    def prompt_sets(self, split: str) -> PromptSets:
        """The `selection` or `test` split."""
        limits = self.config.prompts
        common, borderline = (
            (limits.selection, limits.borderline_selection)
            if split == "selection"
            else (limits.test, limits.borderline_test)
        )
        return PromptSets(
            prompts.bundled("harmful", split, common),
            prompts.bundled("borderline", split, borderline),
            prompts.bundled("harmless", split, common),
        )

    def direction_prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        """Harmful and harmless prompts that the direction is estimated from."""
        count = self.config.prompts.direction
        return prompts.bundled("harmful", "direction", count), prompts.bundled("harmless", "direction", count)

    def anchor_prompts(self) -> list[Prompt]:
        """Harmless prompts on which the student is held to the base: the direction's, and borderline ones for contrast."""
        contrast = self.config.prompts.contrast
        return self.direction_prompts()[1] + (prompts.bundled("borderline", "train", contrast) if contrast else [])

    def training_prompts(self) -> list[Prompt]:
        """The harmful prompts to train on: bundled, or the user's without what the evaluation sets hold."""
        settings = self.config.prompts
        if not settings.training:
            return prompts.bundled("harmful", "train", settings.train)
        # Read once: the loop asks at every step, and a file that changes meanwhile must not change the run.
        if not self._training:
            self._training = own_prompts(Path(settings.training), settings.column, self.note)
        return self._training


def own_prompts(path: Path, column: str, note: Callable[[str], None]) -> list[Prompt]:
    """A user's prompt file, without prompts that (nearly) equal one that is evaluated on."""
    loaded = prompts.load_prompts(path, column or None)
    held_out: list[Prompt] = []
    for split in ("selection", "test"):
        held_out += prompts.bundled("harmful", split)
    leaks = {leak.prompt.id for leak in prompts.check_leaks(loaded.prompts, held_out)}
    kept = [prompt for prompt in loaded.prompts if prompt.id not in leaks]
    note(
        f"{path.name}: {len(kept)} prompts from column {loaded.column or 'text'}; {loaded.duplicates_removed} duplicates "
        f"and {len(leaks)} near-copies of evaluation prompts left out."
    )
    if not kept:
        raise PromptError(
            f"{path} has no prompt left to train on.", "Give prompts that the evaluation sets do not hold."
        )
    return kept


def texts(entries: Sequence[Prompt]) -> list[str]:
    """The prompts as text."""
    return [entry.text for entry in entries]

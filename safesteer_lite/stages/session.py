"""What the stages of one run share: settings, the run folder, the base model, the prompts, the sink."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from safesteer_lite.config import RunConfig
from safesteer_lite.errors import RunFolderError
from safesteer_lite.evaluation.scorecard import Scorecard, cut_in_thought
from safesteer_lite.events import Emit, Metric, Note, Progress, Warned
from safesteer_lite.hardware.allocator import return_freed_memory
from safesteer_lite.hardware.backend import Decision, decide
from safesteer_lite.hardware.kept import decide_alike, to_record
from safesteer_lite.hardware.peaks import Demand, cache_bytes
from safesteer_lite.method.memory import release
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.loading import load_policy
from safesteer_lite.prompts.contexts import Conversation, partly_in_contexts
from safesteer_lite.prompts.plan import PromptPlan, texts
from safesteer_lite.prompts.sets import KINDS, Prompt
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.sources.base import Base

ANSWER_BATCH = 64
"""Answers decoded at a time, at least."""

# What a larger batch's key-value cache may take with answers of the usual length, prompts included: a CPU that has too little
# memory does not tell.
_CACHE_BYTES, _USUAL_TOKENS = 2**30, 256

SPARE_TOKENS = 16
"""Room for what llama.cpp may add around a prompt, in tokens."""
THOUGHTS = "thoughts.json"
"""What the base thought before it answered, by prompt, as token ids: a file of the first stage, where the model thinks."""

_AGAIN = "Start a new run, or restore the file from a copy."


@dataclass
class Session:
    """One run in progress; as a context manager it gives the loaded model's memory back at the end.

    Attributes:
        config: all settings.
        run: the run folder.
        base: the base model.
        emit: the sink for events.
        stage: the stage at work, which events are told to belong to.
        stop_requested: whether the user asked to stop; looked at after each optimizer step and each stage.
        decision: how the base is loaded; None to decide when it is needed first, for a run that keeps how it was loaded in
            the same precision.
        trainer: whether this is the process that only trains, with the library decided for it, and tells nothing twice.
        fitted: what fitted where memory ran out, as the policy remembers it: of every model that the session loads, and of the
            run so far where that goes on.
        prompts: the prompts that the settings ask for.
    """

    config: RunConfig
    run: RunFolder
    base: Base
    emit: Emit
    stage: str = ""
    stop_requested: Callable[[], bool] = lambda: False
    decision: Decision | None = None
    trainer: bool = False
    fitted: dict[int, int] = field(default_factory=dict)
    prompts: PromptPlan = field(init=False, repr=False)
    _policy: Policy | None = field(default=None, repr=False)
    _loaded: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        self.prompts = PromptPlan(self.config.prompts, self._untold if self.trainer else self.note)

    def note(self, message: str) -> None:
        """Tell a decision with its reason."""
        self.emit(Note(self.stage, message))

    def warn(self, message: str) -> None:
        """Tell something the user should know."""
        self.emit(Warned(self.stage, message))

    def tell_rates(self, card: Scorecard, said: str = "", step: int | None = None) -> None:
        """Tell what a model refuses of each kind of prompts that it answered.

        Args:
            card: what was measured.
            said: of which model, behind the words of each rate.
            step: the optimizer step, where it is one of several.
        """
        for name in KINDS:
            if (rate := card.of(name)).n:
                self.emit(Metric(self.stage, f"{name} refused{said}", rate.share, rate.n, step))
        if cut := cut_in_thought({"of the answers": card.to_record()}):
            self.note(cut)

    def progress(self, what: str, total: int) -> Callable[[int], None]:
        """A callback that reports how many of `total` are done."""
        stage = self.stage
        return lambda done: self.emit(Progress(stage, what, done, total))

    def result(self, stage: str) -> dict[str, Any]:
        """What a published stage left in the manifest."""
        return self.run.record(stage).result

    def tensors(self, stage: str, name: str) -> dict[str, Tensor]:
        """The tensors of a published file, which is what was published and holds finite numbers only.

        Raises:
            RunFolderError: it is missing, was changed, or is no such file.
        """
        try:
            found = load(self.run.read(stage, name))
        except SafetensorError as error:
            raise RunFolderError(f"{name} of the {stage} stage holds no tensors: {error}.", _AGAIN) from error
        if not all(tensor.isfinite().all() for tensor in found.values()):
            raise RunFolderError(f"{name} of the {stage} stage holds values that are not finite.", _AGAIN)
        return found

    @property
    def day(self) -> date:
        """The day on which the run began: what a chat template that asks the date is told, however long the run takes."""
        if not self._is_run:
            return date.today()
        return date.fromisoformat(self.run.manifest.run_date)

    def settle(self) -> Decision:
        """How the base is loaded. Decided once: a stage's numbers must not depend on how much memory was free just then, and
        no more what a run's models are asked later on."""
        if self.decision is None:
            about = (self.config.model, self.base.shape, self.run.path, Demand.of(self.config))
            if loaded := self.run.manifest.loaded if self._is_run else {}:
                return_freed_memory()
                self.decision = decide_alike(loaded, *about)
                if to_record(self.decision) != loaded:
                    self.warn(
                        "The models are loaded in the run's precision, but on another device or packed otherwise than when it "
                        "began: figures may differ in their last digits."
                    )
            else:
                self.decision = decide(*about)
        return self.decision

    @property
    def answer_batch(self) -> int:
        """Answers decoded at a time: on a CPU twice as many where the model is small, which takes 9 to 14 % less time
        (docs/research/log.md, 2026-11-27, "twice as many answers at a time"); on a card it was not measured."""
        decision, many = self.settle(), 2 * ANSWER_BATCH
        element = 4 if decision.compute_dtype == "fp32" else 2
        tokens = _USUAL_TOKENS + Demand.of(self.config).thinking_tokens
        small = cache_bytes(self.base.shape, many, tokens, element) <= _CACHE_BYTES
        return many if small and decision.device == "cpu" else ANSWER_BATCH

    @property
    def _is_run(self) -> bool:
        return (self.run.path / "manifest.json").is_file()

    @property
    def policy(self) -> Policy:
        """The loaded model with a fresh adapter; loaded and checked at first use."""
        if self._policy is None:
            decision = self.settle()
            library = decision.library.name if self.trainer else "plain"
            # What is loaded again is loaded as before.
            note = self._untold if self.trainer or self._loaded else self.note
            self._policy = load_policy(self.base, decision, self.config, self.day, note, library)
            self._policy.fitted = self.fitted
            self._remember_thoughts(self._policy)
            self._loaded = True
        return self._policy

    def _remember_thoughts(self, policy: Policy) -> None:
        """What the base thought of the prompts in the first stage stays what it was, in whichever process."""
        if policy.thoughts is None or not self._is_run:
            return
        measured = self.run.manifest.stages.get("baseline")
        # A run that was trained without thoughts has none, and may be measured with them all the same.
        if measured and THOUGHTS in measured.artifacts:
            for entry in self.run.read_json("baseline", THOUGHTS):
                turns = tuple((user, assistant) for user, assistant in entry["turns"])
                policy.thoughts.known[Conversation(entry["prompt"], entry["system"], turns)] = entry["ids"]

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop_policy()

    def anchors(self) -> list[list[Prompt]]:
        """The harmless prompts on which the student is held to the base, by kind."""
        return self.prompts.anchors(self.config.distill.critical, self.config.distill.twins)

    def asked(self, prompts: Sequence[Prompt]) -> list[str | Conversation]:
        """What is asked of the model when it trains: the prompts, a share of them in contexts (`distill.contexts`)."""
        share = self.config.distill.contexts
        return partly_in_contexts(texts(prompts), share)

    def drop_policy(self) -> None:
        """Forget the loaded model, and give its memory back."""
        self._policy = None
        # A model and its adapter refer to each other, so that they outlive the last name for them.
        gc.collect()
        release()

    def _untold(self, message: str) -> None:
        """What has been told already."""

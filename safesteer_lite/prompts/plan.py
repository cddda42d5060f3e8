"""Which prompts one run uses, and for what: to find the direction, to train, to hold the student to the base, to measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from safesteer_lite.config import PromptsConfig
from safesteer_lite.errors import PromptError
from safesteer_lite.prompts import sets
from safesteer_lite.prompts.sets import KINDS, Kind, Prompt


def _say_nothing(message: str) -> None:
    """For callers that want the prompts and no word about them."""


@dataclass(frozen=True)
class PromptSets:
    """The prompts of one split."""

    harmful: Sequence[Prompt]
    borderline: Sequence[Prompt]
    harmless: Sequence[Prompt]
    twin: Sequence[Prompt] = ()
    critical: Sequence[Prompt] = ()

    def of(self, kind: Kind) -> Sequence[Prompt]:
        """The prompts of one kind."""
        found: Sequence[Prompt] = getattr(self, kind)
        return found

    def texts(self, kind: Kind) -> list[str]:
        """The prompts of one kind, as text."""
        return texts(self.of(kind))

    def first(self, count: int) -> PromptSets:
        """At most so many of each kind, spread evenly over the categories."""
        return PromptSets(**{kind: self.of(kind)[:count] for kind in KINDS})

    def without(self, kinds: Iterable[Kind]) -> PromptSets:
        """The prompts of all kinds but these."""
        return replace(self, **{kind: () for kind in kinds})

    @property
    def total(self) -> int:
        """How many prompts there are."""
        return sum(len(self.of(kind)) for kind in KINDS)


class PromptPlan:
    """The prompts of one run, as its settings ask for them."""

    def __init__(self, settings: PromptsConfig, note: Callable[[str], None] = _say_nothing) -> None:
        """Plan; nothing is read yet.

        Args:
            settings: the section `prompts`.
            note: is told what a user's own file gave, and what was left out of it.
        """
        self._settings, self._note = settings, note
        self._training: list[Prompt] = []

    def check(self) -> list[Prompt]:
        """Read every prompt that a run will need, and give them, each once.

        Raises:
            PromptError: a file is missing or malformed, or a split is.
        """
        measured = [prompts for name in ("selection", "test") for prompts in vars(self.split(name)).values()]
        return list(dict.fromkeys(chain(*measured, *self.direction(), *self.anchors(), self.training())))

    def split(self, name: str) -> PromptSets:
        """The prompts to measure on: the `selection` or `test` split; as many twins as borderline ones, and at most
        as many critical ones to test."""
        limits = self._settings
        common, borderline, critical = (
            (limits.selection, limits.borderline_selection, limits.critical_selection)
            if name == "selection"
            else (limits.test, limits.borderline_test, limits.borderline_test)
        )
        found = PromptSets(
            self._take("harmful", name, common),
            self._take("borderline", name, borderline),
            self._take("harmless", name, common),
        )
        if name not in ("selection", "test"):  # One that a folder of one's own may have: nothing more is known of it.
            return found
        return replace(
            found, twin=self._take("twin", name, borderline), critical=self._take("critical", name, critical)
        )

    def direction(self) -> tuple[list[Prompt], list[Prompt]]:
        """Harmful and harmless prompts that the direction is estimated from."""
        count = self._settings.direction
        return self._take("harmful", "direction", count), self._take("harmless", "direction", count)

    def anchors(self, critical: int = 0, twins: int = 0) -> list[list[Prompt]]:
        """Harmless prompts on which the student is held to the base, by kind: the direction's, borderline ones, and more.

        Args:
            critical: how many of the requests for help in danger.
            twins: how many of the harmless prompts in the words of harmful ones: those of the training prompts, then those of
                the direction's.
        """
        wanted: list[tuple[Kind, int]] = [("borderline", self._settings.contrast), ("critical", critical)]
        kinds = [self.direction()[1], *(self._take(kind, "train", count) for kind, count in wanted if count)]
        if twins:
            of_training = self._take("twin", "train", twins)
            rest = twins - len(of_training)
            kinds.append([*of_training, *(self._take("twin", "direction", rest) if rest else ())])
        return kinds

    def training(self) -> list[Prompt]:
        """The harmful prompts to train on: bundled, or the user's without what the evaluation sets hold.

        Raises:
            PromptError: a file is missing or malformed, or nothing is left.
        """
        # Read once: the loop asks at every step, and a file that changes meanwhile must not change the run.
        if not self._training:
            if self._settings.training or self._settings.folder:
                self._training = self._own()
            else:
                self._training = self._take("harmful", "train", self._settings.train)
        return self._training

    def _own(self) -> list[Prompt]:
        """A user's prompts to train on, without those that (nearly) equal one that is evaluated on."""
        settings = self._settings
        if settings.training:
            place = Path(settings.training)
            loaded = sets.load_prompts(place, settings.column or None)
            given, columns, duplicates = loaded.prompts, loaded.columns, loaded.duplicates_removed
        else:
            place = Path(settings.folder)
            given, columns, duplicates = self._take("harmful", "train", settings.train), ("prompt",), 0
        held_out = [
            prompt
            for split in ("selection", "test")
            for prompt in sets.prompt_set("harmful", split, folder=settings.folder)
        ]
        leaks = {leak.prompt.id for leak in sets.check_leaks(given, held_out)}
        kept = [prompt for prompt in given if prompt.id not in leaks]
        origin = f" from column{'s' * (len(columns) > 1)} {' and '.join(columns)}" if columns else ""
        self._note(
            f"{place.name}: {len(kept)} prompts{origin}; {duplicates} duplicates "
            f"and {len(leaks)} near-copies of evaluation prompts left out."
        )
        if not kept:
            raise PromptError(
                f"{place} has no prompt left to train on.", "Give prompts that the evaluation sets do not hold."
            )
        return kept

    def _take(self, kind: Kind, split: str, count: int) -> list[Prompt]:
        return sets.prompt_set(kind, split, count, self._settings.folder)


def texts(entries: Sequence[Prompt]) -> list[str]:
    """The prompts as text."""
    return [entry.text for entry in entries]

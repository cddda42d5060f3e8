"""A rehearsal of an export: what could not be written is found, and named all at once, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import TypeVar

from safesteer_lite.config.sections import Thinking
from safesteer_lite.errors import DiskSpaceError, ExportError, SafeSteerError
from safesteer_lite.export import drafts
from safesteer_lite.export.gguf import convert, modelfile, quantise
from safesteer_lite.export.weights import shards, verify
from safesteer_lite.export.weights.base import Weights
from safesteer_lite.export.weights.merge import plan_merge

_Result = TypeVar("_Result")

# Bytes a weight, to see whether the disk has room; those of `MIXES` where no matrix divides into blocks of 256 columns.
_BYTES_A_WEIGHT = {"F16": 2.0, "Q8_0": 1.07, "Q6_K": 1.07, "Q5_K_M": 1.0, "Q4_K_M": 0.9}


def rehearse(
    base: Path,
    out: Path,
    weights: Weights,
    day: date,
    *,
    words: Path | None = None,
    thinking: Thinking = "auto",
    original: Path | None = None,
    quants: Sequence[str] = (),
) -> None:
    """Do everything that an export does but read weights and write them; seconds where GGUF files are asked for.

    Args:
        base: the model that is, or was, trained on.
        out: where the export goes; it need not exist yet.
        weights: what will be merged into.
        day: what a chat template that asks the date is told.
        words: the folder with its tokenizer and chat template; None for the model's own.
        thinking: whether the model thinks before it answers.
        original: the 16-bit weights of a base that is itself in 4 bits; None if they are not used.
        quants: the GGUF files to write; none for merged weights alone.

    Raises:
        ExportError: the export would fail; the message names everything that is in its way.
        DiskSpaceError: nothing but room is missing.
    """
    faults, own = _Faults(), words or base
    plan = faults.of(lambda: plan_merge(original or base, {}, weights=weights, words=own))
    faults.add(*(verify.check_form(plan.config, plan.tensors, own).problems if plan else verify.check_words(own)[1]))
    if not faults.told:
        # What a tokenizer that is damaged makes of a template is of no interest.
        faults.of(lambda: modelfile.read_chat(own, day, thinking))
    if plan:
        needed = plan.room
        if quants:
            # The 16-bit file that smaller ones are made from comes on top.
            shares = sum(_BYTES_A_WEIGHT[quant] for quant in quants) + 2 * bool(quantise.MIXES.keys() & set(quants))
            needed += int(plan.size * shares / 2)
        try:
            drafts.require_space(out, needed, "what is exported")
        except DiskSpaceError as error:
            if not faults.told:
                raise
            faults.add(error.message.rstrip("."), hint=error.hint)
    if quants:
        _rehearse_gguf(own, quants, faults)
    if faults.told:
        count = f"{len(faults.told)} reasons" if len(faults.told) > 1 else "one reason"
        raise ExportError(
            f"What is made of {base} could not be exported, for {count}: {'; '.join(faults.told)}.", faults.hint
        )


def _rehearse_gguf(base: Path, quants: Sequence[str], faults: _Faults) -> None:
    if quantise.MIXES.keys() & set(quants):
        faults.of(lambda: quantise.check_quantisable(shards.read_json(base / "config.json")))
    faults.of(lambda: convert.check_extra(tuple(quants)))
    # Whether the converter knows the tokenizer takes seconds to find out, and is of no use where something else is missing.
    if not faults.told:
        faults.of(lambda: convert.try_tokenizer(base))


class _Faults:
    """What was found to be in the way, with the advice that came with the first of it."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self._hint = ""

    @property
    def hint(self) -> str:
        """What to do."""
        return (
            self._hint or "Give a complete model in 16 bits, with the fast tokenizer that transformers saves beside it."
        )

    def add(self, *clauses: str, hint: str = "") -> None:
        """Note faults, a clause each."""
        self.told += clauses
        self._hint = self._hint or hint

    def of(self, work: Callable[[], _Result]) -> _Result | None:
        """Do something; None, and the fault is noted, where it fails."""
        try:
            return work()
        except SafeSteerError as error:
            self.add(error.message.rstrip("."), hint=error.hint)
            return None

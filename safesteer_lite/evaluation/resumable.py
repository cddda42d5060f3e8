"""A judge whose verdicts are kept as they come: one that takes an hour, and is stopped, goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safesteer_lite.errors import RunFolderError
from safesteer_lite.evaluation.measure import counting_from
from safesteer_lite.evaluation.verdicts import NO_VERDICT, Done, Judge, Verdict
from safesteer_lite.runs.durable import explained, read_json, remove, write_json

FILE = "judging.json"
"""In a run's folder while it is judged, and after a judge that was stopped."""

AT_ONCE = 16
"""Answers that a judge is shown before its verdicts are kept: no more of them are lost."""


class ResumableJudge:
    """Asks a judge only what it has not said already, and keeps what it says.

    Args:
        judge: who judges.
        run: the folder of the run that the answers are of.
        evaluated: the fingerprint of the evaluation that gave them.
    """

    def __init__(self, judge: Judge, run: Path, evaluated: str) -> None:
        self.name, self.model = judge.name, judge.model
        self._judge, self._path = judge, run / FILE
        self._mark = {"evaluate": evaluated, "judge": judge.name, "model": judge.model}
        self._said = _read(self._path, self._mark)

    @property
    def known(self) -> int:
        """Verdicts that are there."""
        return len(self._said)

    def judge(self, prompts: Sequence[str], answers: Sequence[str], done: Done) -> list[Verdict]:
        """As the judge's own.

        Raises:
            ModelError: as the judge's own; what it said before is kept.
            RunFolderError: the folder cannot be written.
            DiskSpaceError: the disk is full.
        """
        asked = list(zip(prompts, answers, strict=True))
        waiting = [pair for pair in dict.fromkeys(asked) if pair not in self._said]
        count = len(asked) - len(waiting)
        for start in range(0, len(waiting), AT_ONCE):
            part = waiting[start : start + AT_ONCE]
            given = self._judge.judge(
                [prompt for prompt, _ in part], [answer for _, answer in part], counting_from(count + start, done)
            )
            self._said.update(zip(part, given, strict=True))
            self._keep()
        return [self._said[pair] for pair in asked]

    def forget(self) -> None:
        """Remove the file, once its verdicts are kept elsewhere."""
        remove(self._path)

    def _keep(self) -> None:
        # What kept to no form is asked anew: behind the same address there may be a better model by then.
        said = [
            {"prompt": prompt, "answer": answer, **vars(verdict)}
            for (prompt, answer), verdict in self._said.items()
            if not verdict.remark.startswith(NO_VERDICT)
        ]
        with explained("the verdicts so far"):
            write_json(self._path, {**self._mark, "said": said})


def _read(path: Path, mark: dict[str, str]) -> dict[tuple[str, str], Verdict]:
    """What the same judge said of the same answers; nothing where the file is another's or damaged, which costs time alone."""
    if not path.exists():
        return {}
    try:
        record = read_json(path, "the verdicts so far")
        if {name: record.get(name) for name in mark} != mark:
            return {}
        return {(entry["prompt"], entry["answer"]): _verdict(entry) for entry in record["said"]}
    except (RunFolderError, KeyError, TypeError, ValueError):
        return {}


def _verdict(entry: dict[str, Any]) -> Verdict:
    """A verdict as it was kept.

    Raises:
        ValueError: it is none.
        KeyError: it lacks something.
    """
    refused, harmful, remark, controversial = (
        entry[name] for name in ("refused", "harmful", "remark", "controversial")
    )
    if not all(value is None or isinstance(value, bool) for value in (refused, harmful)):
        raise ValueError("a verdict is neither true, false nor unknown")
    if not isinstance(remark, str) or not isinstance(controversial, bool):
        raise ValueError("a verdict has no remark")
    return Verdict(refused, harmful, remark, controversial)

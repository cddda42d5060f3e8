"""The answers of a run as a second judge reads them: kept beside the report, with what the opening phrases say of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from safesteer_lite.errors import RunFolderError
from safesteer_lite.evaluation.clear_cases import ClearCases
from safesteer_lite.evaluation.scorecard import Rate
from safesteer_lite.evaluation.verdicts import OPENINGS, Verdict
from safesteer_lite.prompts.sets import KINDS
from safesteer_lite.runs.durable import explained, read_json, write_json
from safesteer_lite.runs.folder import RunFolder

FILE = "judges.json"

MODELS = ("before", "after")
"""The base and the trained model, as a scorecard names them; a model that is no run's has its answers under the first."""


QUESTIONS = {"refused": "refused", "harmful": "answered with harm"}
"""What is asked of every answer, each with the words for those of which it is true."""


@dataclass(frozen=True)
class JudgedAnswer:
    """One answer, and what is said of it.

    Attributes:
        set: which set the prompt is from, one of `KINDS`.
        id: the prompt's id.
        prompt: the prompt.
        model: whose answer it is, one of `MODELS`.
        answer: the answer, whole.
        openings: whether it opens as a refusal; None where there is nothing to judge.
        verdict: what the judge says.
    """

    set: str
    id: str
    prompt: str
    model: str
    answer: str
    openings: bool | None
    verdict: Verdict

    @property
    def disputed(self) -> bool:
        """Whether the judge contradicts the opening phrases: refused or not, or a refusal that does harm."""
        if self.openings is None:
            return False
        return self.verdict.refused not in (None, self.openings) or bool(self.openings and self.verdict.harmful)

    @classmethod
    def from_record(cls, record: Any) -> JudgedAnswer:
        """An answer as `to_record` makes it.

        Raises:
            ValueError: it is none.
        """
        try:
            texts = [record[name] for name in ("set", "id", "prompt", "model", "answer", "remark")]
            said = [record[name] for name in ("openings", "refused", "harmful", "controversial")]
        except (KeyError, TypeError) as error:
            raise ValueError(f"a judged answer lacks {error}") from error
        if not all(isinstance(text, str) for text in texts) or texts[0] not in KINDS or texts[3] not in MODELS:
            raise ValueError("a judged answer is of no set or no model")
        if not all(value is None or isinstance(value, bool) for value in said) or said[3] is None:
            raise ValueError("a judged answer has a verdict that is none")
        set_name, prompt_id, prompt, model, answer, remark = texts
        openings, refused, harmful, controversial = said
        verdict = Verdict(refused, harmful, remark, controversial)
        return cls(set_name, prompt_id, prompt, model, answer, openings, verdict)

    def to_record(self) -> dict[str, object]:
        """The answer as the run keeps it."""
        told = {name: value for name, value in vars(self).items() if name != "verdict"}
        return told | vars(self.verdict)


@dataclass(frozen=True)
class Judged:
    """What one judge says of all answers.

    Attributes:
        judge: which kind of judge it is, such as `guard`.
        model: which model judged; empty where none did.
        answers: every answer, by model and set in the order of the prompts.
        clear: how the judge did on clear cases; None where it was not shown them, as in the first versions.
    """

    judge: str
    model: str
    answers: Sequence[JudgedAnswer]
    clear: ClearCases | None = None

    @property
    def disputed(self) -> list[JudgedAnswer]:
        """The answers on which the judge contradicts the opening phrases."""
        return [answer for answer in self.answers if answer.disputed]

    def summary(self) -> dict[str, Any]:
        """The figures as the report has them: for each model and set `refused` and `harmful`, each {count, n, low, high}
        (95 % Wilson bounds as shares) or None where the judge does not say, and how many answers are `controversial`;
        how many of all answers are `disputed`; and of the clear cases how many were `right` and `asked`, or None."""
        clear = {"right": self.clear.right, "asked": self.clear.asked} if self.clear else None
        told: dict[str, Any] = {"judge": self.judge, "model": self.model, "clear": clear}
        for model in MODELS:
            asked = {answer.set for answer in self._of(model)}
            told[model] = {name: self._figures(model, name) for name in KINDS if name in asked} or None
        return told | {"disputed": len(self.disputed)}

    def openings(self) -> Judged:
        """The same answers as the opening phrases judge them."""
        read = [replace(answer, verdict=Verdict(answer.openings, None)) for answer in self.answers]
        return Judged(OPENINGS, "", read)

    @classmethod
    def from_record(cls, record: Any) -> Judged:
        """What a judge says, as `to_record` makes it.

        Raises:
            ValueError: it is none.
        """
        try:
            judge, model, answers = record["judge"], record["model"], record["answers"]
            clear = ClearCases.from_record(record["clear"]) if record.get("clear") else None
        except (KeyError, TypeError) as error:
            raise ValueError(f"a judge lacks {error}") from error
        if not (isinstance(judge, str) and isinstance(model, str) and isinstance(answers, list)):
            raise ValueError("a judge has no name or no answers")
        return cls(judge, model, [JudgedAnswer.from_record(answer) for answer in answers], clear)

    def to_record(self) -> dict[str, object]:
        """What the judge says, as the run keeps it."""
        answers = [answer.to_record() for answer in self.answers]
        clear = vars(self.clear) if self.clear else None
        return {"judge": self.judge, "model": self.model, "clear": clear, "answers": answers}

    def of(self, model: str) -> list[Verdict]:
        """The verdicts on one model's answers, in the order of the prompts."""
        return [answer.verdict for answer in self._of(model)]

    def _of(self, model: str, name: str = "") -> list[JudgedAnswer]:
        return [answer for answer in self.answers if answer.model == model and name in ("", answer.set)]

    def _figures(self, model: str, name: str) -> dict[str, Any]:
        given = [answer.verdict for answer in self._of(model, name)]
        return {
            "refused": _rate([verdict.refused for verdict in given]),
            "harmful": _rate([verdict.harmful for verdict in given]),
            "controversial": sum(verdict.controversial for verdict in given),
        }


def _rate(said: Sequence[bool | None]) -> dict[str, object] | None:
    known = [value for value in said if value is not None]
    if not known:
        return None
    rate = Rate.of(sum(known), len(known))
    return {"count": rate.refused, "n": rate.n, "low": rate.low, "high": rate.high}


def summaries(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """The figures of all judges, the opening phrases first; none where no other judge was asked."""
    return [judged[0].openings().summary(), *(one.summary() for one in judged)] if judged else []


def save_judged(run: RunFolder, judged: Judged) -> None:
    """Keep what a judge says, in place of what the same judge said before, marked with the evaluation that it belongs to.

    Raises:
        RunFolderError: the folder cannot be written.
        DiskSpaceError: the disk is full.
    """
    others = [one for one in saved_judged(run) if (one.judge, one.model) != (judged.judge, judged.model)]
    record = {"evaluate": run.record("evaluate").fingerprint, "judges": [one.to_record() for one in [*others, judged]]}
    with explained(f"the verdicts on {run.path.name}"):
        write_json(run.path / FILE, record)


def saved_judged(run: RunFolder) -> list[Judged]:
    """What judges said of a run's answers, in the order in which they were asked; nothing of answers that were made anew.

    Raises:
        RunFolderError: the file is damaged.
    """
    path, evaluated = run.path / FILE, run.manifest.stages.get("evaluate")
    if evaluated is None or not path.exists():
        return []
    hint = (
        f"Judge again with `safesteer-lite eval {run.path.name} --judge`, or delete it for a report without that part."
    )
    record = read_json(path, "the verdicts of other judges", hint=hint)
    if record.get("evaluate") != evaluated.fingerprint:
        return []
    try:
        return [Judged.from_record(entry) for entry in record["judges"]]
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"{path} is damaged: {error}.", hint) from error

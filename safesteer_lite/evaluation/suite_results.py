"""What public suites showed of a run: kept beside the report, with every answer, and compared prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from safesteer_lite.errors import RunFolderError
from safesteer_lite.evaluation.judged import MODELS, QUESTIONS, Judged
from safesteer_lite.evaluation.paired import compare
from safesteer_lite.prompts.sets import KINDS
from safesteer_lite.runs.durable import explained, read_json, write_json
from safesteer_lite.runs.folder import RunFolder

FILE = "suites.json"

_TEXTS = ("suite", "kind", "origin", "licence", "sha256")


@dataclass(frozen=True)
class SuiteResult:
    """One suite, answered by the base and the trained model, or by a model that is no run's.

    Attributes:
        suite: its name.
        kind: what its prompts are, one of `KINDS`.
        origin: where they are from, for readers.
        licence: of the file; empty where it is the user's own.
        sha256: of the file, in hexadecimal.
        answer_tokens: tokens an answer, at most.
        left_out: prompts that were not asked, because the run had trained or selected on one that is nearly the same.
        judged: the verdicts of the opening phrases, and behind them those of a second judge, if one was asked.
    """

    suite: str
    kind: str
    origin: str
    licence: str
    sha256: str
    answer_tokens: int
    left_out: int
    judged: Sequence[Judged]

    @classmethod
    def from_record(cls, record: Any) -> SuiteResult:
        """A result as `to_record` makes it.

        Raises:
            ValueError: it is none.
        """
        try:
            texts = [record[name] for name in _TEXTS]
            tokens, left_out, judged = record["answer_tokens"], record["left_out"], record["judged"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"a suite lacks {error}") from error
        if not all(isinstance(text, str) for text in texts) or type(tokens) is not int or type(left_out) is not int:
            raise ValueError("a suite is not described")
        if texts[1] not in KINDS:
            raise ValueError(f"a suite of {texts[1]!r} prompts")
        if not isinstance(judged, list) or not judged:
            raise ValueError("a suite has no answers")
        suite, kind, origin, licence, digest = texts
        read = [Judged.from_record(entry) for entry in judged]
        return cls(suite, kind, origin, licence, digest, tokens, left_out, read)

    def to_record(self) -> dict[str, object]:
        """The result as the run keeps it, every answer included."""
        return {**vars(self), "judged": [judged.to_record() for judged in self.judged]}

    def summary(self) -> dict[str, Any]:
        """The figures as the report has them: how the suite is told apart, `n` prompts, and for each of `judges` both
        questions, each with the rates `before` and `after` ({count, n, low, high} or None) and `paired`, McNemar's exact
        test over the same prompts (`gained`, `lost`, `p`; None for a model that is no run's)."""
        told: dict[str, Any] = {name: getattr(self, name) for name in (*_TEXTS, "answer_tokens", "left_out")}
        told["n"] = len(self.judged[0].of(MODELS[0]))
        return told | {"judges": [self._figures(judged) for judged in self.judged]}

    def _figures(self, judged: Judged) -> dict[str, Any]:
        whole = judged.summary()
        told: dict[str, Any] = {"judge": judged.judge, "model": judged.model, "disputed": whole["disputed"]}
        for question in QUESTIONS:
            rates = {model: whole[model] and whole[model][self.kind][question] for model in MODELS}
            paired = None
            if rates[MODELS[0]] and rates[MODELS[1]]:
                before, after = ([getattr(verdict, question) for verdict in judged.of(model)] for model in MODELS)
                paired = compare(before, after).to_record()
            told[question] = {**rates, "paired": paired} if rates[MODELS[0]] else None
        return told


def save_suite(run: RunFolder, result: SuiteResult) -> None:
    """Keep a result in place of an earlier one of the same suite, marked with the training that it belongs to.

    Raises:
        RunFolderError: the folder cannot be written.
        DiskSpaceError: the disk is full.
    """
    kept = [other for other in saved_suites(run) if other.suite != result.suite]
    record = {
        "distill": run.record("distill").fingerprint,
        "suites": [entry.to_record() for entry in [*kept, result]],
    }
    with explained(f"the suites of {run.path.name}"):
        write_json(run.path / FILE, record)


def saved_suites(run: RunFolder) -> list[SuiteResult]:
    """The suites that a run's model answered, in the order in which they were asked; none of another training.

    Raises:
        RunFolderError: the file is damaged.
    """
    path, trained = run.path / FILE, run.manifest.stages.get("distill")
    if trained is None or not path.exists():
        return []
    hint = f"Measure again with `safesteer-lite eval {run.path.name} --suite`, or delete it for a report without that part."
    record = read_json(path, "the suites that were measured", hint=hint)
    if record.get("distill") != trained.fingerprint:
        return []
    try:
        return [SuiteResult.from_record(entry) for entry in record["suites"]]
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"{path} is damaged: {error}.", hint) from error

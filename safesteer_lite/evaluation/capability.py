"""What base, hardened model and its GGUF files can do: which problems each solved, and what came of it, as a run keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from safesteer_lite.errors import RunFolderError
from safesteer_lite.evaluation.paired import mcnemar
from safesteer_lite.evaluation.scorecard import wilson
from safesteer_lite.evaluation.tasks import Task
from safesteer_lite.runs.durable import explained, read_json, write_json
from safesteer_lite.runs.folder import RunFolder

FILE = "capability.json"
Who = Literal["base", "hardened"]


@dataclass(frozen=True)
class Solution:
    """One answer and whether it was right."""

    solved: bool
    answer: str


@dataclass
class FileSolutions:
    """What a GGUF file of the hardened model answered so far.

    Attributes:
        sha256: of the file, in hexadecimal. Answers of another are not mixed with them.
        found: by the problem's id.
    """

    sha256: str
    found: dict[str, Solution] = field(default_factory=dict)


@dataclass
class Solutions:
    """The answers to one task so far.

    Attributes:
        way: what they depend on: the task's fingerprint, how the model is loaded, and whether it thinks. Others are not mixed
            with them.
        problems: how many problems the task has, of which not all need have been asked.
        tokens: the longest answer.
        base: by the problem's id.
        hardened: the same; empty where there is no adapter.
        files: what GGUF files of the hardened model answered, by their names.
    """

    way: str
    problems: int
    tokens: int
    base: dict[str, Solution] = field(default_factory=dict)
    hardened: dict[str, Solution] = field(default_factory=dict)
    files: dict[str, FileSolutions] = field(default_factory=dict)

    @classmethod
    def none_yet(cls, task: Task, loaded: str) -> Solutions:
        """No answer to a task yet, from a model loaded as `loaded` says: its precision, its longest prompt and its thoughts."""
        return cls(f"{task.fingerprint} {loaded}", len(task.problems), task.tokens)

    def of(self, who: Who) -> dict[str, Solution]:
        """The answers of one model."""
        return self.base if who == "base" else self.hardened

    def of_file(self, name: str, sha256: str) -> dict[str, Solution]:
        """The answers of a GGUF file; none yet if another one had that name."""
        if name not in self.files or self.files[name].sha256 != sha256:
            self.files[name] = FileSolutions(sha256)
        return self.files[name].found

    def to_record(self) -> dict[str, Any]:
        """As the run keeps it."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Any) -> Solutions:
        """Answers as `to_record` makes them.

        Raises:
            ValueError: they are none.
        """
        try:
            base, hardened = (_solutions(record[who]) for who in ("base", "hardened"))
            # Files were not asked at first.
            files = {
                str(name): FileSolutions(str(entry["sha256"]), _solutions(entry["found"]))
                for name, entry in record.get("files", {}).items()
            }
            return cls(str(record["way"]), int(record["problems"]), int(record["tokens"]), base, hardened, files)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a task lacks what was answered ({error})") from error


def _solutions(record: Mapping[str, Any]) -> dict[str, Solution]:
    return {str(name): Solution(bool(entry["solved"]), str(entry["answer"])) for name, entry in record.items()}


def compare(name: str, solutions: Solutions) -> dict[str, Any]:
    """What became of a task, as the report holds it.

    Args:
        name: the task.
        solutions: both models' answers, or the base's alone, where there is no adapter.

    Returns:
        `task`, `tokens` (of the longest answer), `problems` (of the task), `n` (those that were compared), `base` and
        `hardened` = {solved, low, high} (95 % Wilson bounds as shares), `kept` (solved by both), the ids that were `lost`
        and `gained`, and McNemar's exact `p`; the last five are null where there is no adapter. `files` has for each GGUF
        file its name as `file`, its own `n`, `solved`, `low` and `high`, how many of the same problems the hardened model
        solved as `hardened`, and what it kept, lost and gained against that one.
    """
    asked = [name for name in solutions.base if name in solutions.hardened or not solutions.hardened]
    base = {name: solutions.base[name].solved for name in asked}
    record = {
        "task": name,
        "tokens": solutions.tokens,
        "problems": solutions.problems,
        "n": len(asked),
        "base": _share(base),
        **dict.fromkeys(("hardened", "kept", "lost", "gained", "p")),
        "files": [_file_record(file, answered.found, solutions.hardened) for file, answered in solutions.files.items()],
    }
    if not solutions.hardened:
        return record
    hardened = {name: solutions.hardened[name].solved for name in asked}
    return {**record, "hardened": _share(hardened), **_changes(base, hardened)}


def _file_record(file: str, found: Mapping[str, Solution], hardened: Mapping[str, Solution]) -> dict[str, Any]:
    asked = [name for name in found if name in hardened]
    before, after = ({name: answers[name].solved for name in asked} for answers in (hardened, found))
    return {
        "file": file,
        "n": len(asked),
        **_share(after),
        "hardened": sum(before.values()),
        **_changes(before, after),
    }


def _changes(before: Mapping[str, bool], after: Mapping[str, bool]) -> dict[str, Any]:
    """What of the same problems was kept, lost and gained."""
    lost = [name for name in before if before[name] and not after[name]]
    gained = [name for name in before if after[name] and not before[name]]
    return {
        "kept": sum(before.values()) - len(lost),
        "lost": lost,
        "gained": gained,
        "p": mcnemar(len(lost), len(gained)),
    }


def _share(solved: Mapping[str, bool]) -> dict[str, float]:
    low, high = wilson(sum(solved.values()), len(solved))
    return {"solved": sum(solved.values()), "low": low, "high": high}


def save(run: RunFolder, tasks: Mapping[str, Solutions]) -> None:
    """Keep the answers beside the report, marked with the training that they belong to.

    Raises:
        RunFolderError: the folder cannot be written.
        DiskSpaceError: the disk is full.
    """
    record = {"distill": _training(run), "tasks": {name: found.to_record() for name, found in tasks.items()}}
    with explained(f"the solved tasks of {run.path.name}"):
        write_json(run.path / FILE, record)


def saved(run: RunFolder) -> dict[str, Solutions]:
    """The answers so far by task; none where there are none, or where the run was trained again since.

    Raises:
        RunFolderError: the file is damaged.
    """
    path = run.path / FILE
    if not path.exists():
        return {}
    hint = "Delete it, and measure again with `safesteer-lite eval RUN --capability`."
    record = read_json(path, "the solved tasks", hint=hint)
    try:
        if record["distill"] != _training(run):
            return {}
        return {name: Solutions.from_record(found) for name, found in record["tasks"].items()}
    except (KeyError, AttributeError, ValueError) as error:
        raise RunFolderError(f"{path} is damaged: {error}.", hint) from error


def records(run: RunFolder) -> list[dict[str, Any]]:
    """What became of each task that a run has answers to, as the report holds it; see `compare`."""
    return [compare(name, found) for name, found in saved(run).items() if found.base and found.hardened]


def _training(run: RunFolder) -> str:
    trained = run.manifest.stages.get("distill")
    return trained.fingerprint if trained else ""

"""Tasks that a model can solve or not, read from the files that their authors publish: HumanEval, GSM8K and MMLU.

None of the files is part of this project. One is fetched when its task is asked for, at a fixed commit, unless the user has it.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import re
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from safesteer_lite.errors import UsageError
from safesteer_lite.evaluation.problems import LETTERS, ChoiceProblem, NumberProblem, Problem, ProgramProblem, decimal
from safesteer_lite.events import Emit, Warned
from safesteer_lite.runs.durable import parse_json_lines, read_bytes
from safesteer_lite.sources.dataset import PinnedFile, fetch_pinned

_LARGEST_FILE = 256 << 20
_LARGEST_CONTENT = 64 << 20
_SUBJECT = re.compile(r"data/test/(\w+)_test\.csv")


@dataclass(frozen=True)
class Task:
    """A set of problems.

    Attributes:
        name: as `--capability` calls it.
        tokens: the longest answer.
        problems: in the order in which they are asked.
        runs_programs: whether answers are run to judge them.
    """

    name: str
    tokens: int
    problems: tuple[Problem, ...]
    runs_programs: bool

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides about an answer: all prompts, right answers, and the longest answer."""
        return hashlib.sha256(repr((self.tokens, self.problems)).encode()).hexdigest()


@dataclass(frozen=True)
class Kind:
    """How a task is read.

    Attributes:
        file: what its authors publish, as it was when this project pinned it.
        name: of the file in a folder of the user's.
        tokens: the longest answer.
        asks: what there is to solve, in words.
        read: makes problems of the file's content, in order.
        runs_programs: whether answers are run to judge them.
    """

    file: PinnedFile
    name: str
    tokens: int
    asks: str
    read: Callable[[bytes], list[Problem]]
    runs_programs: bool = False

    @property
    def home(self) -> str:
        """Where its authors publish the file, in words."""
        return f"{self.file.path} of {self.file.address} at {self.file.commit[:7]}, licence {self.file.licence}"


def _programs(content: bytes) -> list[Problem]:
    with gzip.open(io.BytesIO(content)) as stream:
        return [_program(record) for record in parse_json_lines(stream.read(_LARGEST_CONTENT))]


def _program(record: Mapping[str, Any]) -> Problem:
    source = str(record["prompt"])
    asked = (
        f"Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{source}```"
    )
    return ProgramProblem(str(record["task_id"]), asked, source, str(record["entry_point"]), str(record["test"]))


def _numbers(content: bytes) -> list[Problem]:
    return [_number(record, place) for place, record in enumerate(parse_json_lines(content))]


def _number(record: Mapping[str, Any], place: int) -> Problem:
    question = str(record["question"])
    # No mark is asked for: a small model wrote it first, with nothing behind it.
    asked = f"{question}\n\nThink step by step, and end with the number that answers the question."
    return NumberProblem(f"GSM8K/{place}", asked, decimal(str(record["answer"]).rpartition("####")[2].strip()))


def _choices(content: bytes) -> list[Problem]:
    """The test questions of an archive with one CSV file a subject; subjects take turns, so that a few are of all of them."""
    subjects = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        for member in archive:
            if (found := _SUBJECT.fullmatch(member.name)) and (stream := archive.extractfile(member)):
                rows = csv.reader(io.StringIO(stream.read(_LARGEST_CONTENT).decode("utf-8"), newline=""))
                subjects[found[1]] = [_choice(found[1], place, row) for place, row in enumerate(rows)]
    turns = zip_longest(*(subjects[name] for name in sorted(subjects)))
    return [problem for problem in chain.from_iterable(turns) if problem is not None]


def _choice(subject: str, place: int, row: list[str]) -> Problem:
    question, *choices, letter = row
    if len(choices) != len(LETTERS) or letter not in LETTERS:
        raise ValueError(f"question {place} of {subject} has not four choices and a letter")
    listed = "\n".join(f"{name}. {choice}" for name, choice in zip(LETTERS, choices, strict=True))
    asked = (
        f"A question about {subject.replace('_', ' ')}:\n\n{question}\n\n{listed}\n\n"
        "Answer with the letter of the right choice alone."
    )
    return ChoiceProblem(f"MMLU/{subject}/{place}", asked, letter)


# Each commit and checksum was found in public repositories that had fetched the file and pinned it.
KINDS: dict[str, Kind] = {
    "humaneval": Kind(
        PinnedFile(
            "github",
            "openai/human-eval",
            "463c980b59e818ace59f6f9803cd92c749ceae61",
            "data/HumanEval.jsonl.gz",
            "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
            "MIT",
            "--tasks-from",
        ),
        "HumanEval.jsonl.gz",
        320,
        "164 functions to write",
        _programs,
        runs_programs=True,
    ),
    "gsm8k": Kind(
        PinnedFile(
            "github",
            "openai/grade-school-math",
            "3101c7d5072418e28b9008a6636bde82a006892c",
            "grade_school_math/data/test.jsonl",
            "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
            "MIT",
            "--tasks-from",
        ),
        "gsm8k_test.jsonl",
        400,
        "1,319 word problems",
        _numbers,
    ),
    "mmlu": Kind(
        PinnedFile(
            "hub",
            "cais/mmlu",
            "c30699e8356da336a370243923dbaf21066bb9fe",
            "data.tar",
            "bec563ba4bac1d6aaf04141cd7d1605d7a5ca833e38f994051e818489592989b",
            "MIT",
            "--tasks-from",
        ),
        "mmlu.tar",
        32,
        "14,042 questions of 57 subjects with four choices",
        _choices,
    ),
}


def read_task(folder: Path | None, name: str, emit: Emit, stage: str) -> Task:
    """A task from its file.

    Args:
        folder: where the user keeps the files; None to have the file fetched, if it is not on this machine.
        name: one of `KINDS`.
        emit: is told size and licence before a download, its progress, and where a file of the user's is another one.
        stage: the name that the events carry.

    Raises:
        UsageError: there is no such task, its file is missing, or it is not what it should be.
        PromptError: the file cannot be fetched, or what came is not the file.
        DiskSpaceError: the download does not fit.
    """
    if name not in KINDS:
        raise UsageError(f"There is no task {name!r}.", f"There are: {', '.join(KINDS)}.")
    kind = KINDS[name]
    path = folder / kind.name if folder else fetch_pinned(kind.file, emit, stage)
    hint = f"It is {kind.home}; put it there as {kind.name}, or leave out --tasks-from to have it fetched."
    try:
        content = read_bytes(path, _LARGEST_FILE)
        problems = tuple(kind.read(content))
    except FileNotFoundError:
        raise UsageError(f"There is no {path}.", hint) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.", hint) from error
    except (ValueError, KeyError, TypeError, EOFError, csv.Error, tarfile.TarError) as error:
        raise UsageError(f"{path} is not the file of {name}: {type(error).__name__}, {error}.", hint) from error
    if not problems or len({problem.id for problem in problems}) < len(problems):
        raise UsageError(f"{path} has no problems, or one twice.", hint)
    if hashlib.sha256(content).hexdigest() != kind.file.sha256:
        emit(
            Warned(
                stage,
                f"{path.name} is not the file of {kind.file}: its checksum differs. The figures are those of this file.",
            )
        )
    return Task(name, kind.tokens, problems, kind.runs_programs)

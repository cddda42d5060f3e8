"""Tasks that a model can solve or not: HumanEval and GSM8K, read from the files that their authors publish.

The files are the user's own: none is part of this project, and none is fetched.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from safesteer_lite.errors import UsageError
from safesteer_lite.evaluation.programs import passes, program_of
from safesteer_lite.runs.durable import parse_json_lines, read_bytes

_LARGEST_FILE = 64 << 20
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
# Where an answer says that this is its number: behind the data set's own mark, or in the box of a formula.
_MARKED = re.compile(rf"(?:####|\\boxed\{{)[^\w\n.-]*({_NUMBER.pattern})")


@dataclass(frozen=True)
class Problem(ABC):
    """One thing to solve.

    Attributes:
        id: what its authors call it, or its place among them.
        prompt: what the model is asked.
    """

    id: str
    prompt: str

    @abstractmethod
    def solved_by(self, answer: str) -> bool:
        """Whether an answer is right."""


@dataclass(frozen=True)
class ProgramProblem(Problem):
    """A function to write, as in HumanEval (arXiv 2107.03374).

    Attributes:
        source: the beginning of a program, up to the function's docstring.
        function: the function's name.
        tests: defines `check`, which takes the function and raises where it is wrong.
    """

    source: str
    function: str
    tests: str

    def solved_by(self, answer: str) -> bool:
        """Whether the answer's program passes the tests, for which it is run."""
        program = program_of(answer, self.source, self.function)
        return passes(f"{program}\n\n{self.tests}\n\ncheck({self.function})\n")


@dataclass(frozen=True)
class NumberProblem(Problem):
    """A question whose answer is a number, as in GSM8K (arXiv 2110.14168).

    Attributes:
        number: the right one.
    """

    number: Decimal

    def solved_by(self, answer: str) -> bool:
        """Whether the answer's number is the right one: the last that is marked as such, else the last of all."""
        found = _MARKED.findall(answer) or _NUMBER.findall(answer)
        return bool(found) and _decimal(found[-1]) == self.number


@dataclass(frozen=True)
class Task:
    """A set of problems.

    Attributes:
        name: as `--capability` calls it.
        tokens: the longest answer.
        problems: in the order of the file.
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
        file: the name of its file.
        home: where its authors publish that, in words.
        tokens: the longest answer.
        read: makes a problem of a line's record and its place.
        runs_programs: whether answers are run to judge them.
    """

    file: str
    home: str
    tokens: int
    read: Callable[[Mapping[str, Any], int], Problem]
    runs_programs: bool


def _program_problem(record: Mapping[str, Any], place: int) -> Problem:
    source = str(record["prompt"])
    asked = (
        f"Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{source}```"
    )
    return ProgramProblem(str(record["task_id"]), asked, source, str(record["entry_point"]), str(record["test"]))


def _number_problem(record: Mapping[str, Any], place: int) -> Problem:
    question = str(record["question"])
    # No mark is asked for: a small model wrote it first, with nothing behind it.
    asked = f"{question}\n\nThink step by step, and end with the number that answers the question."
    return NumberProblem(f"GSM8K/{place}", asked, _decimal(str(record["answer"]).rpartition("####")[2].strip()))


KINDS: dict[str, Kind] = {
    "humaneval": Kind(
        "HumanEval.jsonl.gz", "data/HumanEval.jsonl.gz of github.com/openai/human-eval", 320, _program_problem, True
    ),
    "gsm8k": Kind(
        "gsm8k_test.jsonl",
        "grade_school_math/data/test.jsonl of github.com/openai/grade-school-math",
        400,
        _number_problem,
        False,
    ),
}


def read_task(folder: Path, name: str) -> Task:
    """A task from the file that a folder holds of it.

    Args:
        folder: where the user keeps the files.
        name: one of `KINDS`.

    Raises:
        UsageError: there is no such task, its file is missing, or it is not what it should be.
    """
    if name not in KINDS:
        raise UsageError(f"There is no task {name!r}.", f"There are: {', '.join(KINDS)}.")
    kind = KINDS[name]
    path, hint = folder / kind.file, f"It is {kind.home}; put it there as {kind.file}."
    try:
        content = read_bytes(path, _LARGEST_FILE)
        if path.suffix == ".gz":
            with gzip.open(io.BytesIO(content)) as stream:
                content = stream.read(_LARGEST_FILE)
        problems = tuple(kind.read(record, place) for place, record in enumerate(parse_json_lines(content)))
    except FileNotFoundError:
        raise UsageError(f"There is no {path}.", hint) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.", hint) from error
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise UsageError(f"{path} is not the file of {name}: {type(error).__name__}, {error}.", hint) from error
    if not problems or len({problem.id for problem in problems}) < len(problems):
        raise UsageError(f"{path} has no problems, or one twice.", hint)
    return Task(name, kind.tokens, problems, kind.runs_programs)


def _decimal(text: str) -> Decimal:
    """A number as people write it, with commas between thousands.

    Raises:
        ValueError: it is none.
    """
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:
        raise ValueError(f"{text!r} is no number") from None

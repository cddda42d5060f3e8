"""Problems that a model solves or does not: a program, a number, the letter of a choice."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from safesteer_lite.evaluation.programs import passes, program_of

LETTERS = "ABCD"

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
# Where an answer says that this is its number: behind the data set's own mark, or in the box of a formula.
_MARKED = re.compile(rf"(?:####|\\boxed\{{)[^\w\n.-]*({_NUMBER.pattern})")

# A letter that the answer opens with, which is no article ("A common mistake"), or one that it calls its answer.
_OPENS = re.compile(rf"[^\w]*(?:\\boxed\{{)?([{LETTERS}])(?![\w'’]| (?!is\b)[a-z])")
_CALLED = re.compile(rf"(?i:\banswer|\bchoice|\boption|\\boxed)(?: is)?[^\w\n]*([{LETTERS}])(?![\w'’])")


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
        return bool(found) and decimal(found[-1]) == self.number


@dataclass(frozen=True)
class ChoiceProblem(Problem):
    """A question with four choices, as in MMLU (arXiv 2009.03300).

    Attributes:
        letter: of the right one.
    """

    letter: str

    def solved_by(self, answer: str) -> bool:
        """Whether the answer's letter is the right one: that which it opens with, else the first that it calls its answer."""
        found = _OPENS.match(answer) or _CALLED.search(answer)
        return found is not None and found[1] == self.letter


def decimal(text: str) -> Decimal:
    """A number as people write it, with commas between thousands.

    Raises:
        ValueError: it is none.
    """
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:
        raise ValueError(f"{text!r} is no number") from None

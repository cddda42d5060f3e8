"""Tasks as their files give them: prompts, right answers, and what is told of a file that is none."""

from __future__ import annotations

import gzip
import json
from decimal import Decimal
from pathlib import Path

import pytest

from safesteer_lite.errors import UsageError
from safesteer_lite.evaluation.tasks import NumberProblem, ProgramProblem, read_task
from tests.evaluation.task_files import DOUBLE, write_tasks


def test_problems_are_read_in_order_and_asked_in_this_project_s_words(tmp_path: Path) -> None:
    write_tasks(tmp_path, programs=2, numbers=3)
    programs, numbers = read_task(tmp_path, "humaneval"), read_task(tmp_path, "gsm8k")
    assert [problem.id for problem in programs.problems] == ["Test/0", "Test/1"]
    assert [problem.id for problem in numbers.problems] == ["GSM8K/0", "GSM8K/1", "GSM8K/2"]
    assert DOUBLE["prompt"] in programs.problems[0].prompt and "code block" in programs.problems[0].prompt
    assert (
        numbers.problems[2].prompt.startswith("What is 2 plus 1,000?\n")
        and "step by step" in numbers.problems[2].prompt
    )
    assert programs.runs_programs and not numbers.runs_programs
    first = numbers.problems[0]
    assert isinstance(first, NumberProblem) and first.number == Decimal(1000)


def test_a_fingerprint_tells_any_other_task(tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 3), ("c", 2)):
        write_tasks(tmp_path / name, programs=count, numbers=count)
    one, same, other = (read_task(tmp_path / name, "gsm8k").fingerprint for name in "abc")
    assert one == same != other and len(one) == 64


NUMBERS = [
    ("#### 1000", True),
    ("So it is 1,000.", True),
    ("$1000.00", True),
    ("The first is 7, which makes 1000 dollars.", True),
    ("#### 1,000\nIs that 12?", True),
    ("#### 12\n#### 1000 apples", True),
    ("1000 at first, then 12.", False),
    ("#### none\n", False),
    ("#### N\n1. First\n2. Then it is 1000", True),
    ("It is \\(\\boxed{1000}\\), for 7 days.", True),
    ("\\boxed{\\$1,000.00} a day, 3 times", True),
    ("\\boxed{$1,000} a day, 3 times", True),
    ("\\boxed{12}, no: \\boxed{1000}.", True),
    ("#### -1000", False),
    ("1000 #### ", True),
    ("-1000", False),
    ("1000.5", False),
    ("a thousand", False),
    ("", False),
    ("1,0,0,0", True),
    ("9" * 5000, False),
]


@pytest.mark.parametrize(("answer", "right"), NUMBERS)
def test_the_number_of_an_answer(answer: str, right: bool) -> None:
    assert NumberProblem("x", "?", Decimal(1000)).solved_by(answer) is right


def test_a_program_is_solved_by_running_the_task_s_tests() -> None:
    problem = ProgramProblem("x", "?", DOUBLE["prompt"], DOUBLE["entry_point"], DOUBLE["test"])
    assert problem.solved_by("```python\ndef double(x):\n    return x + offset()\n```") is False
    assert problem.solved_by("```python\ndef double(x):\n    return x + x + offset()\n```") is True


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("humaneval", None, "There is no "),
        ("humaneval", b"no gzip", "cannot be read|is not the file"),
        ("humaneval", gzip.compress(b"{}", mtime=0)[:-4], "is not the file of humaneval"),
        ("humaneval", gzip.compress(b'{"prompt": "x"}', mtime=0), "KeyError, 'task_id'"),
        ("humaneval", gzip.compress(b"", mtime=0), "no problems"),
        ("humaneval", gzip.compress(2 * (json.dumps(DOUBLE).encode() + b"\n"), mtime=0), "or one twice"),
        ("gsm8k", b'{"question": "x", "answer": "no number"}', "'no number' is no number"),
        ("gsm8k", b"[]", "TypeError"),
        ("gsm8k", b"{", "ValueError|JSONDecodeError"),
        ("mmlu", None, "There is no task 'mmlu'"),
    ],
)
def test_what_is_no_task_is_told_with_where_to_get_it(
    name: str, content: bytes | None, said: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / {"humaneval": "HumanEval.jsonl.gz", "gsm8k": "gsm8k_test.jsonl"}[name]).write_bytes(content)
    with pytest.raises(UsageError, match=said) as caught:
        read_task(tmp_path, name)
    assert "github.com" in caught.value.hint or name == "mmlu"

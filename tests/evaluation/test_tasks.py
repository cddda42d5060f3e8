"""Tasks as their files give them: prompts, right answers, and what is told of a file that is none."""

from __future__ import annotations

import gzip
import json
from decimal import Decimal
from pathlib import Path

import pytest

from safesteer_lite.errors import UsageError
from safesteer_lite.evaluation import tasks
from safesteer_lite.evaluation.problems import ChoiceProblem, NumberProblem, ProgramProblem
from safesteer_lite.evaluation.tasks import KINDS, Task
from safesteer_lite.evaluation.tasks import read_task as read
from safesteer_lite.events import Emit, Event, Warned, discard
from safesteer_lite.sources.dataset import PinnedFile
from tests.evaluation.task_files import DOUBLE, archive, write_tasks


def read_task(folder: Path, name: str) -> Task:
    """A task from a folder; that the files of these tests are not the authors' is told each time."""
    events: list[Event] = []
    task = read(folder, name, events.append, "capability")
    [told] = [event.message for event in events if isinstance(event, Warned)]
    assert told.startswith(f"{KINDS[name].name} is not the file of {KINDS[name].file.repository}")
    return task


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
        ("mmlu", b"no archive", "ReadError"),
        ("mmlu", archive({"a": [["?", "1", "2", "3", "A"]]}), "question 0 of a has not four choices"),
        ("mmlu", archive({"a": [["?", "1", "2", "3", "4", "E"]]}), "question 0 of a has not four choices"),
        ("mmlu", archive({}), "no problems"),
        ("ifeval", None, "There is no task 'ifeval'"),
    ],
    # Compressed content is not the same in every process.
    ids=map(str, range(14)),
)
def test_what_is_no_task_is_told_with_where_to_get_it(
    name: str, content: bytes | None, said: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / KINDS[name].name).write_bytes(content)
    with pytest.raises(UsageError, match=said) as caught:
        read(tmp_path, name, discard, "capability")
    assert name not in KINDS or KINDS[name].file.address in caught.value.hint


LETTERS = [
    ("B", True),
    ("b", False),
    (" B. Paris", True),
    ("**B**", True),
    ("(B)", True),
    ("B) A common mistake", True),
    ("\\boxed{B}", True),
    ("B is right, and A is not.", True),
    ("The correct answer is: **B**.", True),
    ("Answer: B", True),
    ("The right choice is (B), because A is none.", True),
    ("Option B", True),
    ("A common mistake. The answer is B.", True),
    ("It is so: $\\boxed{B}$", True),
    ("A", False),
    ("A. B", False),
    ("A is right, and B is not.", False),
    ("B's are many, so the answer is A", False),
    ("Because of this, I would say so.", False),
    ("Both B and C", False),
    ("The answer is not clear to me. B", False),
    ("", False),
]


@pytest.mark.parametrize(("answer", "right"), LETTERS)
def test_the_letter_of_an_answer(answer: str, right: bool) -> None:
    assert ChoiceProblem("x", "?", "B").solved_by(answer) is right


def test_the_subjects_of_an_archive_take_turns(tmp_path: Path) -> None:
    subjects = {
        "world_religions": [["Where?", "here", "there", 'no, "there"', "4", "C"], ["When?", "1", "2", "3", "4", "A"]],
        "anatomy": [["What\nis it?", "1", "2", "3", "4", "D"]],
    }
    (tmp_path / "mmlu.tar").write_bytes(archive(subjects))
    task = read_task(tmp_path, "mmlu")
    assert [problem.id for problem in task.problems] == [
        "MMLU/anatomy/0",
        "MMLU/world_religions/0",
        "MMLU/world_religions/1",
    ]
    what, where, _ = task.problems
    assert 'A question about world religions:\n\nWhere?\n\nA. here\nB. there\nC. no, "there"\nD. 4\n' in where.prompt
    assert what.solved_by("D") and where.solved_by("C") and not task.runs_programs


def test_without_a_folder_the_file_is_fetched_and_its_licence_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write_tasks(tmp_path, programs=0, numbers=2) / "gsm8k_test.jsonl"
    asked: list[PinnedFile] = []

    def fetched(file: PinnedFile, emit: Emit, stage: str) -> Path:
        asked.append(file)
        return place

    monkeypatch.setattr(tasks, "fetch_pinned", fetched)
    assert len(read(None, "gsm8k", discard, "capability").problems) == 2
    assert asked == [KINDS["gsm8k"].file] and "--tasks-from" in asked[0].have_it and asked[0].licence == "MIT"
    assert all(len(kind.file.commit) == 40 and len(kind.file.sha256) == 64 for kind in KINDS.values())

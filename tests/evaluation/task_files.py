"""Little task files, as the authors of HumanEval, GSM8K and MMLU write theirs."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

DOUBLE = {
    "task_id": "Test/0",
    "prompt": 'def offset():\n    return 0\n\ndef double(x):\n    """ Twice x.\n    >>> double(2)\n    4\n    """\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-3) == -6\n",
}


def write_tasks(folder: Path, programs: int, numbers: int) -> Path:
    """A folder with so many programs and sums to solve."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({**DOUBLE, "task_id": f"Test/{place}"}) for place in range(programs)]
    (folder / "HumanEval.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    sums = [
        {"question": f"What is {place} plus 1,000?", "answer": f"It is easy.\n#### {1000 + place:,}"}
        for place in range(numbers)
    ]
    (folder / "gsm8k_test.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in sums), encoding="utf-8")
    return folder


def archive(subjects: Mapping[str, Sequence[Sequence[str]]]) -> bytes:
    """An archive of multiple-choice questions by subject: what is asked, four choices, and the letter of the right one."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as written:
        for name in ("data/README.txt", "data/dev/other_dev.csv", *(f"data/test/{name}_test.csv" for name in subjects)):
            table = io.StringIO(newline="")
            rows = subjects.get(name.removeprefix("data/test/").removesuffix("_test.csv"), [["no questions"]])
            csv.writer(table).writerows(rows)
            member = tarfile.TarInfo(name)
            member.size = len(table.getvalue().encode())
            written.addfile(member, io.BytesIO(table.getvalue().encode()))
    return content.getvalue()

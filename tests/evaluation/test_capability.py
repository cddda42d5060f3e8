"""Solved problems: counts that are paired, McNemar's exact p, and what a run keeps."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from safesteer_lite.errors import RunFolderError
from safesteer_lite.evaluation import capability
from safesteer_lite.evaluation.capability import Solution, Solutions, compare
from safesteer_lite.evaluation.paired import mcnemar
from safesteer_lite.runs.creation import create_run
from safesteer_lite.runs.folder import RunFolder
from tests.runs.run_files import publish


def solutions(base: str, hardened: str) -> Solutions:
    """Answers written as `+` (right), `-` (wrong) and a space (not asked), one a problem."""
    found = Solutions("way", 9, 256)
    for model, marks in ((found.base, base), (found.hardened, hardened)):
        model.update({f"P/{place}": Solution(mark == "+", mark) for place, mark in enumerate(marks) if mark != " "})
    return found


def test_lost_and_gained_are_counted_problem_by_problem() -> None:
    found = compare("sums", solutions("+++--- +", "+--+-++ "))
    assert found["n"] == 6 and found["problems"] == 9 and found["tokens"] == 256
    assert (found["kept"], found["lost"], found["gained"]) == (1, ["P/1", "P/2"], ["P/3", "P/5"])
    assert found["base"]["solved"] == 3 and found["hardened"]["solved"] == 3
    assert found["p"] == pytest.approx(1.0)
    # The Wilson interval of 3 of 6, worked out by hand.
    assert [found["base"][end] for end in ("low", "high")] == pytest.approx([0.18762, 0.81238], abs=1e-4)


def test_a_model_alone_has_no_second_count() -> None:
    found = compare("sums", solutions("++-", ""))
    assert found["n"] == 3 and found["base"]["solved"] == 2
    assert [found[name] for name in ("hardened", "kept", "lost", "gained", "p")] == [None] * 5


def test_a_file_is_compared_with_the_hardened_model_on_what_both_were_asked() -> None:
    found = solutions("++++", "+++-")
    answered = found.of_file("Q4.gguf", "a" * 64)
    answered.update({f"P/{place}": Solution(mark == "+", "") for place, mark in ((0, "+"), (1, "-"), (3, "+"))})
    [told] = compare("sums", found)["files"]
    assert (told["file"], told["n"], told["solved"], told["hardened"]) == ("Q4.gguf", 3, 2, 2)
    assert (told["kept"], told["lost"], told["gained"], told["p"]) == (1, ["P/1"], ["P/3"], 1.0)
    # Another file of that name has answered nothing yet.
    assert found.of_file("Q4.gguf", "a" * 64) == answered and found.of_file("Q4.gguf", "b" * 64) == {}


def test_mcnemar_s_p_is_what_counting_all_outcomes_gives() -> None:
    for changed in range(8):
        tosses = [sum(toss) for toss in product((0, 1), repeat=changed)]
        for lost in range(changed + 1):
            uneven = [count for count in tosses if min(count, changed - count) <= min(lost, changed - lost)]
            assert mcnemar(lost, changed - lost) == pytest.approx(len(uneven) / len(tosses))
    assert mcnemar(10, 10) == 1.0 and mcnemar(0, 20) == pytest.approx(2 / 2**20)
    assert 0 <= mcnemar(3000, 100) < 1e-100


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that has answers to one task."""
    run = create_run(tmp_path, "tiny")
    publish(run, "distill", 4, "trained")
    sums = solutions("++-", "+-+")
    sums.of_file("Q4.gguf", "a" * 64)["P/0"] = Solution(True, "1")
    capability.save(run, {"sums": sums, "half": solutions("++", "")})
    return run


def test_what_was_answered_comes_back_and_only_what_both_answered_is_reported(run: RunFolder) -> None:
    found = capability.saved(run)
    assert found["half"] == solutions("++", "") and found["sums"].files["Q4.gguf"].found == {"P/0": Solution(True, "1")}
    found["sums"].files.clear()
    assert found["sums"] == solutions("++-", "+-+")
    assert [record["task"] for record in capability.records(run)] == ["sums"]
    publish(run, "distill", 4, "trained anew")
    assert capability.saved(run) == {} and capability.records(run) == []


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"distill": "trained", "tasks": {"sums": {"way": ""}}}'])
def test_a_damaged_file_is_named(content: str, run: RunFolder) -> None:
    path = run.path / capability.FILE
    path.write_text(content.replace("trained", json.loads(path.read_text())["distill"]), encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"capability\.json") as caught:
        capability.saved(run)
    assert "Delete it" in caught.value.hint

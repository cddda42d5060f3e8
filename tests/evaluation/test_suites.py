"""Public suites: the table, which rows of a file are asked, and the user's own files."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from safesteer_lite.errors import PromptError, UsageError
from safesteer_lite.evaluation import suites
from safesteer_lite.evaluation.suites import SUITES, load_own, load_suite, named, read_suite, spread
from safesteer_lite.events import Event, Warned, discard
from safesteer_lite.prompts.sets import Prompt


def written(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_every_suite_is_pinned_to_a_commit_and_all_that_are_handed_out_freely_to_a_checksum() -> None:
    for name, suite in SUITES.items():
        assert suite.name == name
        assert re.fullmatch("[0-9a-f]{40}", suite.file.commit) and suite.file.licence
        assert re.fullmatch("[0-9a-f]{64}", suite.file.sha256) or name == "sorry-bench"
    # Two suites of one file agree on it.
    assert SUITES["xstest"].file == SUITES["xstest-unsafe"].file


def test_names() -> None:
    assert [suite.name for suite in named("xstest, harmbench,xstest")] == ["xstest", "harmbench"]
    with pytest.raises(UsageError, match="no suite 'harm'"):
        named("harm")


def test_rows_that_belong_to_the_suite_are_asked_once_and_in_order(tmp_path: Path) -> None:
    rows = [
        {"Behavior": "First", "FunctionalCategory": "standard"},
        {"Behavior": "A song", "FunctionalCategory": "copyright"},
        {"Behavior": "Second, with\na line", "FunctionalCategory": "standard"},
        {"Behavior": "First", "FunctionalCategory": "standard"},
    ]
    found = read_suite(written(tmp_path / "all.csv", rows), SUITES["harmbench"])
    assert [prompt.text for prompt in found] == ["First", "Second, with\na line"]
    assert found[0].id == "harmbench-00001" or found[0].id == "harmbench-00002"
    with pytest.raises(PromptError, match="no rows of harmbench"):
        read_suite(written(tmp_path / "other.csv", rows[1:2]), SUITES["harmbench"])


def test_a_conversation_of_one_turn_and_requests_that_stand_alone(tmp_path: Path) -> None:
    (tmp_path / "question.jsonl").write_text(
        json.dumps({"turns": ["Do it"], "prompt_style": "base"})
        + "\n"
        + json.dumps({"turns": ["Mach es"], "prompt_style": "translate-de"})
    )
    assert [p.text for p in read_suite(tmp_path / "question.jsonl", SUITES["sorry-bench"])] == ["Do it"]
    rows = [{"instruction": "Add", "input": "1 2"}, {"instruction": "Name a tree", "input": ""}]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    assert [p.text for p in read_suite(tmp_path / "alpaca.json", SUITES["alpaca"])] == ["Name a tree"]


def test_a_limit_goes_through_the_whole_file() -> None:
    prompts = [Prompt(str(place), str(place)) for place in range(10)]
    assert [prompt.text for prompt in spread(prompts, 4)] == ["0", "2", "5", "7"]
    assert spread(prompts, 0) == spread(prompts, 10) == spread(prompts, 99) == prompts


def test_ones_own_file_is_the_suite_only_with_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "mine.csv", [{"goal": "Goal", "prompt": "Prompt"}])
    events: list[Event] = []
    own = load_own(f"advbench={path}", None, events.append, "suites")
    assert [prompt.text for prompt in own.prompts] == ["Prompt"] and own.origin == "the file mine.csv"
    assert (
        own.name == "advbench, own file"
        and own.kind == "harmful"
        and own.licence == ""
        and own.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    )
    (warning,) = events
    assert isinstance(warning, Warned) and "its checksum differs" in warning.message
    known = SUITES["advbench"]
    pinned = replace(known, file=replace(known.file, sha256=own.sha256))
    monkeypatch.setitem(suites.SUITES, "advbench", pinned)
    same = load_own(f"advbench={path}", None, discard, "suites")
    assert [prompt.text for prompt in same.prompts] == ["Goal"] and same.licence == "MIT"


def test_a_set_of_ones_own_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(f"Prompt {place}" for place in range(6)))
    own = load_own(f"mine:borderline={path}", 3, discard, "suites")
    assert (own.name, own.kind, [prompt.text for prompt in own.prompts]) == (
        "mine",
        "borderline",
        ["Prompt 0", "Prompt 2", "Prompt 4"],
    )


@pytest.mark.parametrize("given", ["mine=F", "mine:bad=F", "harmbench", "=F", "harmbench=", "harmbench:bad=F"])
def test_what_names_no_suite_and_file_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match="does not name a suite and its file"):
        load_own(given, None, discard, "suites")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no file"):
        load_own(f"harmbench={tmp_path / 'nothing.csv'}", None, discard, "suites")


def test_nothing_is_fetched_where_nothing_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFESTEER_LITE_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PromptError, match="HF_HUB_OFFLINE") as told:
        load_suite(SUITES["xstest"], None, discard, "suites")
    assert "--suite-file" in told.value.hint

"""Suites over a run and over a model: both policies from one load, what is kept, and what a run may not be judged by."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safesteer_lite.errors import RunFolderError
from safesteer_lite.evaluation import endpoint
from safesteer_lite.evaluation.suite_results import FILE, saved_suites
from safesteer_lite.prompts.sets import prompt_set
from safesteer_lite.report import page
from safesteer_lite.report import record as report
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.shell.cli import main
from tests import local_endpoint, planted
from tests.local_endpoint import Endpoint
from tests.planted import COMPLIANCE, REFUSAL


@pytest.fixture
def run(planted_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A copy of the finished run."""
    monkeypatch.chdir(tmp_path)
    return RunFolder(shutil.copytree(planted_run.path, tmp_path / "runs" / planted_run.path.name))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(endpoint, "PAUSE_SECONDS", 0.0)
    with local_endpoint.serving() as state:
        state.write = lambda request, answer: json.dumps(
            {"refused": answer == REFUSAL, "harmful": answer == COMPLIANCE}
        )
        yield state


@pytest.fixture
def harmful(tmp_path: Path) -> Path:
    """The test prompts of the planted model, as a file of one's own: what it answers to them is planted."""
    path = tmp_path / "harmful.txt"
    path.write_text("\n".join(prompt.text for prompt in prompt_set("harmful", "test", 28)))
    return path


def result_of(capsys: pytest.CaptureFixture[str], *line: str) -> list[dict[str, Any]]:
    assert main([*line, "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["event"] == "Suites"
    suites: list[dict[str, Any]] = last["suites"]
    return suites


def test_a_run_answers_a_suite_as_it_answered_its_test_prompts(
    run: RunFolder, harmful: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (suite,) = result_of(capsys, "eval", str(run.path), "--suite-file", f"mine:harmful={harmful}")
    record = json.loads((run.path / "report.json").read_text())
    card = record["scorecard"]
    (judge,) = suite["judges"]
    refused = judge["refused"]
    for model in ("before", "after"):
        assert refused[model]["count"] == card[model]["harmful"]["refused"]
        assert refused[model]["n"] == suite["n"] == 28
    paired = refused["paired"]
    assert paired["gained"] - paired["lost"] == refused["after"]["count"] - refused["before"]["count"]
    assert judge["harmful"] is None
    assert record["suites"] == [suite]
    html = page.render(run, report.build(run, planted.settings(Path("m"))))
    shown = html.partition('id="suites"')[2].partition("</section>")[0]
    assert "mine refused" in shown and "harmful.txt" in shown


def test_a_file_of_requests_for_help_in_danger_is_a_suite_too(
    run: RunFolder, harmful: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (suite,) = result_of(
        capsys, "eval", str(run.path), "--suite-file", f"mine:critical={harmful}", "--suite-limit", "3"
    )
    assert (suite["kind"], suite["judges"][0]["refused"]["after"]["n"]) == ("critical", 3)
    html = (run.path / "report.html").read_text(encoding="utf-8")
    assert "a refusal may do harm" in html.partition('id="suites"')[2].partition("</section>")[0]


def test_a_second_judge_reads_the_answers_of_a_suite(
    run: RunFolder, harmful: Path, server: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["eval", str(run.path), "--suite-file", f"mine:harmful={harmful}", "--suite-limit", "10"]
    assert main([*line, "--judge", "endpoint", "--judge-url", server.url]) == 0
    told = capsys.readouterr().out
    assert "mine, 10 harmful prompts" in told and "answered with harm, by endpoint" in told
    (kept,) = saved_suites(run)
    openings, other = kept.judged
    # Twelve of them are the clear cases.
    assert len(server.bodies) - 12 == 20 == len(openings.answers) == len(other.answers)
    figures = kept.summary()["judges"][1]
    refusals = sum(answer.answer == REFUSAL for answer in other.answers if answer.model == "after")
    assert figures["refused"]["after"]["count"] == refusals
    assert figures["harmful"]["before"]["n"] == 10 and figures["harmful"]["paired"]["p"] <= 1


def test_what_is_kept_is_kept_by_name_and_belongs_to_a_training(
    run: RunFolder, harmful: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, limit in (("one", "3"), ("two", "3"), ("one", "4")):
        own = f"{name}:harmful={harmful}"
        result_of(capsys, "eval", str(run.path), "--suite-file", own, "--suite-limit", limit)
    assert [(kept.suite, kept.summary()["n"]) for kept in saved_suites(run)] == [("two", 3), ("one", 4)]
    record = json.loads((run.path / FILE).read_text())
    (run.path / FILE).write_text(json.dumps(record | {"distill": "another"}))
    assert saved_suites(run) == []
    del record["suites"][0]["licence"]
    (run.path / FILE).write_text(json.dumps(record))
    with pytest.raises(RunFolderError, match="damaged: a suite lacks 'licence'"):
        saved_suites(run)


def test_a_run_is_never_judged_by_what_it_was_selected_on(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = tmp_path / "known.txt"
    selection = [prompt.text for prompt in prompt_set("harmful", "selection", 28)]
    test = [prompt.text for prompt in prompt_set("harmful", "test", 28)]
    known.write_text("\n".join(selection[:4] + test))
    assert main(["eval", str(run.path), "--suite-file", f"mine:harmful={known}"]) == 2
    assert "mine cannot judge this run: of its 32 prompts 4 are among those" in capsys.readouterr().err
    assert not (run.path / FILE).exists()
    known.write_text("\n".join([selection[0].upper(), *test]))
    (suite,) = result_of(capsys, "eval", str(run.path), "--suite-file", f"mine:harmful={known}")
    assert (suite["n"], suite["left_out"]) == (28, 1)


def test_a_model_that_is_no_run_answers_alone(
    planted_model: Path,
    harmful: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    fast = ["--set=evaluate.answer_tokens=12", "--set=model.precision=fp32", "--set=model.device=cpu"]
    (suite,) = result_of(capsys, "eval", str(planted_model), "--suite-file", f"mine:harmful={harmful}", *fast)
    (judge,) = suite["judges"]
    assert judge["refused"]["after"] is None and judge["refused"]["paired"] is None
    assert judge["refused"]["before"]["n"] == 28


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "harm"], "no suite 'harm'"),
        (["--suite-file", "harmbench"], "does not name a suite and its file"),
        (["--suite-limit", "3"], "--suite-limit is for"),
        (["--suite", "xstest", "--suite-limit", "-1"], "cannot be negative"),
    ],
)
def test_what_does_not_fit_is_refused(
    run: RunFolder, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run.path), *arguments]) == 2
    assert said in capsys.readouterr().err

"""A second judge over a finished run: from the answers that were kept to the tables, the report and what is said of it all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safesteer_lite.config import RunConfig
from safesteer_lite.errors import ModelError, RunFolderError
from safesteer_lite.evaluation import endpoint, resumable
from safesteer_lite.evaluation.browse import disputed_groups
from safesteer_lite.evaluation.clear_cases import ANSWERED, REFUSED
from safesteer_lite.evaluation.judged import FILE, saved_judged
from safesteer_lite.evaluation.resumable import AT_ONCE
from safesteer_lite.evaluation.verdicts import Openings
from safesteer_lite.events import Event, Metric, Note, StageDone, StageStarted, Warned, discard
from safesteer_lite.prompts.sets import KINDS
from safesteer_lite.report import page
from safesteer_lite.report import record as report
from safesteer_lite.runs.durable import write_json
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.shell.cli import main
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages import judging, pipeline
from tests import local_endpoint, planted
from tests.local_endpoint import Endpoint
from tests.planted import COMPLIANCE, REFUSAL

CASES = len(ANSWERED) + len(REFUSED)
SAID = {"prompt": "p", "answer": "a", "refused": True, "harmful": None, "remark": "", "controversial": False}


@pytest.fixture
def run(planted_run: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the finished run."""
    return RunFolder(shutil.copytree(planted_run.path, tmp_path / "runs" / planted_run.path.name))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """A judge that finds no refusal in what opens as one, and harm in what complies."""
    monkeypatch.setattr(endpoint, "PAUSE_SECONDS", 0.0)
    with local_endpoint.serving() as state:
        state.write = lambda request, answer: json.dumps({"refused": False, "harmful": answer == COMPLIANCE})
        yield state


def asked(model: Path, server: Endpoint) -> RunConfig:
    return planted.settings(model, {"evaluate.judge": "endpoint", "evaluate.judge_url": server.url})


def counts(run: RunFolder, model: str) -> dict[str, dict[str, int]]:
    """How the planted model's answers divide, by set."""
    answers = run.read_json("evaluate", f"answers-{model}.json")
    return {
        name: {
            "n": len(answers[name]),
            "refusals": answers[name].count(REFUSAL),
            "harm": answers[name].count(COMPLIANCE),
        }
        for name in KINDS
    }


def test_eval_judges_the_kept_answers_without_the_base_model(
    run: RunFolder, server: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["eval", str(run.path), "--judge", "endpoint", "--judge-url", server.url, "--judge-model", "big"]
    assert main([*line, "--json"]) == 0
    events = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    openings, other = events[-1]["judges"]
    assert (openings["judge"], other["judge"], other["model"]) == ("openings", "endpoint", "big at 127.0.0.1")
    refusals = 0
    for model in ("before", "after"):
        for name, planted_ones in counts(run, model).items():
            n = planted_ones["n"]
            said, opened = other[model][name], openings[model][name]
            assert (said["refused"]["count"], said["refused"]["n"]) == (0, n)
            assert (said["harmful"]["count"], said["harmful"]["n"]) == (planted_ones["harm"], n)
            assert opened["refused"]["count"] >= planted_ones["refusals"] and opened["harmful"] is None
            refusals += opened["refused"]["count"]
    assert other["disputed"] == refusals == len(events[-1]["disputed"]) > 0
    groups = disputed_groups(run)
    (title,) = groups
    assert title.startswith("endpoint against opening phrases")
    assert len(groups[title]) == len({(entry["set"], entry["id"]) for entry in events[-1]["disputed"]})
    assert not any(entry.before_refused or entry.after_refused for entry in groups[title])
    assert json.loads((run.path / "report.json").read_text())["judges"] == events[-1]["judges"]
    # The base model was not asked for, so nothing but judging was told.
    assert {event.get("stage") for event in events[:-1]} == {judging.STAGE}
    # Half of the clear cases are refusals, and this judge finds none.
    assert (openings["clear"], other["clear"]) == (None, {"right": 6, "asked": 12})
    (warning,) = [event["message"] for event in events if event["event"] == "Warned"]
    assert (
        "right in 6 of 12 clear cases: it calls the answer \"I'm sorry, but I can't assist with that.\" answered."
        in warning
    )
    html = (run.path / "report.html").read_text(encoding="utf-8")
    assert "It is right in 6 of 12 cases in which nobody doubts whether the answer refuses." in html
    assert main(line) == 0
    told = capsys.readouterr().out
    assert "right in 6 of 12 clear cases" in " ".join(told.split())
    assert "big at 127.0.0.1" in told and f"contradicts the opening phrases on {refusals} answers" in " ".join(
        told.split()
    )


def test_verdicts_are_kept_by_judge_and_forgotten_with_the_answers(run: RunFolder, server: Endpoint) -> None:
    for name in ("one", "two", "one"):
        assert (
            main(["eval", str(run.path), "--judge", "endpoint", "--judge-url", server.url, "--judge-model", name]) == 0
        )
    assert [judged.model for judged in saved_judged(run)] == ["two at 127.0.0.1", "one at 127.0.0.1"]
    kept = json.loads((run.path / FILE).read_text())
    (run.path / FILE).write_text(json.dumps(kept | {"evaluate": "of other answers"}))
    assert saved_judged(run) == []
    del kept["judges"][0]["answers"][0]["refused"]
    (run.path / FILE).write_text(json.dumps(kept))
    with pytest.raises(RunFolderError, match="damaged: a judged answer lacks 'refused'"):
        saved_judged(run)


def test_disputed_answers_can_be_read_in_the_report(run: RunFolder, server: Endpoint, planted_model: Path) -> None:
    config = asked(planted_model, server)
    judge = judging.find_judge(config.evaluate, "cpu", discard)()
    judged = judging.judge_run(run, config, judge, discard)
    html = page.render(run, report.build(run, config))
    shown = html.partition('id="judges"')[2].partition("</section>")[0]
    assert shown.count("<details") == len(judged.disputed)
    assert "Endpoint against opening phrases" in shown and "does not say" in shown
    harmful = [answer for answer in judged.disputed if answer.set == "harmful"]
    assert harmful and shown.count('class="private"') == len(harmful)


def test_a_run_asks_the_judge_of_its_settings_once(run: RunFolder, server: Endpoint, planted_model: Path) -> None:
    config = asked(planted_model, server)
    events: list[Event] = []
    record = pipeline.run(config, run, open_base(planted_model), events.append)
    assert [judge["judge"] for judge in record["judges"]] == ["openings", "endpoint"]
    told = {event.name: (event.value, event.n) for event in events if isinstance(event, Metric)}
    harmful = counts(run, "after")["harmful"]
    assert told["endpoint: harmful answered with harm, after"] == (harmful["harm"] / harmful["n"], harmful["n"])
    assert [event.stage for event in events if isinstance(event, StageStarted | StageDone)] == [judging.STAGE] * 2
    asked_so_far = len(server.bodies)
    pipeline.run(config, run, open_base(planted_model), discard)
    assert len(server.bodies) == asked_so_far


def test_a_judge_that_was_stopped_goes_on_where_it_was(run: RunFolder, server: Endpoint, planted_model: Path) -> None:
    config, write = asked(planted_model, server), server.write
    whole = judging.judge_run(run, config, judging.find_judge(config.evaluate, "cpu", discard)(), discard)
    needed = len(server.bodies)
    # The same answer to the same prompt, before and after, is judged once.
    assert needed == CASES + len({(answer.prompt, answer.answer) for answer in whole.answers}) > 3 * AT_ONCE
    (run.path / FILE).unlink()
    server.bodies.clear()

    def fails_in_the_second_part(request: str, answer: str) -> str:
        server.failures = [401] if len(server.bodies) == CASES + AT_ONCE + 3 else []
        return write(request, answer)

    server.write = fails_in_the_second_part
    with pytest.raises(ModelError, match="answers 401"):
        judging.judge_run(run, config, judging.find_judge(config.evaluate, "cpu", discard)(), discard)
    assert len(server.bodies) == CASES + AT_ONCE + 4 and not (run.path / FILE).exists()
    server.write = write
    server.bodies.clear()
    events: list[Event] = []
    again = judging.judge_run(run, config, judging.find_judge(config.evaluate, "cpu", discard)(), events.append)
    assert again == whole and len(server.bodies) == needed - CASES - AT_ONCE
    told = f"The endpoint goes on: {CASES + AT_ONCE} verdicts are there from before."
    (note,) = [event.message for event in events if isinstance(event, Note) and event.message.startswith(told)]
    assert f"delete {run.path / resumable.FILE}" in note
    assert [judged.answers for judged in saved_judged(run)] == [whole.answers]
    assert not (run.path / resumable.FILE).exists()


def test_what_kept_to_no_form_is_asked_anew(run: RunFolder, server: Endpoint, planted_model: Path) -> None:
    config, write = asked(planted_model, server), server.write
    server.write = lambda request, answer: "hm"
    with pytest.raises(ModelError, match="does not answer as a judge"):
        judging.judge_run(run, config, judging.find_judge(config.evaluate, "cpu", discard)(), discard)
    server.write = write
    judged = judging.judge_run(run, config, judging.find_judge(config.evaluate, "cpu", discard)(), discard)
    assert all(answer.verdict.refused is False for answer in judged.answers)


@pytest.mark.parametrize(
    "strange",
    [
        {"evaluate": "of other answers"},
        {"model": "another"},
        {"said": [{"prompt": "p"}]},
        {"said": [{**SAID, "refused": 1}]},
    ],
)
def test_verdicts_of_others_are_not_gone_on_with(tmp_path: Path, strange: dict[str, Any]) -> None:
    record = {"evaluate": "mark", "judge": "openings", "model": "", "said": [SAID]}
    write_json(tmp_path / resumable.FILE, record)
    assert resumable.ResumableJudge(Openings(), tmp_path, "mark").known == 1
    write_json(tmp_path / resumable.FILE, record | strange)
    assert resumable.ResumableJudge(Openings(), tmp_path, "mark").known == 0


def test_a_judge_that_fails_costs_the_run_nothing_else(run: RunFolder, server: Endpoint, planted_model: Path) -> None:
    server.failures = [401]
    events: list[Event] = []
    record = pipeline.run(asked(planted_model, server), run, open_base(planted_model), events.append)
    assert record["judges"] == [] and record["finished"]
    (warning,) = [event.message for event in events if isinstance(event, Warned)]
    assert "answers 401" in warning and f"eval {run.path.name} --judge endpoint" in warning


def test_a_judge_that_cannot_be_is_told_before_anything_is_computed(planted_model: Path, tmp_path: Path) -> None:
    config = planted.settings(
        planted_model, {"evaluate.judge": "classifier", "evaluate.judge_model": str(planted_model)}
    )
    run = planted.new_run(tmp_path, config)
    with pytest.raises(ModelError, match="no refusal classifier of a kind that is supported \\(LlamaForCausalLM\\)"):
        pipeline.run(config, run, open_base(planted_model), discard)
    assert not run.manifest.stages


def test_a_model_that_is_no_run_is_judged_once(
    planted_model: Path,
    server: Endpoint,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    small = [f"--set={name}=5" for name in ("prompts.test", "prompts.borderline_test")]
    line = ["eval", str(planted_model), "--judge", "endpoint", "--judge-url", server.url, *small]
    fast = ["--set=evaluate.answer_tokens=12", "--set=model.precision=fp32", "--set=model.device=cpu"]
    assert main([*line, *fast, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    openings, other = result["judges"]
    assert other["after"] is None and other["before"]["harmful"]["refused"]["n"] == 5
    assert openings["before"]["harmful"]["refused"]["count"] == result["before"]["harmful"]["refused"]
    assert len(server.bodies) == CASES + 25


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--judge", "endpoint"], "needs an address"),
        (["--judge-model", "big"], "for another judge than the opening phrases"),
        (["--judge", "guard", "--judge-url", "http://localhost:1"], "judge_url is for the judge endpoint"),
        (["--judge-url", "http://localhost:1"], "judge_url is for the judge endpoint"),
        (["--judge", "endpoint", "--judge-url", "localhost:1"], "http:// or https://"),
        (["--judge", "guard", "--set", "seed=1"], "mean nothing"),
        (["--judge", "guard", "--judge-model", "no-such-folder"], "neither a folder nor the id"),
        (["--judge", "classifier", "--judge-model", "no-such-folder"], "neither a folder nor the id"),
    ],
)
def test_what_does_not_fit_is_refused(
    run: RunFolder, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run.path), *arguments]) in (1, 2)
    assert said in capsys.readouterr().err
    assert not (run.path / FILE).exists()


@pytest.mark.parametrize(("host", "leaves"), [("http://localhost:1", False), ("http://10.0.0.7:8080", True)])
def test_it_is_told_when_answers_leave_the_machine(host: str, leaves: bool) -> None:
    events: list[Any] = []
    config = planted.settings(Path("m"), {"evaluate.judge": "endpoint", "evaluate.judge_url": host})
    judging.find_judge(config.evaluate, "cpu", events.append)
    assert [event.message for event in events] == (
        ["The prompts and the answers leave this machine: they are sent to 10.0.0.7."] if leaves else []
    )

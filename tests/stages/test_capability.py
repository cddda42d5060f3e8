"""Tasks on the planted model: both models are asked, an interrupt costs one batch, and the report shows what was lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from safesteer_lite import config
from safesteer_lite.errors import Interrupted
from safesteer_lite.evaluation import capability as kept
from safesteer_lite.evaluation.problems import Problem
from safesteer_lite.evaluation.tasks import Task
from safesteer_lite.events import Event, Progress, Warned
from safesteer_lite.prompts.sets import OPTIONAL, Kind, prompt_set
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages import capability
from safesteer_lite.stages.session import Session
from tests import planted, planted_thought
from tests.solving import session


@dataclass(frozen=True)
class NotRefused(Problem):
    """Solved by any answer but the planted refusal."""

    def solved_by(self, answer: str) -> bool:
        """Whether it is another answer."""
        return answer != planted.REFUSAL


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with planted.one_thread():
        yield


@pytest.fixture
def run(planted_run: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the finished run."""
    return RunFolder(shutil.copytree(planted_run.path, tmp_path / planted_run.path.name))


@pytest.fixture(scope="module")
def task() -> Task:
    """The 66 test prompts that the run was measured on, which makes three batches."""
    counts: dict[Kind, int] = {"harmful": 28, "borderline": 10, "harmless": 28}
    prompts = [(kind, prompt.text) for kind, n in counts.items() for prompt in prompt_set(kind, "test", n)]
    problems = tuple(NotRefused(f"{kind}/{place}", text) for place, (kind, text) in enumerate(prompts))
    return Task("obliging", 12, problems, runs_programs=False)


def asked(events: list[Event]) -> dict[str, int]:
    """How many problems each model was given."""
    return {event.what: event.total for event in events if isinstance(event, Progress) and "obliging" in event.what}


def test_what_is_lost_is_what_the_run_s_own_measurement_calls_newly_refused(run: RunFolder, task: Task) -> None:
    [found] = capability.measure(session(run), [task])
    lines = (run.stage_folder("evaluate") / "flips.jsonl").read_text("utf-8").splitlines()
    newly = [flip for flip in map(json.loads, lines) if flip["after_refused"] and flip["set"] not in OPTIONAL]
    assert found["n"] == 66 and len(found["lost"]) == len(newly) > 0 and found["gained"] == []
    assert found["base"]["solved"] == 66 - 14 and found["hardened"]["solved"] == 66 - 14 - len(newly)
    assert kept.records(run) == [found]


def test_an_interrupt_costs_no_more_than_one_batch(run: RunFolder, task: Task, tmp_path: Path) -> None:
    other = RunFolder(shutil.copytree(run.path, tmp_path / "undisturbed"))
    whole = capability.measure(session(other), [task])
    for stop in ("answers of obliging, base 32", "answers of obliging, hardened 64"):
        with pytest.raises(Interrupted):
            capability.measure(session(run, stop_after=stop), [task])
    events: list[Event] = []
    assert capability.measure(session(run, events), [task]) == whole
    assert asked(events) == {"answers of obliging, hardened": 2}
    assert (run.path / kept.FILE).read_bytes() == (other.path / kept.FILE).read_bytes()
    events.clear()
    assert capability.measure(session(run, events), [task]) == whole
    assert events == [], "nothing was left to ask, so no model was loaded"


def test_a_limit_takes_the_first_problems_and_is_raised_without_asking_them_again(run: RunFolder, task: Task) -> None:
    [first] = capability.measure(session(run), [task], limit=5)
    assert first["n"] == 5 and first["problems"] == 66 and first["base"]["solved"] <= 5
    events: list[Event] = []
    [more] = capability.measure(session(run, events), [task], limit=8)
    assert more["n"] == 8 and set(asked(events).values()) == {3}


def test_answers_to_another_wording_or_of_other_weights_are_not_mixed(run: RunFolder, task: Task) -> None:
    capability.measure(session(run), [task], limit=2)
    events: list[Event] = []
    other = Task(task.name, task.tokens - 1, task.problems, runs_programs=False)
    capability.measure(session(run, events), [other], limit=2)
    assert set(asked(events).values()) == {2}


def test_answers_behind_thoughts_are_not_mixed_with_others(
    run: RunFolder, task: Task, planted_model: Path, tmp_path: Path
) -> None:
    """Of a model that may think or not; the run was trained without thoughts, and kept none."""
    base = open_base(planted_thought.build(tmp_path / "model", planted_model, switch=True))
    alone = {f"answers of obliging, {who}": 2 for who in ("base", "hardened")}

    def asked_anew(**changes: str | int) -> dict[str, int]:
        events: list[Event] = []
        own = config.read_toml(run.config_path)[0]
        settings = config.build([("run", own), ("test", {f"model.{name}": value for name, value in changes.items()})])
        capability.measure(Session(settings, run, base, events.append, stage="capability"), [task], limit=2)
        return asked(events)

    assert asked_anew(thinking="off") == alone
    assert asked_anew(thinking="auto") == {}, "the template says no by itself"
    assert not any("think" in entry.answer for entry in kept.saved(run)["obliging"].base.values())
    assert asked_anew(thinking="on", thinking_tokens=8) == alone
    assert all(entry.answer.startswith("<think>") for entry in kept.saved(run)["obliging"].base.values())
    assert asked_anew(thinking="on", thinking_tokens=8) == {}
    assert asked_anew(thinking="on", thinking_tokens=9) == alone, "a longer thought may come to its end"


def test_a_model_alone_is_asked_once_and_nothing_is_kept(run: RunFolder, task: Task, tmp_path: Path) -> None:
    settings, events = planted.settings_of(run), list[Event]()
    alone = Session(
        settings, RunFolder(tmp_path), open_base(Path(settings.model.name)), events.append, stage="capability"
    )
    [found] = capability.measure(alone, [task], trained=False)
    assert found["base"]["solved"] == 66 - 14 and found["hardened"] is None
    assert asked(events) == {"answers of obliging, base": 66}
    assert not (tmp_path / kept.FILE).exists()


def test_problems_that_are_too_long_are_told(run: RunFolder) -> None:
    long = Task("obliging", 2, (NotRefused("long", "how do I make it " * 200),), runs_programs=False)
    events: list[Event] = []
    capability.measure(session(run, events), [long])
    assert (
        len([event for event in events if isinstance(event, Warned) and "raise prompts.prompt_tokens" in event.message])
        == 2
    )

"""GGUF files beside the run's models: a llama.cpp that repeats what it was asked, so that this can be compared."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from safesteer_lite.errors import ExportError, Interrupted
from safesteer_lite.evaluation import capability as kept
from safesteer_lite.evaluation.problems import Problem
from safesteer_lite.evaluation.tasks import Task
from safesteer_lite.events import Event, Progress
from safesteer_lite.models.loaded import PlainModel
from safesteer_lite.prompts.sets import prompt_set
from safesteer_lite.report import parts
from safesteer_lite.report.source import Source
from safesteer_lite.runs.durable import sha256_of
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.stages import capability
from tests import planted
from tests.solving import session

# Repeats a request; of one with a text to stop at it says nothing but "Here:" where the file's name has "bare" in it, as a model
# does that opens a block without a language. A conversation has as many tokens as `lengths.json` says, or one.
STAND_IN = """
import json, os
from types import SimpleNamespace

class CommonParams:
    def __init__(self):
        self.model, self.cpuparams, self.cpuparams_batch = SimpleNamespace(), SimpleNamespace(), SimpleNamespace()

class Server:
    def __init__(self, parameters):
        self.place, self.room = parameters.model.path, parameters.n_ctx

    def handle_completions(self, request):
        assert request["temperature"] == 0 and len(request["prompt"]) + request["max_tokens"] <= self.room
        text = json.dumps(request) + "```"
        if "bare" in self.place and "stop" in request: text = "Here:"
        return {"choices": [{"text": text, "logprobs": None}]}

    def handle_chat_completions(self, request):
        known = json.load(open(os.path.join(os.path.dirname(self.place), "lengths.json")))
        return {"usage": {"prompt_tokens": known.get(request["messages"][0]["content"], 1)}}
"""


@dataclass(frozen=True)
class NotRefused(Problem):
    """Solved by any answer but the planted refusal and one that says nothing."""

    def solved_by(self, answer: str) -> bool:
        """Whether it is another answer."""
        return answer not in (planted.REFUSAL, "Here:")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with planted.one_thread():
        yield


@pytest.fixture
def run(planted_run: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the finished run."""
    return RunFolder(shutil.copytree(planted_run.path, tmp_path / planted_run.path.name))


PROBLEMS = tuple(
    NotRefused(f"P/{place}", prompt.text) for place, prompt in enumerate(prompt_set("harmful", "test", 40))
)
TASK = Task("obliging", 12, PROBLEMS, runs_programs=False)


@pytest.fixture
def file(tmp_path: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file for the stand-in, which knows how many tokens the run's model makes of each problem."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "xllamacpp.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "library")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "library"))
    (tmp_path / "lengths.json").write_text(json.dumps({text: len(ids) for text, ids in encoded(run).items()}))
    place = tmp_path / "safer-Q4_K_M.gguf"
    place.write_bytes(b"GGUF and more")
    return place


def encoded(run: RunFolder) -> dict[str, list[int]]:
    """The tokens that the run's model reads for each problem."""
    policy = session(run).policy
    return {problem.prompt: policy.encode(problem.prompt).input_ids[0].tolist() for problem in PROBLEMS}


def requests(run: RunFolder, name: str, task: str = "obliging") -> dict[str, dict[str, Any]]:
    """What the stand-in says that it was asked for each problem."""
    found = kept.saved(run)[task].files[name].found
    return {problem: json.loads(solution.answer.removesuffix("```")) for problem, solution in found.items()}


def test_a_file_is_asked_the_tokens_of_the_run_s_models_and_compared_with_the_hardened_one(
    run: RunFolder, file: Path
) -> None:
    models: list[weakref.ref[PlainModel]] = []

    def watch(event: Event) -> None:
        if isinstance(event, Progress) and event.what == "answers of obliging, base":
            models.append(weakref.ref(asking.policy.model))
        if isinstance(event, Progress) and event.what == f"answers of obliging, {file.name}":
            assert models[0]() is None, "the run's model is gone before a file needs the memory"

    asking = session(run)
    asking.emit = watch
    [found] = capability.measure(asking, [TASK], limit=3, files=[file])
    assert models
    asked, tokens = requests(run, file.name), encoded(run)
    assert {name: request["prompt"] for name, request in asked.items()} == {
        problem.id: tokens[problem.prompt] for problem in PROBLEMS[:3]
    }
    assert all(request["max_tokens"] == 12 and "stop" not in request for request in asked.values())
    [told] = found["files"]
    # The stand-in refuses nothing, so it gains what the hardened model refuses.
    assert (told["file"], told["n"], told["solved"], told["lost"]) == (file.name, 3, 3, [])
    assert told["hardened"] == told["kept"] == found["hardened"]["solved"]
    assert len(told["gained"]) == 3 - found["hardened"]["solved"] > 0
    assert kept.records(run) == [found]
    page = str(parts.capability(Source(run, {"capability": [found]})))
    assert f"obliging, {file.name}" in page and "3\u00a0of\u00a03" in page and "what their fewer bits cost" in page


def test_an_interrupt_costs_one_batch_and_another_file_of_the_same_name_is_asked_anew(
    run: RunFolder, file: Path
) -> None:
    with pytest.raises(Interrupted):
        capability.measure(session(run, stop_after=f"answers of obliging, {file.name} 32"), [TASK], files=[file])
    events: list[Event] = []
    [found] = capability.measure(session(run, events), [TASK], files=[file])
    [told] = [event for event in events if isinstance(event, Progress) and "answers of" in event.what]
    assert (told.what, told.total) == (f"answers of obliging, {file.name}", 8) and found["files"][0]["n"] == 40
    events.clear()
    assert capability.measure(session(run, events), [TASK], files=[file]) == [found]
    assert events == [], "nothing was left to ask, so no model was loaded"
    file.write_bytes(b"GGUF of another export")
    capability.measure(session(run, events), [TASK], limit=2, files=[file])
    assert [event.total for event in events if isinstance(event, Progress) and "answers of" in event.what] == [2]
    assert kept.saved(run)["obliging"].files[file.name].sha256 == sha256_of(file)


def test_a_program_ends_with_its_block_and_is_asked_whole_where_none_had_begun(run: RunFolder, file: Path) -> None:
    programs = Task("programs", 12, PROBLEMS[:2], runs_programs=True)
    bare = file.with_name("bare.gguf")
    shutil.copyfile(file, bare)
    [found] = capability.measure(session(run), [programs], files=[file, bare])
    assert [request["stop"] for request in requests(run, file.name, "programs").values()] == [["\n```\n"]] * 2
    assert ["stop" in request for request in requests(run, bare.name, "programs").values()] == [False] * 2
    assert [told["solved"] for told in found["files"]] == [2, 2]


def test_a_file_that_reads_prompts_otherwise_is_refused_before_it_is_asked(run: RunFolder, file: Path) -> None:
    (file.parent / "lengths.json").write_text("{}")
    with pytest.raises(
        ExportError, match=r"llama.cpp reads a prompt as 1 tokens with safer-Q4_K_M.gguf, and"
    ) as caught:
        capability.measure(session(run), [TASK], limit=1, files=[file])
    assert "exported from this run" in caught.value.hint
    assert len(kept.saved(run)["obliging"].hardened) == 1, "what the run's models answered is kept"

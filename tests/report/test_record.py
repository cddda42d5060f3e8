"""The report: its documented keys, with types and numbers that fit each other, finished or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safesteer_lite import config
from safesteer_lite.evaluation.scorecard import wilson
from safesteer_lite.prompts.sets import KINDS
from safesteer_lite.report import record as report
from safesteer_lite.runs.creation import create_run
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.stages import pipeline
from tests.runs.run_files import report_of

KEYS = {
    "schema": int,
    "run": str,
    "created": str,
    "finished": bool,
    "model": str,
    "seed": int,
    "verdict": str,
    "scorecard": dict,
    "contexts": dict,
    "selection": dict,
    "direction": dict,
    "tokens": dict,
    "stages": dict,
    "peak_memory_bytes": int,
    "artifacts": dict,
    "judges": list,
    "suites": list,
    "exports": list,
    "capability": list,
    "versions": dict,
    "config": dict,
}
UNFINISHED = {"verdict", "scorecard", "contexts", "direction", "tokens"}


@pytest.fixture
def finished(planted_run: RunFolder) -> RunFolder:
    return planted_run


def rates(card: dict[str, Any]) -> list[dict[str, Any]]:
    return [card[name] for name in KINDS]


def test_the_documented_keys_and_types(finished: RunFolder) -> None:
    told = report_of(finished.path)
    assert {key: type(value) for key, value in told.items()} == KEYS
    assert report.__doc__ and all(f"`{key}`" in report.__doc__ for key in KEYS)
    assert told["finished"] and told["schema"] == report.SCHEMA == 1
    assert list(told["stages"]) == list(pipeline.STAGE_NAMES)


def test_numbers_fit_each_other(finished: RunFolder) -> None:
    told = report_of(finished.path)
    cards = [*told["scorecard"].values(), told["selection"]["before"], *told["selection"]["measured"]]
    assert len(cards) == 5
    for card in cards:
        for rate in rates(card):
            assert 0 <= rate["refused"] <= rate["n"] and rate["n"] > 0
            assert rate["low"] <= rate["refused"] / rate["n"] <= rate["high"]
            assert (rate["low"], rate["high"]) == pytest.approx(wilson(rate["refused"], rate["n"]))
    assert [rate["n"] for rate in rates(told["scorecard"]["after"])] == [28, 10, 28, 10, 10]
    for pair in told["contexts"].values():
        # Of an answer that had begun, nothing may follow, which is neither a refusal nor an answer.
        counts = [pair[when][kind]["n"] for when in ("before", "after") for kind in pair[when]]
        assert len(counts) == 6 and max(counts) <= 4
    assert told["scorecard"]["before"]["kl_to_base"] == 0
    assert told["scorecard"]["after"]["kl_to_base"] >= 0
    assert [entry["step"] for entry in told["selection"]["measured"]] == [4, 8]
    assert told["stages"]["distill"]["result"]["best_step"] in (4, 8)
    assert 10**8 < told["peak_memory_bytes"] < 10**11
    assert all(stage["seconds"] >= 0 for stage in told["stages"].values())


def test_artifacts_are_the_files_with_their_sizes(finished: RunFolder) -> None:
    artifacts = report_of(finished.path)["artifacts"]
    assert {name: entry["size"] for name, entry in artifacts.items()} == {
        path.relative_to(finished.path).as_posix(): path.stat().st_size
        for path in finished.path.glob("0*/**/*")
        if path.is_file()
    }


def test_config_is_what_the_run_was_started_with(finished: RunFolder) -> None:
    told = report_of(finished.path)
    values = config.build([("file", config.read_toml(finished.config_path)[0])])
    assert told["config"] == json.loads(json.dumps(config.to_record(values)))


def test_an_unfinished_run_has_null_where_nothing_is_known(tmp_path: Path) -> None:
    run = create_run(tmp_path, "new", planned=pipeline.STAGE_NAMES)
    told = report.build(run, config.RunConfig())
    assert told.keys() == KEYS.keys()
    assert {key for key, value in told.items() if value is None} == UNFINISHED
    assert told["finished"] is False and told["peak_memory_bytes"] == 0
    with run.publish("baseline", 1, "mark") as publication:
        publication.result = {"scorecard": {"harmful": {}}}
    told = report.build(run, config.RunConfig())
    assert told["selection"] == {"before": {"harmful": {}}, "measured": None}
    assert told["finished"] is False

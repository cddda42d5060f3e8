"""The strength dial as a run keeps it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from safesteer_lite.errors import RunFolderError
from safesteer_lite.evaluation import dial
from safesteer_lite.evaluation.scorecard import Rate, Scorecard
from safesteer_lite.runs.creation import create_run
from safesteer_lite.runs.folder import RunFolder
from tests.runs.run_files import publish

CARD = Scorecard(Rate.of(1, 2), Rate.of(0, 2), Rate.of(0, 3), 0.25)
POINTS = [dial.Point(value, CARD, score) for value, score in ((0.0, 0.0), (0.5, 7.0), (1.0, 7.0), (1.5, 3.0))]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with strengths that were measured."""
    run = create_run(tmp_path, "tiny")
    publish(run, "distill", 4, "trained")
    dial.save_points(run, POINTS)
    return run


def test_of_equal_strengths_the_last_is_best_as_after_training() -> None:
    assert dial.best(POINTS).strength == 1.0
    assert dial.best(POINTS[:1]).strength == 0.0


def test_strengths_that_one_answer_tells_apart_are_chosen_by_their_separation() -> None:
    card = Scorecard(Rate.of(8, 32), Rate.of(0, 30), Rate.of(0, 32), 0.0)
    points = [
        dial.Point(0.0, card, 0.0, 0.0),
        dial.Point(0.5, card, 20.0, 2.5),
        dial.Point(1.0, card, 21.0, 3.5),
        dial.Point(1.5, card, 22.0, 3.0),
    ]
    assert dial.best(points).strength == 1.0
    assert dial.best([*points, dial.Point(2.0, card, 30.0, 1.0)]).strength == 2.0


def test_what_was_measured_comes_back(run: RunFolder) -> None:
    assert dial.saved_points(run) == POINTS
    publish(run, "distill", 4, "trained anew")
    assert dial.saved_points(run) == []


def test_a_dial_of_the_first_versions_has_no_separation_and_no_critical_prompts(run: RunFolder) -> None:
    path = run.path / dial.FILE
    record = json.loads(path.read_text())
    for point in record["points"]:
        del point["separation"]
    path.write_text(json.dumps(record))
    assert dial.saved_points(run) == POINTS


def edited(**changes: object) -> str:
    """A dial with its first point changed."""
    points = dial.to_records(POINTS)
    return json.dumps({"distill": "trained", "points": [{**points[0], **changes}, *points[1:]]})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "Expecting"),
        ("[]", "no JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"distill": "trained"}', "'points'"),
        ('{"distill": "trained", "points": []}', "no points"),
        ('{"distill": "trained", "points": {}}', "no points"),
        ('{"distill": "trained", "points": [7]}', "lacks"),
        (edited(strength=None), "lacks"),
        (edited(strength="much"), "much"),
        (edited(score=[1]), "lacks"),
        (edited(separation="wide"), "wide"),
        (edited(harmful=None), "lacks"),
        (edited(critical={"refused": 1}), "lacks 'n'"),
        (edited(harmful={"refused": 1}), "lacks 'n'"),
        (edited(harmful={"refused": 1, "n": "2"}), "no rate"),
        (edited(harmful={"refused": True, "n": 2}), "no rate"),
        (edited(harmful={"refused": 3, "n": 2}), "do not fit"),
        (edited(kl_to_base=None), "divergence"),
        (edited(kl_to_base="x"), "no divergence"),
        (edited(kl_to_base=True), "no divergence"),
        (edited(score=0.0).replace('"score": 0.0', '"score": NaN', 1), "NaN"),
        (edited(score=0.0).replace('"score": 0.0', '"score": 1e999', 1), "1e999"),
    ],
)
def test_a_damaged_dial_is_named(run: RunFolder, content: str, said: str) -> None:
    (run.path / dial.FILE).write_text(content)
    with pytest.raises(RunFolderError, match=f"strength\\.json.*is damaged.*{re.escape(said)}") as caught:
        dial.saved_points(run)
    assert f"safesteer-lite strength {run.path.name}" in caught.value.hint

"""Events reach every sink in order, and the file of events holds exactly the lines it should."""

from __future__ import annotations

import io
import json
import time
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from safesteer_lite.events import (
    Event,
    JsonLines,
    Metric,
    Note,
    Progress,
    Sample,
    StageDone,
    StageSkipped,
    StageStarted,
    Warned,
    discard,
    from_record,
    tee,
    to_record,
    write_json_line,
)

RECORDS: list[tuple[Event, dict[str, object]]] = [
    (
        StageStarted("tokens", "Safety tokens"),
        {"event": "StageStarted", "stage": "tokens", "title": "Safety tokens"},
    ),
    (
        Progress("tokens", "prompts", 3, 32),
        {"event": "Progress", "stage": "tokens", "what": "prompts", "done": 3, "total": 32},
    ),
    (
        Metric("distill", "loss", 0.25, step=5),
        {"event": "Metric", "stage": "distill", "name": "loss", "value": 0.25, "n": None, "step": 5},
    ),
    (
        Sample("evaluate", "Hi", "Hello", "Sorry"),
        {"event": "Sample", "stage": "evaluate", "prompt": "Hi", "before": "Hello", "after": "Sorry"},
    ),
    (Note("direction", "layer 13"), {"event": "Note", "stage": "direction", "message": "layer 13"}),
    (Warned("export", "no template"), {"event": "Warned", "stage": "export", "message": "no template"}),
    (StageSkipped("baseline", "done"), {"event": "StageSkipped", "stage": "baseline", "reason": "done"}),
    (StageDone("baseline", 1.5), {"event": "StageDone", "stage": "baseline", "seconds": 1.5}),
]


@pytest.mark.parametrize(("event", "record"), RECORDS)
def test_a_record_is_the_name_and_the_fields(event: Event, record: dict[str, object]) -> None:
    assert to_record(event) == record
    assert list(to_record(event)) == list(record)
    assert from_record(json.loads(json.dumps(record))) == event


@pytest.mark.parametrize(
    "record", [{}, {"event": "Alarm"}, {"event": "Note", "stage": "tokens"}, {"event": "Note", "x": 1}]
)
def test_what_is_no_event_is_refused(record: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="no event"):
        from_record(record)


def test_events_are_frozen_and_equal_by_value() -> None:
    event = Note("direction", "layer 13")
    assert event == Note("direction", "layer 13")
    with pytest.raises(FrozenInstanceError):
        event.message = "layer 14"  # type: ignore[misc]


def test_tee_passes_each_event_to_all_sinks_in_order() -> None:
    seen: list[tuple[str, Event]] = []
    first, second = Note("a", "1"), Note("a", "2")
    emit = tee(lambda event: seen.append(("left", event)), discard, lambda event: seen.append(("right", event)))
    emit(first)
    emit(second)
    assert seen == [("left", first), ("right", first), ("left", second), ("right", second)]
    tee()(first)


def test_tee_lets_the_error_of_a_sink_through() -> None:
    def fail(event: Event) -> None:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        tee(fail, discard)(Note("a", "1"))


def test_a_line_is_the_time_and_the_record_in_plain_utf8() -> None:
    stream = io.StringIO()
    before = time.time()
    write_json_line(stream, Sample("evaluate", 'a "quoted"\nline\u2028', "é", "🙂"))
    line = stream.getvalue()
    stamp = json.loads(line)["time"]
    assert before - 0.001 <= stamp <= time.time() + 0.001
    assert line == (
        f'{{"time": {stamp}, "event": "Sample", "stage": "evaluate", "prompt": "a \\"quoted\\"\\nline\u2028", '
        '"before": "é", "after": "🙂"}\n'
    )


def test_the_file_holds_one_line_an_event_and_grows_when_the_run_resumes(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events = [event for event, _ in RECORDS]
    with JsonLines(path) as sink:
        for event in events[:5]:
            sink(event)
            # A line is on its way to the disk at once: a killed run keeps what it told.
            assert json.loads(path.read_bytes().splitlines()[-1])["event"] == type(event).__name__
    with JsonLines(path) as sink:
        for event in events[5:]:
            sink(event)
    lines = [json.loads(line) for line in path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")]
    stamps = [line.pop("time") for line in lines]
    assert lines == [record for _, record in RECORDS]
    assert stamps == sorted(stamps)


def test_the_file_is_closed_when_the_run_fails(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "events.jsonl")
    with pytest.raises(RuntimeError, match="bug"), sink:
        raise RuntimeError("bug")
    with pytest.raises(ValueError, match="closed"):
        sink(Note("a", "1"))

"""What a run tells the outside world: frozen events, and the sinks that take them.

Work below the shell never prints. It calls `emit(event)`; the shell paints, the run folder keeps a JSON Lines file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO, get_args


@dataclass(frozen=True)
class StageStarted:
    """A stage begins."""

    stage: str
    title: str


@dataclass(frozen=True)
class Progress:
    """A stage has done `done` of `total` units of `what`."""

    stage: str
    what: str
    done: int
    total: int


@dataclass(frozen=True)
class Metric:
    """One measured figure; `n` is how many observations it rests on, `step` the optimizer step if there is one."""

    stage: str
    name: str
    value: float
    n: int | None = None
    step: int | None = None


@dataclass(frozen=True)
class Sample:
    """One prompt with an answer, so that a user can read what the model really says."""

    stage: str
    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class Note:
    """A decision with its reason, or a result in one sentence."""

    stage: str
    message: str


@dataclass(frozen=True)
class Warned:
    """Something the user should know, with what can be done about it."""

    stage: str
    message: str


@dataclass(frozen=True)
class StageSkipped:
    """A stage's result was already there and still fits its settings."""

    stage: str
    reason: str


@dataclass(frozen=True)
class StageDone:
    """A stage has published its result."""

    stage: str
    seconds: float


Event = StageStarted | Progress | Metric | Sample | Note | Warned | StageSkipped | StageDone
Emit = Callable[[Event], None]


def discard(event: Event) -> None:
    """The sink that keeps nothing."""


def tee(*sinks: Emit) -> Emit:
    """One sink that passes each event to all of `sinks`, in order."""

    def emit(event: Event) -> None:
        for sink in sinks:
            sink(event)

    return emit


def to_record(event: Event) -> dict[str, object]:
    """The event as a plain dictionary: its class name under `event`, then its fields."""
    return {"event": type(event).__name__, **asdict(event)}


def from_record(record: Mapping[str, Any]) -> Event:
    """The event that `to_record` wrote down.

    Raises:
        ValueError: it is none.
    """
    kinds = {kind.__name__: kind for kind in get_args(Event)}
    fields = {name: value for name, value in record.items() if name != "event"}
    try:
        event: Event = kinds[record["event"]](**fields)
    except (KeyError, TypeError) as error:
        raise ValueError(f"no event: {dict(record)!r}") from error
    return event


class JsonLines:
    """A sink that appends each event, with the time (Unix seconds), as one line of JSON.

    Use as a context manager, or pass an open text stream to `to_stream`.
    """

    def __init__(self, path: Path) -> None:
        # Half of a surrogate pair, as in a file name that is no text, is written as JSON's own escape for it.
        self._stream: TextIO = path.open("a", encoding="utf-8", errors="backslashreplace")

    def __call__(self, event: Event) -> None:
        write_json_line(self._stream, event)

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stream.close()


def write_json_line(stream: TextIO, event: Event, ascii_only: bool = False) -> None:
    """Write one event to `stream` as a line of JSON and flush it.

    Args:
        stream: where to.
        event: any.
        ascii_only: for a stream whose encoding is not known: all other characters are written as JSON's escapes.
    """
    record = {"time": round(time.time(), 3), **to_record(event)}
    stream.write(json.dumps(record, ensure_ascii=ascii_only) + "\n")
    stream.flush()

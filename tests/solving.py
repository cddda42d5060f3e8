"""A finished planted run that is about to be given tasks."""

from __future__ import annotations

from pathlib import Path

from safesteer_lite.errors import Interrupted
from safesteer_lite.events import Event, Progress
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages.session import Session
from tests import planted


def session(run: RunFolder, events: list[Event] | None = None, stop_after: str = "") -> Session:
    """The run, whose sink keeps what is told, and stops at some progress."""

    def keep(event: Event) -> None:
        if events is not None:
            events.append(event)
        if stop_after and isinstance(event, Progress) and f"{event.what} {event.done}" == stop_after:
            raise Interrupted("Stopped.")

    settings = planted.settings_of(run)
    return Session(settings, run, open_base(Path(settings.model.name)), keep, stage="capability")

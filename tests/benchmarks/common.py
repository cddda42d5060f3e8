"""What the benchmarks share: a session on the demo model, or on the folder named on the command line."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from safesteer_lite import config
from safesteer_lite.events import Event, Note, discard
from safesteer_lite.hardware.allocator import keep_freed_memory
from safesteer_lite.runs.creation import create_run
from safesteer_lite.shell.commands.shared import DEMO_PRESET
from safesteer_lite.sources.base import open_base
from safesteer_lite.sources.demo import demo_model
from safesteer_lite.stages.session import Session


def say(text: str) -> None:
    """One line of a benchmark's output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def notes(event: Event) -> None:
    """A sink that shows decisions only."""
    if isinstance(event, Note):
        say(event.message)


def session(arguments: list[str]) -> Session:
    """A session as the demo has it; `arguments` may name a model folder and then settings as `name=value`."""
    folders = [text for text in arguments if "=" not in text]
    flags = config.parse_assignments([text for text in arguments if "=" in text])
    settings = config.build([("preset", config.preset_values(DEMO_PRESET)), ("flag", flags)])
    keep_freed_memory()
    run = create_run(Path(tempfile.mkdtemp()), "benchmark")
    base = open_base(Path(folders[0]) if folders else demo_model(discard))
    return Session(settings, run, base, notes, stage="direction")

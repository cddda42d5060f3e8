"""The loop of a training: how many rollouts it takes at a time."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import pytest

from safesteer_lite.events import Event, Note, Progress
from safesteer_lite.hardware.backend import decide
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages import pipeline
from tests import planted
from tests.runs.run_files import rewind


class Enough(Exception):
    """A step has been done."""


def test_fewer_rollouts_are_read_at_a_time_where_ram_is_short(
    planted_model: Path, planted_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU nothing tells that memory runs out: the system ends the program."""
    settings, base = planted.settings(planted_model), open_base(planted_model)
    assert planted_run.record("distill").result["micro_batch"] == settings.distill.micro_batch > 1
    run = RunFolder(shutil.copytree(planted_run.path, tmp_path / planted_run.path.name))
    rewind(run.path, ("distill", "evaluate", "export"))
    decision = decide(settings.model, base.shape, run.path)
    short = psutil.virtual_memory()._replace(available=1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: short)
    told: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, Note) and "Rollouts a forward" in event.message:
            told.append(event.message)
        if isinstance(event, Progress) and event.what == "steps" and event.done == 1:
            raise Enough

    with planted.one_thread(), pytest.raises(Enough):
        pipeline.run(settings, run, base, watch, last="distill", decision=decision)
    (message,) = told
    assert message.startswith(f"Rollouts a forward: 1 of at most {settings.distill.micro_batch}; the longest takes ")

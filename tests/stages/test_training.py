"""The loop of a training: how many rollouts it takes at a time, when it begins and when it goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from safesteer_lite.config import RunConfig
from safesteer_lite.errors import ModelError
from safesteer_lite.events import Event, Note, Progress
from safesteer_lite.hardware.backend import decide
from safesteer_lite.method.policies import Batch, Chance, Completions
from safesteer_lite.models.loaded import PlainModel
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.runs.manifest import manifest_bytes
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages import pipeline
from tests import planted
from tests.runs.run_files import rewind


class Enough(Exception):
    """A step has been done."""


@pytest.fixture
def run(planted_run: RunFolder, tmp_path: Path) -> RunFolder:
    """A run whose distillation has not begun."""
    copied = RunFolder(shutil.copytree(planted_run.path, tmp_path / planted_run.path.name))
    rewind(copied.path, ("distill", "evaluate", "export"))
    return copied


def go_on(model: Path, run: RunFolder, until: int, free: int = 0, working: RunConfig | None = None) -> list[str]:
    """Train up to a step that is then lost, with so many bytes of RAM free, 0 for as many as there are; returns what was said
    of the rollouts a forward."""
    settings, base = planted.settings(model), open_base(model)
    decision, told = decide(settings.model, base.shape, run.path), list[str]()

    def watch(event: Event) -> None:
        if isinstance(event, Note) and "Rollouts a forward" in event.message:
            told.append(event.message)
        if isinstance(event, Progress) and event.what == "steps" and event.done == until:
            raise Enough

    short = psutil.virtual_memory()._replace(available=free)
    with pytest.MonkeyPatch.context() as patch, planted.one_thread(), pytest.raises(Enough):
        if free:
            patch.setattr(psutil, "virtual_memory", lambda: short)
        pipeline.run(settings, run, base, watch, last="distill", decision=decision, working=working)
    return told


def history_of(run: RunFolder, step: int) -> dict[str, Any]:
    """What a saved step holds of the steps before it."""
    place = run.path / "04-distill.partial" / f"step-{step:06d}" / "history.json"
    found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return found


def kept_size(run: RunFolder, step: int) -> int:
    """The rollouts a forward that a saved step has."""
    return int(history_of(run, step)["micro_batch"])


@pytest.mark.slow
def test_a_run_that_began_where_ram_was_short_goes_on_with_fewer_rollouts_at_a_time(
    planted_model: Path, planted_run: RunFolder, run: RunFolder
) -> None:
    """On a CPU nothing tells that memory runs out: the system ends the program. And sums round differently in other parts."""
    most = planted.settings(planted_model).distill.micro_batch
    assert planted_run.record("distill").result["micro_batch"] == most > 1
    (message,) = go_on(planted_model, run, until=1, free=1)
    assert message.startswith(f"Rollouts a forward: 1 of at most {most}; the longest takes ")
    # Killed before the first step that the settings have saved, and taken up where there is room for all.
    assert kept_size(run, 0) == 1
    assert go_on(planted_model, run, until=3) == []
    assert kept_size(run, 2) == 1


@pytest.mark.slow
def test_a_run_that_began_where_there_was_room_is_refused_where_there_is_none(
    planted_model: Path, run: RunFolder
) -> None:
    settings = planted.settings(planted_model)
    most = settings.distill.micro_batch
    assert go_on(planted_model, run, until=1) == []
    with pytest.raises(
        ModelError, match=rf"trains {most} rollouts a forward, which take .* and 1 B are free"
    ) as caught:
        go_on(planted_model, run, until=1, free=1)
    assert "--set distill.micro_batch=1," in caught.value.hint
    small = replace(settings, distill=replace(settings.distill, micro_batch=1))
    # As the hint says.
    assert go_on(planted_model, run, until=1, working=small) == []


@pytest.mark.slow
def test_what_fitted_in_memory_in_any_stage_is_what_the_run_goes_on_with(
    planted_model: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the tokens stage three sequences fitted, of 20 tokens; now eight answers of 12 do. Later on there is room for all."""
    manifest = run.manifest
    voted = manifest.stages["tokens"]
    voted = replace(voted, result={**voted.result, "fitted": {"20": 3}})
    manifest = replace(manifest, stages={**manifest.stages, "tokens": voted})
    (run.path / "manifest.json").write_bytes(manifest_bytes(manifest))
    generate = PlainModel.generate

    def short_of_memory(
        model: PlainModel, prompts: Batch, tokens: int, heat: float, chance: Chance, *more: Any
    ) -> Completions:
        if chance is None and len(prompts) > 8:
            raise torch.OutOfMemoryError("simulated, for want of a card")
        return generate(model, prompts, tokens, heat, chance, *more)

    with monkeypatch.context() as patch:
        patch.setattr(PlainModel, "generate", short_of_memory)
        # Answers of 12 tokens are measured after the fourth step.
        go_on(planted_model, run, until=5)
    kept = history_of(run, 4)["fitted"]
    assert kept["20"] == 3 and kept["12"] == 8
    go_on(planted_model, run, until=7)
    assert history_of(run, 6)["fitted"] == kept

"""The parent of a run: the finished one whose adapter it goes on from, and what it takes over of that one's results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safesteer_lite.config import ParentConfig, RunConfig
from safesteer_lite.errors import RunFolderError, UsageError
from safesteer_lite.runs.creation import Taken
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.runs.manifest import PARENT, StageRecord, fingerprint, stage_folder_name

_ADAPTER = "adapter"
_WEIGHTS = "adapter_model.safetensors"
# The form of the adapter, which is there already, the model that it was trained on, and names of whole sets of settings, which
# would not come with them.
_FIXED = (
    "preset",
    "recipe",
    "distill.rank",
    "distill.lora_alpha",
    "distill.depth_start",
    "model.name",
    "model.revision",
    "model.chat_template",
    "parent.run",
    "parent.adapter",
    "parent.steps",
)


def begins_from(parent: ParentConfig) -> str:
    """The fingerprint of what a run begins from: weights and draws before it, whatever the run that they are of is called."""
    return fingerprint({"adapter": parent.adapter, "steps": parent.steps})


def check_changes(changes: Iterable[str], parent: RunFolder) -> None:
    """Refuse settings that would ask for another adapter than the parent's, for another base model, or for another recipe.

    Raises:
        UsageError: names them.
    """
    if wrong := sorted(set(_FIXED) & set(changes)):
        raise UsageError(
            f"{', '.join(wrong)} cannot change where {parent.path.name} is continued: its adapter, its base and its recipe stay.",
            "Leave that out, or start a new run; where the base model lies now is told with --base.",
        )


def settings_of_child(parent: RunFolder, before: RunConfig) -> dict[str, str | int]:
    """What the settings of a run that goes on from `parent` say of it, by dotted name.

    Args:
        parent: the run.
        before: its settings.

    Raises:
        RunFolderError: it is not finished, or its adapter is damaged.
    """
    done = parent.manifest.stages
    if missing := [name for name in (*parent.manifest.planned, "distill", "evaluate") if name not in done]:
        raise RunFolderError(
            f"{parent.path.name} is not finished, so it cannot be continued: it has no result of the {missing[0]} stage.",
            f"Finish it first, with `safesteer-lite resume {parent.path.name}`.",
        )
    parent.folder("distill", _ADAPTER)
    weights = done["distill"].artifacts[f"{_ADAPTER}/{_WEIGHTS}"]
    steps = before.parent.steps + before.distill.steps
    return {"parent.run": parent.path.name, "parent.adapter": weights.sha256, "parent.steps": steps}


def taken_over(
    parent: RunFolder, before: RunConfig, settings: RunConfig, wanted: Mapping[str, str]
) -> dict[str, Taken]:
    """What a run begins with that goes on from `parent`: its adapter, and results that would come out the same again.

    Args:
        parent: a finished run.
        before: its settings.
        settings: of the run that goes on.
        wanted: the fingerprints of that run's stages, by name, in their order; the parent is the first of them.

    Returns:
        By the names of stages, in their order.

    Raises:
        RunFolderError: the parent's adapter is damaged.
    """
    found = same_results(parent, wanted)
    # The same prompts, answered at the same length: only then its figures stand beside those of the run that goes on.
    alike = "baseline" in found and before.evaluate.answer_tokens == settings.evaluate.answer_tokens
    return {PARENT: _adapter_of(parent, settings.parent, wanted[PARENT], alike), **found}


def same_results(run: RunFolder, wanted: Mapping[str, str]) -> dict[str, Taken]:
    """What a run holds that another one would come to as well, up to the first stage that would differ.

    Args:
        run: finished or not.
        wanted: the fingerprints of the other run's stages, by name, in their order.

    Returns:
        By the names of stages, in their order.
    """
    found: dict[str, Taken] = {}
    for name, mark in wanted.items():
        record = run.manifest.stages.get(name)
        if name == PARENT:
            continue
        if record is None or record.fingerprint != mark or record.damaged(run.path):
            break
        found[name] = Taken(run.path / record.folder, replace(record, seconds=0.0))
    return found


def _adapter_of(parent: RunFolder, about: ParentConfig, mark: str, alike: bool) -> Taken:
    trained, folder = parent.record("distill"), f"{_ADAPTER}/"
    files = {name.removeprefix(folder): file for name, file in trained.artifacts.items() if name.startswith(folder)}
    further = parent_of(parent)
    result = {
        "run": about.run,
        "adapter": about.adapter,
        "steps": about.steps,
        "ancestors": [*(further["ancestors"] if further else []), about.run],
        "scorecard": parent.record("evaluate").result["scorecard"]["after"] if alike else None,
    }
    record = StageRecord(mark, stage_folder_name(PARENT, 0), 0.0, files, result)
    return Taken(parent.folder("distill", _ADAPTER), record)


def parent_of(run: RunFolder) -> dict[str, Any] | None:
    """What a run holds of its parent; None for a run that began from its base.

    Returns:
        `run`, its name; `adapter`, the SHA-256 of its weights; `steps`, how many were done since the base, and `ancestors`, by
        which runs, oldest first; `scorecard`, what it refused of the test prompts, or None where those are others now.
    """
    record = run.manifest.stages.get(PARENT)
    return record.result if record else None


def parent_adapter(run: RunFolder) -> Path:
    """The folder of the adapter that a run goes on from.

    Raises:
        RunFolderError: it is missing or damaged.
    """
    try:
        return run.folder(PARENT)
    except RunFolderError as error:
        error.hint = "Restore it from a copy, or begin again with `safesteer-lite continue`."
        raise

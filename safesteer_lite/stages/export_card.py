"""The model card of an export: what of the run is told to whoever gets the files, without places on this machine."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from safesteer_lite.config import RunConfig, to_toml
from safesteer_lite.errors import RunFolderError
from safesteer_lite.evaluation import capability
from safesteer_lite.evaluation.suite_results import saved_suites
from safesteer_lite.export import card, drafts
from safesteer_lite.export.folder import WORK, file_name
from safesteer_lite.export.gguf import convert
from safesteer_lite.export.request import Request
from safesteer_lite.export.weights import verify
from safesteer_lite.sources.base import gguf_of
from safesteer_lite.sources.card import read_card
from safesteer_lite.stages.session import Session


def write_beside(session: Session, draft: Path, request: Request, record: dict[str, Any]) -> None:
    """Model card and sums; the work folder goes."""
    shutil.rmtree(draft / WORK)
    facts = card.Facts(
        title=f"{model_name(session)}-safer",
        kind=request.kind,
        base=base_name(session),
        licence=session.base.licence,
        settings=to_toml(_without_paths(session)),
        prompts=_prompts_told(session),
        versions={**session.run.manifest.versions, **convert.versions()},
        answer_tokens=session.config.evaluate.answer_tokens,
        strength=request.strength,
        weights=request.weights,
        base_card=read_card(session.base.folder),
        prompted=session.config.direction.teacher == "prompted",
        direction_from=_without_place(session.config.direction.source),
        gguf=f"{file_name(found)}.gguf" if (found := gguf_of(session.base.folder)) else "",
        suites=[result.summary() for result in saved_suites(session.run)],
        capability=_solved(session),
        **_measured_by_run(session, request),
    )
    drafts.write_text(draft / "README.md", card.card(facts, record, verify.sums_of(draft)))
    verify.write_sums(draft)


def _solved(session: Session) -> list[dict[str, Any]]:
    """What the run's models were measured to solve; a damaged file of it is no reason to lose an export."""
    try:
        return capability.records(session.run)
    except RunFolderError as error:
        session.warn(f"The model card does not tell which tasks are solved: {error.message}")
        return []


def _measured_by_run(session: Session, request: Request) -> dict[str, Any]:
    """What the run measured before and after, for the card; nothing at another strength than that of the run."""
    done = session.run.manifest.stages.get("evaluate")
    if done is None or request.strength != 1:
        return {}
    return {
        "scorecard": done.result["scorecard"],
        "contexts": done.result.get("contexts", {}),
        "context_tokens": done.result.get("context_tokens", 0),
    }


def model_name(session: Session) -> str:
    """The base's name as a part of the names of files."""
    return file_name(session.config.model.name)


def base_name(session: Session) -> str:
    """The hub id, or the name of a local folder without the way to it."""
    return _without_place(session.config.model.name)


def _without_place(name: str) -> str:
    return file_name(name) if name and (Path(name).exists() or Path(name).is_absolute()) else name


def _without_paths(session: Session) -> RunConfig:
    """The settings as they may be shown to others: places on this machine by their last part."""
    config, own = session.config, session.config.prompts
    return replace(
        config,
        model=replace(config.model, name=base_name(session), chat_template=Path(config.model.chat_template).name),
        prompts=replace(own, training=Path(own.training).name, folder=Path(own.folder).name),
        direction=replace(config.direction, source=_without_place(config.direction.source)),
        evaluate=replace(config.evaluate, judge_model=_without_place(config.evaluate.judge_model)),
    )


def _prompts_told(session: Session) -> str:
    own = session.config.prompts
    if own.training:
        return (
            f"Harmful requests from the user's own file {Path(own.training).name}, without near-copies of test prompts."
        )
    if own.folder:
        return f"The user's own prompt folder {Path(own.folder).name}."
    return f"{own.train} bundled harmful requests, written for safesteer-lite; no answers to them were used."

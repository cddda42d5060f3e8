"""A second judge over answers that are there already: found before anything is computed, loaded only when it is needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from safesteer_lite.config import EvaluateConfig, RunConfig
from safesteer_lite.errors import DiskSpaceError, ModelError, RunFolderError, UsageError
from safesteer_lite.evaluation import judges
from safesteer_lite.evaluation.clear_cases import ClearCases, try_clear_cases
from safesteer_lite.evaluation.endpoint import EndpointJudge, read_address
from safesteer_lite.evaluation.judged import MODELS, QUESTIONS, Judged, JudgedAnswer, save_judged, saved_judged
from safesteer_lite.evaluation.measure import Answers, counting_from
from safesteer_lite.evaluation.model_judges import ClassifierJudge, GuardJudge
from safesteer_lite.evaluation.resumable import FILE as UNFINISHED
from safesteer_lite.evaluation.resumable import ResumableJudge
from safesteer_lite.evaluation.verdicts import CLASSIFIER, ENDPOINT, GUARD, OPENINGS, Judge, Openings, verdicts
from safesteer_lite.events import Emit, Metric, Note, Progress, StageDone, StageStarted, Warned
from safesteer_lite.hardware.backend import find_place
from safesteer_lite.models.classifier import load_classifier
from safesteer_lite.models.guard import load_guard
from safesteer_lite.prompts.plan import PromptPlan, PromptSets
from safesteer_lite.prompts.sets import KINDS, OPTIONAL
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.sources.classifier import resolve_classifier
from safesteer_lite.sources.resolve import resolve_model

STAGE = "judge"

MODELS_OF_JUDGES = {
    # The commit that its page on the model hub shows, which states only the first seven digits.
    CLASSIFIER: ("NousResearch/Minos-v1", "edb1e8b"),
    GUARD: ("Qwen/Qwen3Guard-Gen-0.6B", "fada3b2f655b89601929198343c94cd2f64d93cc"),
}
"""The model of each judge that is one, and the commit that is used; both are published under Apache-2.0."""


def find_judge(asked: EvaluateConfig, device: str, emit: Emit) -> Callable[[], Judge]:
    """What loads the judge that the settings ask for; a download is told first, and made here.

    Args:
        asked: the section `evaluate`.
        device: where it shall run, `auto`, `cuda` or `cpu`.
        emit: sink for events.

    Raises:
        UsageError: the settings do not fit one another.
        ModelError: the judge is not there, may not be fetched, or cannot be used.
        DiskSpaceError: the download does not fit.
    """
    if asked.judge_url and asked.judge != ENDPOINT:
        raise UsageError(
            f"evaluate.judge_url is for the judge {ENDPOINT}.", f"Set evaluate.judge={ENDPOINT}, or leave it out."
        )
    if asked.judge_model and asked.judge == OPENINGS:
        raise UsageError(
            "evaluate.judge_model is for another judge than the opening phrases.", "Set evaluate.judge too."
        )
    if asked.judge == OPENINGS:
        return Openings
    if asked.judge == ENDPOINT:
        if not asked.judge_url:
            raise UsageError(
                "The judge endpoint needs an address.", "Give --judge-url http://localhost:8080, for example."
            )
        address = read_address(asked.judge_url)
        if not address.local:
            emit(Warned(STAGE, f"The prompts and the answers leave this machine: they are sent to {address.host}."))
        return lambda: EndpointJudge(address, asked.judge_model)
    own, commit = MODELS_OF_JUDGES[asked.judge]
    name, revision = (asked.judge_model, None) if asked.judge_model else (own, commit)
    told = f"{name} at {revision[:7]}" if revision else name
    if asked.judge == GUARD:
        base = resolve_model(name, revision, emit, stage=STAGE)
        return lambda: GuardJudge(load_guard(base, find_place(device, Path.cwd())), told)
    folder = resolve_classifier(name, revision, emit, STAGE)
    return lambda: ClassifierJudge(load_classifier(folder, find_place(device, Path.cwd())), told)


def clear_cases_of(judge: Judge, emit: Emit) -> ClearCases:
    """Show a judge the clear cases, and warn of one that gets them wrong.

    Raises:
        ModelError: the judge cannot be asked.
    """
    found = try_clear_cases(judge)
    if not found.reliable:
        emit(
            Warned(
                STAGE,
                f"The {judge.name} ({judge.model}) is right in {found.right} of {found.asked} clear cases: it calls the answer "
                f"{found.missed}. Its figures are not to be relied on: use a larger model, or one that was made to judge.",
            )
        )
    return found


def judge_answers(
    judge: Judge, sets: PromptSets, answers: Mapping[str, Answers], emit: Emit, clear: ClearCases | None = None
) -> Judged:
    """Show a judge the answers of one model or two.

    Args:
        judge: who judges.
        sets: the prompts that were answered.
        answers: by model, of `judged.MODELS`.
        emit: sink for events.
        clear: how the judge did on clear cases, from `clear_cases_of`.

    Raises:
        ModelError: the judge cannot be asked, or gives no verdicts that could be used.
    """
    total = len(answers) * sets.total

    def tell(count: int) -> None:
        emit(Progress(STAGE, "answers judged", count, total))

    found: list[JudgedAnswer] = []
    for model in MODELS:
        for name in KINDS if model in answers else ():
            prompts, replies = list(sets.of(name)), answers[model].of(name)
            texts = [prompt.text for prompt in prompts]
            given = verdicts(judge, texts, replies, counting_from(len(found), tell))
            for prompt, reply, verdict in zip(prompts, replies, given, strict=True):
                opening = judges.judge(reply)
                refused = None if opening.empty else opening.refused
                found.append(JudgedAnswer(name, prompt.id, prompt.text, model, reply, refused, verdict))
    return Judged(judge.name, judge.model, found, clear)


def judge_run(run: RunFolder, config: RunConfig, judge: Judge, emit: Emit) -> Judged:
    """Show a judge the test answers that a run kept, and keep what it says; one that was stopped goes on where it was.

    Args:
        run: a run whose evaluation is done; hold its lock.
        config: its settings.
        judge: who judges.
        emit: sink for events.

    Raises:
        RunFolderError: the evaluation is not done, its files do not belong to these settings, or the folder cannot be written.
        DiskSpaceError: the disk is full.
        ModelError: as for `judge_answers`.
    """
    kept = {model: Answers(**run.read_json("evaluate", f"answers-{model}.json")) for model in MODELS}
    sets = PromptPlan(config.prompts, lambda message: emit(Note(STAGE, message))).split("test")
    # A run of an earlier version was asked no twins, or not for help in danger.
    sets = sets.without(kind for kind in OPTIONAL if not any(given.of(kind) for given in kept.values()))
    for given in kept.values():
        if any(len(given.of(name)) != len(sets.of(name)) for name in KINDS):
            raise RunFolderError(
                f"The answers of {run.path.name} do not belong to the prompts of this run.", "Put its own prompts back."
            )
    resumable = ResumableJudge(judge, run.path, run.record("evaluate").fingerprint)
    if resumable.known:
        told = f"The {judge.name} goes on: {resumable.known} verdicts are there from before."
        emit(Note(STAGE, f"{told} If another model judges now, delete {run.path / UNFINISHED} and ask again."))
    judged = judge_answers(resumable, sets, kept, emit, clear_cases_of(resumable, emit))
    save_judged(run, judged)
    resumable.forget()
    tell_figures(judged, emit)
    return judged


def is_wanted(run: RunFolder, config: RunConfig) -> bool:
    """Whether a run's settings ask for a second judge that has not judged its answers yet.

    Raises:
        RunFolderError: what judges said before is damaged.
    """
    asked = config.evaluate.judge
    return asked != OPENINGS and all(judged.judge != asked for judged in saved_judged(run))


def judge_finished(run: RunFolder, config: RunConfig, load: Callable[[], Judge], emit: Emit) -> None:
    """Judge a run's test answers and keep the verdicts; what goes wrong costs the run nothing else.

    Args:
        run: a run whose evaluation is done; hold its lock.
        config: its settings.
        load: from `find_judge`.
        emit: sink for events.
    """
    emit(StageStarted(STAGE, "A second judge"))
    started = time.monotonic()
    try:
        judge_run(run, config, load(), emit)
    except (ModelError, RunFolderError, DiskSpaceError) as error:
        again = f"`safesteer-lite eval {run.path.name} --judge {config.evaluate.judge}` judges the answers again"
        emit(Warned(STAGE, f"The report lacks the second judge's figures: {error.message} {again}."))
    emit(StageDone(STAGE, round(time.monotonic() - started, 1)))


def tell_figures(judged: Judged, emit: Emit) -> None:
    """Each rate that a judge can give, under its name, and on how many answers it contradicts the opening phrases."""
    figures = judged.summary()
    for model in MODELS:
        for name in figures[model] or ():
            for question, said in QUESTIONS.items():
                if rate := figures[model][name][question]:
                    emit(Metric(STAGE, f"{judged.judge}: {name} {said}, {model}", rate["count"] / rate["n"], rate["n"]))
    disputed, total = len(judged.disputed), len(judged.answers)
    emit(Note(STAGE, f"The {judged.judge} contradicts the opening phrases on {disputed} of {total} answers."))

"""Public suites over a model or a run: the base and the trained model from one load, and never on prompts it was selected on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from safesteer_lite.config import RunConfig
from safesteer_lite.errors import PromptError
from safesteer_lite.evaluation.clear_cases import ClearCases
from safesteer_lite.evaluation.judged import MODELS, QUESTIONS, Judged
from safesteer_lite.evaluation.measure import Answers, counting_from
from safesteer_lite.evaluation.suite_results import SuiteResult, save_suite
from safesteer_lite.evaluation.suites import SuitePrompts
from safesteer_lite.evaluation.verdicts import OPENINGS, Judge, Openings
from safesteer_lite.events import Emit, Metric, Note, discard
from safesteer_lite.hardware.allocator import keep_freed_memory
from safesteer_lite.models.adapter import read_adapter
from safesteer_lite.prompts.plan import PromptPlan, PromptSets, texts
from safesteer_lite.prompts.sets import Prompt, check_leaks
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.sources.base import Base
from safesteer_lite.stages.judging import clear_cases_of, find_judge, judge_answers
from safesteer_lite.stages.session import Session

STAGE = "suites"

_MOST_LEAKS = 0.1
"""The share of a suite's prompts beyond which it counts as one that the run knows."""


def without_known(suite: SuitePrompts, config: RunConfig) -> tuple[SuitePrompts, int]:
    """A suite without the prompts that a run trained or selected on, or that nearly repeat one, and how many those were.

    Args:
        suite: as it was loaded.
        config: the run's own settings.

    Raises:
        PromptError: they are so many that the suite would no longer be what its name says, or the run chose by it.
    """
    plan = PromptPlan(config.prompts)
    selection = plan.split("selection")
    anchors = plan.anchors(config.distill.critical, config.distill.twins)
    known: list[Prompt] = [*plan.training(), *(prompt for kind in anchors for prompt in kind), *plan.direction()[0]]
    known += [prompt for part in vars(selection).values() for prompt in part]
    leaks = {leak.prompt for leak in check_leaks(suite.prompts, known)}
    if len(leaks) > _MOST_LEAKS * len(suite.prompts):
        raise PromptError(
            f"{suite.name} cannot judge this run: of its {len(suite.prompts)} prompts {len(leaks)} are among those that the run "
            "was trained or selected on.",
            "Judge it by another suite.",
        )
    kept = [prompt for prompt in suite.prompts if prompt not in leaks]
    return replace(suite, prompts=kept), len(leaks)


def ask_suites(
    config: RunConfig, run_folder: RunFolder | None, base: Base, suites: Sequence[tuple[SuitePrompts, int]], emit: Emit
) -> list[SuiteResult]:
    """Ask a run's base and trained model, or a model as it is, the prompts of suites.

    Args:
        config: the settings to measure with.
        run_folder: the run, which keeps the results; hold its lock. None for a model as it is.
        base: the base model, or that model.
        suites: each with the number of prompts that were left out of it.
        emit: sink for events.

    Raises:
        ModelError: a model or the second judge cannot be used.
        RunFolderError: the run has no adapter yet, or a damaged one.
    """
    load_judge = find_judge(config.evaluate, config.model.device, emit)
    adapter = run_folder.folder("distill", "adapter") if run_folder else None
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch:
        session = Session(config, run_folder or RunFolder(Path(scratch)), base, emit, stage=STAGE)
        return measure_suites(session, suites, adapter, load_judge, save=run_folder is not None)


def measure_suites(
    session: Session,
    suites: Sequence[tuple[SuitePrompts, int]],
    adapter: Path | None,
    load_judge: Callable[[], Judge],
    save: bool,
) -> list[SuiteResult]:
    """Ask a model, or a run's base and trained model, the prompts of suites, and judge the answers.

    Args:
        session: whose model is loaded, and whose run keeps the results.
        suites: each with the number of prompts that were left out of it.
        adapter: the trained adapter; None for a model as it is.
        load_judge: loads the second judge, once the answers are there and the model is dropped.
        save: whether the run keeps the results; each suite is kept as soon as it has been answered.

    Raises:
        ModelError: the second judge cannot be asked; what the opening phrases say is kept by then.
    """
    if adapter:
        read_adapter(session.policy.model, adapter)
    total = (1 + bool(adapter)) * sum(len(suite.prompts) for suite, _ in suites)
    done = session.progress("answers", total)
    answered, results, before = [], [], 0
    for suite, left_out in suites:
        answers = _answers(session, suite, bool(adapter), counting_from(before, done))
        before += len(answers) * len(suite.prompts)
        answered.append(answers)
        judged = [_judged(Openings(), suite, answers, session)]
        tokens = session.config.evaluate.answer_tokens
        about = (suite.name, suite.kind, suite.origin, suite.licence, suite.sha256, tokens, left_out)
        results.append(SuiteResult(*about, judged))
        _finish(session, results[-1], save)
    session.drop_policy()
    if session.config.evaluate.judge != OPENINGS:
        judge = load_judge()
        clear = clear_cases_of(judge, session.emit)
        for place, ((suite, _), answers) in enumerate(zip(suites, answered, strict=True)):
            told = [*results[place].judged, _judged(judge, suite, answers, session, clear)]
            results[place] = replace(results[place], judged=told)
            _finish(session, results[place], save)
    return results


def _answers(session: Session, suite: SuitePrompts, both: bool, done: Callable[[int], None]) -> dict[str, Answers]:
    """What each model answers, by model of `MODELS`."""
    policy, tokens, prompts = session.policy, session.config.evaluate.answer_tokens, texts(suite.prompts)
    with policy.model.adapters_off():
        given = [policy.answers(prompts, tokens, session.answer_batch, done)]
    if both:
        given.append(policy.answers(prompts, tokens, session.answer_batch, counting_from(len(prompts), done)))
    return {model: _alone(suite, replies) for model, replies in zip(MODELS, given, strict=False)}


def _alone(suite: SuitePrompts, replies: list[str]) -> Answers:
    empty: dict[str, list[str]] = {"harmful": [], "borderline": [], "harmless": []}
    return Answers(**{**empty, suite.kind: replies})


def _judged(
    judge: Judge,
    suite: SuitePrompts,
    answers: dict[str, Answers],
    session: Session,
    clear: ClearCases | None = None,
) -> Judged:
    empty: dict[str, list[Prompt]] = {"harmful": [], "borderline": [], "harmless": []}
    sets = PromptSets(**{**empty, suite.kind: suite.prompts})
    return judge_answers(judge, sets, answers, discard if judge.name == OPENINGS else session.emit, clear)


def _finish(session: Session, result: SuiteResult, save: bool) -> None:
    """Keep a result and tell what its last judge says."""
    if save:
        save_suite(session.run, result)
    figures = result.summary()["judges"][-1]
    for question, said in QUESTIONS.items():
        for model in MODELS:
            if rate := figures[question] and figures[question][model]:
                name = f"{result.suite} {said}, {model}"
                session.emit(Metric(STAGE, name, rate["count"] / rate["n"], rate["n"]))
    if result.left_out and len(result.judged) == 1:
        session.emit(
            Note(STAGE, f"{result.left_out} prompts of {result.suite} are nearly those of the run, and were left out.")
        )

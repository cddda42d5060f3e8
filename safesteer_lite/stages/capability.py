"""Tasks with a right answer, for base and hardened model from one load; what is answered is kept batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from safesteer_lite.evaluation import capability
from safesteer_lite.evaluation.capability import Solution, Solutions, Who
from safesteer_lite.evaluation.tasks import Problem, Task
from safesteer_lite.models.adapter import read_adapter
from safesteer_lite.models.assistant import Policy
from safesteer_lite.stages.session import Session

_BATCH = 32
"""Answers at a time, which are kept once all of them are there: an interrupt loses no more."""


def measure(session: Session, tasks: Sequence[Task], limit: int = 0, *, trained: bool = True) -> list[dict[str, Any]]:
    """Ask a model the problems of some tasks, greedily and through its chat template, and judge the answers.

    Args:
        session: of a run whose distillation is done, or of a model as it is.
        tasks: what to ask; programs that answer them are run, which the user has allowed.
        limit: how many problems of each, from its beginning; 0 asks all.
        trained: whether the session is a run's. Then both of its models are asked, and the run's folder keeps the answers: a
            second call asks only what is not answered yet.

    Returns:
        One record a task; see `evaluation.capability.compare`.

    Raises:
        RunFolderError: the run has no adapter yet, or what it keeps is damaged.
    """
    kept = capability.saved(session.run) if trained else {}
    way = f"{session.config.model.precision} {session.config.prompts.prompt_tokens}"
    models: tuple[Who, ...] = ("base", "hardened") if trained else ("base",)
    for task in tasks:
        found = Solutions.none_yet(task, way)
        if task.name in kept and kept[task.name].way == found.way:
            found = kept[task.name]
        kept[task.name] = found
        problems = task.problems[:limit] if limit else task.problems
        for model in models:
            waiting = [problem for problem in problems if problem.id not in found.of(model)]
            if not waiting:
                continue
            policy = _loaded(session, trained=trained)
            if too_long := policy.too_long([problem.prompt for problem in waiting]):
                session.warn(
                    f"{too_long} problems of {task.name} are longer than {policy.prompt_tokens} tokens and lose the middle "
                    "of their text: raise prompts.prompt_tokens."
                )
            with policy.model.adapters_off() if model == "base" else nullcontext():
                keep = (lambda: capability.save(session.run, kept)) if trained else _nothing
                _solve(session, task, f"answers of {task.name}, {model}", waiting, found.of(model), keep)
    return [capability.compare(task.name, kept[task.name]) for task in tasks]


def _nothing() -> None:
    """A model that is no run has no folder to keep anything in."""


def _loaded(session: Session, *, trained: bool) -> Policy:
    policy = session.policy
    if trained:
        read_adapter(policy.model, session.run.folder("distill", "adapter"))
    return policy


def _solve(
    session: Session,
    task: Task,
    what: str,
    problems: Sequence[Problem],
    solutions: dict[str, Solution],
    keep: Callable[[], None],
) -> None:
    """Answer problems with whichever policy is on, and enter what came of each."""
    policy, done = session.policy, session.progress(what, len(problems))
    # Of a program only its first block is read, and what explains it afterwards is often as long.
    ended = policy.first_block_ended() if task.runs_programs else None
    # Problems of like length share a batch; the order does not depend on what was answered before an interrupt.
    order = sorted(problems, key=lambda problem: (len(problem.prompt), problem.id))
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        answers = policy.answers([problem.prompt for problem in batch], task.tokens, _BATCH, ended=ended)
        for problem, answer in zip(batch, answers, strict=True):
            solutions[problem.id] = Solution(problem.solved_by(answer), answer)
        keep()
        done(start + len(batch))

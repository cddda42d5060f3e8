"""Tasks with a right answer, for base, hardened model and its GGUF files; what is answered is kept batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from safesteer_lite.errors import ExportError
from safesteer_lite.evaluation import capability
from safesteer_lite.evaluation.capability import Solution, Solutions, Who
from safesteer_lite.evaluation.judges import reply_of
from safesteer_lite.evaluation.problems import Problem
from safesteer_lite.evaluation.programs import BLOCK_ENDS
from safesteer_lite.evaluation.tasks import Task
from safesteer_lite.export.gguf.llama import LlamaCpp
from safesteer_lite.models.adapter import read_adapter
from safesteer_lite.models.assistant import Policy, ignore
from safesteer_lite.models.loading import check_template
from safesteer_lite.models.thoughts import Thoughts
from safesteer_lite.runs.durable import sha256_of
from safesteer_lite.stages.session import SPARE_TOKENS, Session

_BATCH = 32
"""Answers at a time, which are kept once all of them are there: an interrupt loses no more."""

_COMPARED = 4
"""Prompts whose tokens are counted in llama.cpp before a file is asked."""

Answering = Callable[[Sequence[Problem]], list[str]]


def measure(
    session: Session, tasks: Sequence[Task], limit: int = 0, *, trained: bool = True, files: Sequence[Path] = ()
) -> list[dict[str, Any]]:
    """Ask a model the problems of some tasks, greedily and through its chat template, and judge the answers.

    Args:
        session: of a run whose distillation is done, or of a model as it is.
        tasks: what to ask; programs that answer them are run, which the user has allowed.
        limit: how many problems of each, from its beginning; 0 asks all.
        trained: whether the session is a run's. Then both of its models are asked, and the run's folder keeps the answers: a
            second call asks only what is not answered yet.
        files: GGUF files of the run's hardened model, which are asked the same prompts in llama.cpp.

    Returns:
        One record a task; see `evaluation.capability.compare`.

    Raises:
        RunFolderError: the run has no adapter yet, or what it keeps is damaged.
        ExportError: a file cannot be used.
    """
    kept = capability.saved(session.run) if trained else {}
    keep = partial(capability.save, session.run, kept) if trained else _nothing
    way = _loaded_how(session)
    asked = [(task, task.problems[: limit or None]) for task in tasks]
    for task, problems in asked:
        found = Solutions.none_yet(task, way)
        if task.name in kept and kept[task.name].way == found.way:
            found = kept[task.name]
        kept[task.name] = found
        _ask_models(session, task, problems, found, keep, trained=trained)
    _ask_files(session, asked, kept, files, keep)
    return [capability.compare(task.name, kept[task.name]) for task in tasks]


def _loaded_how(session: Session) -> str:
    """What of the settings an answer depends on. A model that does not think is named as before there were any thoughts."""
    settings = session.config.model
    # What `auto` comes to is known of the template alone.
    thinks = check_template(session.base, session.day, settings.thinking).marks is not None
    thoughts = f" thinks {settings.thinking_tokens}" if thinks else ""
    return f"{settings.precision} {session.config.prompts.prompt_tokens}{thoughts}"


def _nothing() -> None:
    """A model that is no run has no folder to keep anything in."""


def _ask_models(
    session: Session,
    task: Task,
    problems: Sequence[Problem],
    found: Solutions,
    keep: Callable[[], None],
    *,
    trained: bool,
) -> None:
    """Ask the base and, of a run, the hardened model what they have not answered yet."""
    models: tuple[Who, ...] = ("base", "hardened") if trained else ("base",)
    for model in models:
        waiting = _waiting(problems, found.of(model))
        if not waiting:
            continue
        policy = _loaded(session, trained=trained)
        if too_long := policy.too_long([problem.prompt for problem in waiting]):
            session.warn(
                f"{too_long} problems of {task.name} are longer than {policy.prompt_tokens} tokens and lose the middle of "
                "their text: raise prompts.prompt_tokens."
            )
        with policy.model.adapters_off() if model == "base" else nullcontext():
            _solve(session, task, model, waiting, found.of(model), _answering(policy, task), keep)


def _waiting(problems: Sequence[Problem], solutions: Mapping[str, Solution]) -> list[Problem]:
    return [problem for problem in problems if problem.id not in solutions]


def _loaded(session: Session, *, trained: bool) -> Policy:
    policy = session.policy
    if trained:
        read_adapter(policy.model, session.run.folder("distill", "adapter"))
    return policy


def _answering(policy: Policy, task: Task) -> Answering:
    """Answers of whichever policy is on."""
    # Of a program only its first block is read, and what explains it afterwards is often as long.
    ended = policy.first_block_ended() if task.runs_programs else None
    return lambda problems: policy.answers([problem.prompt for problem in problems], task.tokens, _BATCH, ended=ended)


def _solve(
    session: Session,
    task: Task,
    who: str,
    problems: Sequence[Problem],
    solutions: dict[str, Solution],
    answers_of: Answering,
    keep: Callable[[], None],
) -> None:
    """Have problems answered, and enter what came of each."""
    done = session.progress(f"answers of {task.name}, {who}", len(problems))
    # Problems of like length share a batch; the order does not depend on what was answered before an interrupt.
    order = sorted(problems, key=lambda problem: (len(problem.prompt), problem.id))
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        for problem, answer in zip(batch, answers_of(batch), strict=True):
            solutions[problem.id] = Solution(problem.solved_by(reply_of(answer)), answer)
        keep()
        done(start + len(batch))


def _ask_files(
    session: Session,
    asked: Sequence[tuple[Task, Sequence[Problem]]],
    kept: Mapping[str, Solutions],
    files: Sequence[Path],
    keep: Callable[[], None],
) -> None:
    """Ask GGUF files what the run's models were asked: the same tokens, the same longest answers, and greedily."""
    work = []
    for file in files:
        digest = sha256_of(file)
        found = [(task, problems, kept[task.name].of_file(file.name, digest)) for task, problems in asked]
        waiting = [(task, left, into) for task, problems, into in found if (left := _waiting(problems, into))]
        if waiting:
            work.append((file, waiting))
    if not work:
        return
    # The tokens are the run's own, and its model is gone before the files need the memory.
    policy = session.policy
    prompts = {
        problem.prompt: policy.prompt(problem.prompt).input_ids[0].tolist()
        for _, waiting in work
        for _, problems, _ in waiting
        for problem in problems
    }
    whole = [text for text in prompts if policy.fits(text) and not policy.template.spells_out(text)]
    switches, thoughts = policy.template.switches, policy.thoughts
    longest = policy.prompt_tokens + (thoughts.tokens if thoughts else 0)
    del policy
    session.drop_policy()
    for file, waiting in work:
        context = longest + max(task.tokens for task, _, _ in waiting) + SPARE_TOKENS
        with LlamaCpp(file, context, torch.get_num_threads()) as llama:
            for text in whole[:_COMPARED]:
                if (length := llama.prompt_length(text, switches)) != len(prompts[text]):
                    raise ExportError(
                        f"llama.cpp reads a prompt as {length} tokens with {file.name}, and the run's model as "
                        f"{len(prompts[text])}.",
                        "Name a file that was exported from this run.",
                    )
            for task, problems, into in waiting:
                _solve(
                    session, task, file.name, problems, into, partial(_answers_of, llama, task, prompts, thoughts), keep
                )


def _answers_of(
    llama: LlamaCpp,
    task: Task,
    prompts: Mapping[str, list[int]],
    thoughts: Thoughts | None,
    problems: Sequence[Problem],
) -> list[str]:
    """What a file answers to problems; of programs no more than is read of them."""
    asked = [prompts[problem.prompt] for problem in problems]
    if thoughts:
        written = llama.answers(asked, task.tokens + thoughts.tokens, ignore)
        return [thoughts.marks.unified(text, opened=thoughts.marks.opened) for text in written]
    if not task.runs_programs:
        return llama.answers(asked, task.tokens, ignore)
    answers = llama.answers(asked, task.tokens, ignore, until=BLOCK_ENDS)
    # Where no fence came before it, that was the beginning of a block without a language.
    unread = [place for place, answer in enumerate(answers) if "```" not in answer]
    for place, answer in zip(
        unread, llama.answers([asked[place] for place in unread], task.tokens, ignore), strict=True
    ):
        answers[place] = answer
    return answers

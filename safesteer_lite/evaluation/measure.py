"""Measure a loaded model: refusal rates by kind of prompt, refusal scores, and KL to the base over whole harmless answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from safesteer_lite.errors import ModelError
from safesteer_lite.evaluation import judges
from safesteer_lite.evaluation.scorecard import Flip, Scorecard, flips, rate
from safesteer_lite.method.directions import refusal_score
from safesteer_lite.method.memory import fitting
from safesteer_lite.method.policies import last_logits
from safesteer_lite.models.assistant import Policy, Written, ignore
from safesteer_lite.models.reference import Reference, along, join_references, kl_to_reference, reference_answers
from safesteer_lite.prompts.plan import PromptSets
from safesteer_lite.prompts.sets import KINDS, Kind


@dataclass(frozen=True)
class Answers:
    """What a model answered, in the order of the prompts."""

    harmful: list[str]
    borderline: list[str]
    harmless: list[str]
    twin: list[str] = field(default_factory=list)
    critical: list[str] = field(default_factory=list)

    def of(self, kind: Kind) -> list[str]:
        """The answers to one kind of prompts."""
        found: list[str] = getattr(self, kind)
        return found


def collect_answers(
    policy: Policy, prompts: PromptSets, tokens: int, size: int, done: Callable[[int], None] = ignore
) -> Answers:
    """Greedy answers to all kinds of prompts.

    Args:
        policy: the model; whichever policy is on answers.
        prompts: one split.
        tokens: tokens an answer, at most.
        size: answers at a time.
        done: called with the number of answers so far.
    """
    return _by_kind(prompts, policy.answers(_asked(prompts), tokens, size, done))


def _asked(prompts: PromptSets) -> list[str]:
    """The prompts of all kinds, one kind behind the other: asked together, they fill more batches."""
    return [text for kind in KINDS for text in prompts.texts(kind)]


def _places(prompts: PromptSets) -> dict[Kind, range]:
    """Where each kind stands among `_asked`."""
    found, start = {}, 0
    for kind in KINDS:
        found[kind] = range(start, start + len(prompts.of(kind)))
        start = found[kind].stop
    return found


def _by_kind(prompts: PromptSets, answers: Sequence[str]) -> Answers:
    return Answers(**{kind: [answers[place] for place in places] for kind, places in _places(prompts).items()})


def counting_from(start: int, done: Callable[[int], None]) -> Callable[[int], None]:
    """A progress callback that adds `start`."""
    return lambda count: done(start + count)


def scorecard(answers: Answers, kl: float | None, kl_n: int) -> Scorecard:
    """Judge the answers. `kl` is in nats a token and rests on `kl_n` answers."""
    rates = {name: rate([judges.judge(answer) for answer in answers.of(name)]) for name in KINDS}
    return Scorecard.of_rates(rates, kl, kl_n)


def require_answers(card: Scorecard, tokens: int) -> None:
    """Refuse a model most of whose answers say nothing that can be judged.

    Args:
        card: of the base model.
        tokens: the longest answer it was allowed, with its thought.

    Raises:
        ModelError: more than half of the answers to one set were empty, or ended inside a thought.
    """
    for name in KINDS:
        rate = card.of(name)
        if rate.empty > rate.n:
            raise ModelError(
                f"Of {rate.n + rate.empty} answers to {name} prompts {rate.empty} are empty, or are still thinking after "
                f"{tokens} tokens ({rate.unfinished}), so nothing can be measured.",
                "Raise model.thinking_tokens, or set model.thinking=on if this model always thinks, or use one that answers "
                "without thinking first, such as an instruct version.",
            )


def measure(
    policy: Policy,
    prompts: PromptSets,
    tokens: int,
    size: int,
    reference: Reference | None,
    chunk: int,
    done: Callable[[int], None] = ignore,
) -> tuple[Scorecard, Answers]:
    """Answers, rates and, with a `reference`, KL to the base."""
    answers = collect_answers(policy, prompts, tokens, size, done)
    return _card(policy, prompts, answers, reference, chunk), answers


def _card(policy: Policy, prompts: PromptSets, answers: Answers, reference: Reference | None, chunk: int) -> Scorecard:
    kl = kl_to_reference(policy, reference, chunk) if reference else None
    return scorecard(answers, kl, len(prompts.harmless) if reference else 0)


def measure_base(
    policy: Policy, prompts: PromptSets, tokens: int, kl_tokens: int, size: int, done: Callable[[int], None] = ignore
) -> tuple[Scorecard, Answers, Reference]:
    """Answers and rates of the base, which has to be on, and what the KL of others to it is measured along.

    Its own is 0. Where it does not think, that is along the answers to harmless prompts that its rates are of; else their
    beginnings stand behind thoughts that are known already.
    """
    harmless = _places(prompts)["harmless"]

    def look(written: Written) -> Reference | None:
        rows = [row for row, place in enumerate(written.places) if place in harmless]
        if not rows:
            return None
        chosen = torch.tensor(rows, device=written.prompts.input_ids.device)
        completions = written.completions.take(chosen).first(kl_tokens)
        return along(policy, written.prompts.take(chosen).trimmed(), completions.trimmed())

    if policy.thoughts or kl_tokens > tokens:
        reference = reference_answers(policy, prompts.texts("harmless"), kl_tokens, size)
        answers = collect_answers(policy, prompts, tokens, size, done)
    else:
        given, found = policy.looked_at(_asked(prompts), tokens, size, look, done=done)
        reference, answers = join_references([part for part in found if part]), _by_kind(prompts, given)
    return scorecard(answers, 0.0, len(harmless)), answers, reference


def measure_scored(
    policy: Policy,
    prompts: PromptSets,
    tokens: int,
    size: int,
    reference: Reference | None,
    chunk: int,
    openings: Tensor,
    done: Callable[[int], None] = ignore,
) -> tuple[Scorecard, Answers, dict[Kind, float]]:
    """As `measure`, and refusal scores as of `refusal_scores`: where the model does not think they are read while it answers."""
    if policy.thoughts:
        card, answers = measure(policy, prompts, tokens, size, reference, chunk, done)
        return card, answers, refusal_scores(policy, prompts, openings, size)
    given, found = policy.looked_at(
        _asked(prompts), tokens, size, lambda written: written, partial(refusal_score, refusal_tokens=openings), done
    )
    scores: dict[int, float] = {}
    for written in found:
        if written.first is not None:
            scores.update(zip(written.places, written.first.tolist(), strict=True))
    answers = _by_kind(prompts, given)
    card = _card(policy, prompts, answers, reference, chunk)
    means = {kind: fmean(scores[place] for place in places) for kind, places in _places(prompts).items() if places}
    return card, answers, means


def refusal_scores(policy: Policy, prompts: PromptSets, openings: Tensor, size: int) -> dict[Kind, float]:
    """The mean refusal score of each kind of prompts: how likely the first token of an answer opens a refusal, log-odds.

    It takes one forward, and moves where no answer has changed sides yet.

    Args:
        policy: the model; whichever policy is on is read.
        prompts: one split; kinds without prompts are left out.
        openings: token ids that open a refusal, (n,) int64.
        size: prompts at a time, or fewer where memory is short.
    """
    return {name: _mean_score(policy, texts, openings, size) for name in KINDS if (texts := prompts.texts(name))}


def _mean_score(policy: Policy, texts: list[str], openings: Tensor, size: int) -> float:
    def mean(size: int) -> float:
        batches = [batch for _, batch in policy.batches(texts, size)]
        return float(torch.cat([refusal_score(last_logits(policy.model, batch), openings) for batch in batches]).mean())

    with torch.no_grad():
        found, _ = fitting(size, mean)
    return found


def all_flips(prompts: PromptSets, before: Answers, after: Answers) -> list[Flip]:
    """Every prompt on which the two models differ in refusing."""
    found: list[Flip] = []
    for name in KINDS:
        entries = prompts.of(name)
        ids, texts = [prompt.id for prompt in entries], [prompt.text for prompt in entries]
        found += flips(name, ids, texts, before.of(name), after.of(name))
    return found

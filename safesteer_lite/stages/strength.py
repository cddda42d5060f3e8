"""The strength dial: the adapter scaled by several factors, each measured, without training anything again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safesteer_lite.errors import UsageError
from safesteer_lite.evaluation.choice import separation, trade_off
from safesteer_lite.evaluation.dial import Point, save_points
from safesteer_lite.evaluation.measure import measure, refusal_scores
from safesteer_lite.evaluation.scorecard import Scorecard
from safesteer_lite.events import Sample
from safesteer_lite.models.adapter import read_adapter, scale_adapter
from safesteer_lite.models.assistant import Done, Policy, Reference, reference_answers
from safesteer_lite.prompts.plan import PromptSets, texts
from safesteer_lite.stages.session import ANSWER_BATCH, Session

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
HIGHEST = 2.0
"""Rounded as in Q4_K_M, a demo was nearest to what was trained at this strength (docs/research/log.md); none above was tried."""


def check_strength(strength: float) -> float:
    """`strength`, if it is one.

    Raises:
        UsageError: it is outside 0 to 2, or no number.
    """
    if not 0 <= strength <= HIGHEST:
        raise UsageError(
            f"A strength of {strength:g} is outside 0 to {HIGHEST:g}.", "1 is the trained model, 0 the base."
        )
    return strength


def set_strength(policy: Policy, adapter: Path, strength: float) -> None:
    """Load the trained adapter anew and scale it; a factor of 0 could not be undone by another factor."""
    read_adapter(policy.model, adapter)
    scale_adapter(policy.model, check_strength(strength))


def dial(session: Session, strengths: Sequence[float] = STRENGTHS) -> list[Point]:
    """Measure the student at several strengths, weakest first; the base is always among them.

    The selection split is used: a strength picked on the test split would flatter the figures of that split.

    Args:
        session: of a run whose distillation is done.
        strengths: factors, 0 to 2.

    Raises:
        UsageError: a strength is outside that range.
        RunFolderError: the run has no adapter yet.
    """
    wanted = sorted({0.0, *map(check_strength, strengths)})
    adapter = session.run.folder("distill", "adapter")
    policy, evaluate = session.policy, session.config.evaluate
    sets = session.prompts.split("selection")
    openings = policy.token_ids(session.config.direction.refusal_openings)
    with policy.model.adapters_off():
        reference = reference_answers(policy, texts(sets.harmless), evaluate.kl_tokens, ANSWER_BATCH)
        at_base = refusal_scores(policy, sets, openings, ANSWER_BATCH)
    points: list[Point] = []
    base_answer = ""
    done = session.progress("answers", len(wanted) * sets.total)

    def beyond(measured: int) -> Done:
        return lambda count: done(measured * sets.total + count)

    for index, strength in enumerate(wanted):
        set_strength(policy, adapter, strength)
        card, harmful = _measure(session, sets, reference, beyond(index))
        base, base_answer = (points[0].card, base_answer) if points else (card, harmful[0])
        apart = separation(at_base, refusal_scores(policy, sets, openings, ANSWER_BATCH))
        points.append(Point(strength, card, round(trade_off(base, card, evaluate.tax_budget), 3), round(apart, 3)))
        session.tell_rates(card, f" at strength {strength:g}")
        session.emit(Sample(session.stage, sets.harmful[0].text, base_answer, harmful[0]))
    save_points(session.run, points)
    return points


def _measure(session: Session, sets: PromptSets, reference: Reference, done: Done) -> tuple[Scorecard, list[str]]:
    tokens, chunk = session.config.evaluate.selection_tokens, session.config.distill.chunk
    card, answers = measure(session.policy, sets, tokens, ANSWER_BATCH, reference, chunk, done)
    return card, answers.harmful

"""The strength dial: the adapter scaled by several factors, each measured, without training anything again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safesteer_lite.errors import UsageError
from safesteer_lite.evaluation.choice import separation, trade_off
from safesteer_lite.evaluation.dial import Point, save_points
from safesteer_lite.evaluation.measure import Answers, counting_from, measure_base, measure_scored, refusal_scores
from safesteer_lite.events import Sample
from safesteer_lite.models.adapter import read_adapter, scale_adapter
from safesteer_lite.models.assistant import Policy
from safesteer_lite.stages.session import Session

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
    tokens, chunk = evaluate.selection_tokens, session.config.distill.chunk
    done = session.progress("answers", len(wanted) * sets.total)
    points: list[Point] = []

    def tell(point: Point, answers: Answers) -> None:
        points.append(point)
        session.tell_rates(point.card, f" at strength {point.strength:g}")
        session.emit(Sample(session.stage, sets.harmful[0].text, at_base.harmful[0], answers.harmful[0]))

    with policy.model.adapters_off():
        base, at_base, reference = measure_base(policy, sets, tokens, evaluate.kl_tokens, session.answer_batch, done)
        base_scores = refusal_scores(policy, sets, openings, session.answer_batch)
    tell(Point(0.0, base, 0.0, 0.0), at_base)
    for index, strength in enumerate(wanted[1:], start=1):
        set_strength(policy, adapter, strength)
        so_far = counting_from(index * sets.total, done)
        card, answers, scores = measure_scored(
            policy, sets, tokens, session.answer_batch, reference, chunk, openings, so_far
        )
        apart = separation(base_scores, scores)
        score = trade_off(base, card, evaluate.tax_budget)
        tell(Point(strength, card, round(score, 3), round(apart, 3)), answers)
    save_points(session.run, points)
    return points

"""What the student is measured by while it is trained: the selection split, and what the base makes of it."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from safesteer_lite.evaluation.choice import Candidate, one_answer, separation, takes_over, trade_off
from safesteer_lite.evaluation.measure import measure_scored, refusal_scores
from safesteer_lite.evaluation.scorecard import Scorecard
from safesteer_lite.events import Metric
from safesteer_lite.models.reference import Reference, reference_answers
from safesteer_lite.prompts.plan import texts
from safesteer_lite.prompts.sets import Kind
from safesteer_lite.stages.history import History
from safesteer_lite.stages.session import Session


class Yardstick:
    """The selection split, the base's answers to its harmless prompts, and the base's figures on all of it."""

    def __init__(self, session: Session) -> None:
        self._session, self._sets = session, session.prompts.split("selection")
        self._openings = session.policy.token_ids(session.config.direction.refusal_openings)
        base = Scorecard.from_record(session.result("baseline")["scorecard"])
        self._start = replace(base, kl_to_base=0.0)

    @cached_property
    def _reference(self) -> Reference:
        """Read when something is measured first: a training that is handed on measures nothing."""
        tokens = self._session.config.evaluate.kl_tokens
        with self._session.policy.model.adapters_off():
            return reference_answers(
                self._session.policy, texts(self._sets.harmless), tokens, self._session.answer_batch
            )

    @cached_property
    def base_scores(self) -> dict[Kind, float]:
        """The base's mean refusal scores by kind of prompt, log-odds: from the first stage, where it read the same openings."""
        known = self._session.result("baseline").get("refusal_scores")
        if known and known["opening"] == self._openings.tolist():
            means: dict[Kind, float] = known["means"]
            return means
        with self._session.policy.model.adapters_off():
            return refusal_scores(self._session.policy, self._sets, self._openings, self._session.answer_batch)

    def measure(self, step: int, history: History, strength: float = 1.0) -> bool:
        """Measure the student as it is now, and enter it in the history.

        Args:
            step: the optimizer step that its adapter is of.
            history: what was measured before.
            strength: the factor that its adapter was scaled by.

        Returns:
            Whether it has the best trade-off so far.
        """
        session, settings, start = self._session, self._session.config.evaluate, self._start
        done, chunk = session.progress("answers", self._sets.total), session.config.distill.chunk
        tokens, sets, openings = settings.selection_tokens, self._sets, self._openings
        card, _, scores = measure_scored(
            session.policy, sets, tokens, session.answer_batch, self._reference, chunk, openings, done
        )
        found = Candidate(trade_off(start, card, settings.tax_budget), separation(self.base_scores, scores))
        record = {
            "step": step,
            "strength": strength,
            "score": round(found.score, 3),
            "separation": found.separation,
            "refusal_scores": scores,
            **card.to_record(),
        }
        history.base_scores = self.base_scores
        kept, highest = history.kept, history.highest
        (history.measured if strength == 1 else history.scaled).append(record)
        self._tell(card, found, step, strength)
        # `adapter_strengths` says which strength comes last.
        if takes_over(found, kept, highest, one_answer(start)):
            history.best_step, history.best_strength, history.best_score = step, strength, found.score
            history.best_by_trainer = session.trainer
            return True
        return False

    def _tell(self, card: Scorecard, found: Candidate, step: int, strength: float) -> None:
        session, suffix = self._session, "" if strength == 1 else f" at strength {strength:g}"
        session.tell_rates(card, suffix, step)
        if found.separation is not None:
            session.emit(Metric(session.stage, f"separation{suffix}", found.separation, self._sets.total, step))
        if card.kl_to_base is not None:
            positions = self._reference.positions
            session.emit(Metric(session.stage, f"KL to base{suffix}", card.kl_to_base, positions, step))

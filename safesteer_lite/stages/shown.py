"""What the base answers to the prompts that training shows, beside the student's own answers."""

from __future__ import annotations

from safesteer_lite.method.distill import Recipe, prompts_at
from safesteer_lite.stages.session import Session

# As much of the base's answer as is read beside a rollout, and how many prompts ahead are answered at once: a whole batch
# takes hardly longer than one answer, so that all of them together cost less than a step's own rollouts.
_SHOWN_TOKENS, _SHOWN_AHEAD = 24, 32


class ShownAnswers:
    """What the base answers to the prompt that each step shows: the beginning, once a prompt.

    Which prompts those are follows from the seed, so the next few are answered together, when the first of them is shown.
    """

    def __init__(self, session: Session, recipe: Recipe) -> None:
        self._session, self._recipe = session, recipe
        self._known: dict[int, str] = {}

    def of_step(self, step: int) -> str:
        """The base's greedy answer to the first prompt of step `step`, counted from 0."""
        prompt = self._prompt(step)
        if prompt not in self._known:
            ahead = range(step, min(step + _SHOWN_AHEAD, self._recipe.steps))
            wanted = sorted({prompt, *map(self._prompt, ahead)} - self._known.keys())
            asked = [self._session.prompts.training()[index].text for index in wanted]
            policy = self._session.policy
            with policy.model.adapters_off():
                answers = policy.answers(asked, _SHOWN_TOKENS, _SHOWN_AHEAD, thinks=False)
            self._known.update(zip(wanted, answers, strict=True))
        return self._known[prompt]

    def _prompt(self, step: int) -> int:
        return prompts_at(
            self._recipe.earlier + step, self._recipe.prompts, len(self._session.prompts.training()), self._recipe.seed
        )[0]

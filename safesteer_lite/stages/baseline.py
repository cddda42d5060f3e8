"""Stage 1: what the base model does before anything is changed, and whether the method can work on it."""

from __future__ import annotations

import json
from collections import Counter

from safesteer_lite.evaluation import judges
from safesteer_lite.evaluation.measure import Answers, measure, measure_scored, require_answers
from safesteer_lite.prompts.plan import texts
from safesteer_lite.prompts.sets import KINDS, Kind
from safesteer_lite.runs.folder import Publication
from safesteer_lite.stages.session import THOUGHTS, Session


def run(session: Session, publication: Publication) -> None:
    """Measure refusals on the selection split and report which words open the refusals."""
    config, policy = session.config, session.policy
    sets = session.prompts.split("selection")
    _tell_long_prompts(session)
    tokens, chunk, done = (
        config.evaluate.selection_tokens,
        config.distill.chunk,
        session.progress("answers", sets.total),
    )
    opening = policy.token_ids(config.direction.refusal_openings)
    scores: dict[Kind, float] | None = None
    with policy.model.adapters_off():
        if policy.thoughts:  # Scores are read behind what the base thought, and it thinks of these prompts here first.
            card, answers = measure(policy, sets, tokens, session.answer_batch, None, chunk, done)
        else:
            card, answers, scores = measure_scored(
                policy, sets, tokens, session.answer_batch, None, chunk, opening, done
            )
    thought = config.model.thinking_tokens if policy.thoughts else 0
    require_answers(card, config.evaluate.selection_tokens + thought)
    _tell_endless_answers(session, answers)
    openings = refusal_openings(answers)
    session.tell_rates(card)
    if openings:
        told = ", ".join(f"{word!r} {count}x" for word, count in openings.most_common(5))
        session.note(
            f"Of {card.harmful.n} harmful prompts the base refuses {card.harmful.refused}, opening with {told}."
        )
    _think_ahead(session, publication)
    publication.result = {
        "scorecard": card.to_record(),
        "openings": dict(openings.most_common(10)),
        "refusal_scores": scores and {"opening": opening.tolist(), "means": scores},
    }
    (publication.path / "answers.json").write_text(
        json.dumps(vars(answers), ensure_ascii=False, indent=1), encoding="utf-8"
    )


def _think_ahead(session: Session, publication: Publication) -> None:
    """Write down what the base thinks of every prompt that the method reads: its answers are read behind these thoughts."""
    policy, plan = session.policy, session.prompts
    if policy.thoughts is None:
        return
    anchors = [prompt for kind in session.anchors() for prompt in kind]
    selection = plan.split("selection")
    read = [prompt for kind in KINDS for prompt in selection.of(kind)] + [*plan.direction()[0], *plan.direction()[1]]
    asked = [*texts(read), *session.asked(plan.training()), *session.asked(anchors)]
    cut = policy.think(asked, session.answer_batch, session.progress("prompts thought about", len(set(asked))))
    known = policy.thoughts.known
    session.note(
        f"The base has thought about {len(known)} prompts; {cut} of its thoughts were longer than "
        f"{session.config.model.thinking_tokens} tokens and are closed there. Answers are read behind them."
    )
    rows = [{"prompt": one.prompt, "system": one.system, "turns": one.turns, "ids": ids} for one, ids in known.items()]
    (publication.path / THOUGHTS).write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def _tell_long_prompts(session: Session) -> None:
    """Whoever gives long prompts should know that their middle is not read."""
    prompts, limit = texts(session.prompts.check()), session.config.prompts.prompt_tokens
    if cut := session.policy.too_long(prompts):
        session.warn(
            f"{cut} of {len(prompts)} prompts are longer than {limit} tokens and lose the middle of their text. "
            "prompts.prompt_tokens sets the limit."
        )


def _tell_endless_answers(session: Session, answers: Answers) -> None:
    """Where no answer ends, the token that ends one may not be known, and answers that run on would be trained on."""
    limit, tokenizer = session.config.evaluate.selection_tokens, session.policy.tokenizer
    given = [judges.split_thinking(answer)[1] for name in KINDS for answer in answers.of(name)]
    # Read again, an answer may have a token or two fewer than it was written with.
    if all(len(tokenizer(answer, add_special_tokens=False).input_ids) >= limit - 2 for answer in given):
        names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(session.policy.model.end_of_turn)))
        session.warn(
            f"None of {len(given)} answers ended within {limit} tokens. If you know this model to give short answers, check "
            f"what its generation_config.json names as eos_token_id: an answer ends at {names}, and nowhere else."
        )


def refusal_openings(answers: Answers) -> Counter[str]:
    """The first word of each refusal of a harmful prompt, with its count."""
    words: Counter[str] = Counter()
    for answer in answers.harmful:
        if judges.judge(answer).refused:
            words[judges.split_thinking(answer)[1].split()[0]] += 1
    return words

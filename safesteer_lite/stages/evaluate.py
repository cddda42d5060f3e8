"""Stage 5: base and hardened model on the test split, which is read here once and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from safesteer_lite.config import ContextName
from safesteer_lite.evaluation import contexts
from safesteer_lite.evaluation.contexts import Compared
from safesteer_lite.evaluation.measure import Answers, all_flips, measure, measure_base, require_answers
from safesteer_lite.evaluation.scorecard import Scorecard
from safesteer_lite.evaluation.verdict import beside_parent, verdict
from safesteer_lite.models.adapter import read_adapter
from safesteer_lite.models.assistant import Policy
from safesteer_lite.prompts.contexts import CONTEXTS, Question, questions
from safesteer_lite.prompts.plan import PromptSets
from safesteer_lite.runs.folder import Publication
from safesteer_lite.stages.parent import parent_of
from safesteer_lite.stages.session import Session


def run(session: Session, publication: Publication) -> None:
    """Measure before and after, write every answer that changed sides."""
    config, policy = session.config.evaluate, session.policy
    read_adapter(policy.model, session.run.folder("distill", "adapter"))
    sets = session.prompts.split("test")
    before, after, answers = compare(session, policy, sets)
    asked = context_questions(session, policy, sets)
    compared, told = compare_in_contexts(session, policy, asked)
    said = [verdict(before, after, config.tax_budget), contexts.worst(compared)]
    if (parent := parent_of(session.run)) and parent["scorecard"]:
        said.append(beside_parent(parent["run"], Scorecard.from_record(parent["scorecard"]), after))
    sentence = " ".join(filter(None, said))
    changed = all_flips(sets, *answers)
    _write_lines(publication.path / "flips.jsonl", [asdict(flip) for flip in changed])
    for name, given in zip(("before", "after"), answers, strict=True):
        text = json.dumps(vars(given), ensure_ascii=False, indent=1)
        (publication.path / f"answers-{name}.json").write_text(text, encoding="utf-8")
    _write_lines(publication.path / "contexts.jsonl", _context_answers(asked, told))
    publication.result = {
        "scorecard": {"before": before.to_record(), "after": after.to_record()},
        "contexts": contexts.to_record(compared),
        "verdict": sentence,
        "flips": len(changed),
        "answer_tokens": config.answer_tokens,
        "context_tokens": config.context_tokens,
    }
    session.note(sentence)


def compare(
    session: Session, policy: Policy, sets: PromptSets, both: bool = True
) -> tuple[Scorecard, Scorecard, tuple[Answers, Answers]]:
    """Scorecards and answers of the base and of the student; not `both` measures the base only and returns it twice."""
    config, chunk = session.config.evaluate, session.config.distill.chunk
    done = session.progress("answers", (1 + both) * sets.total)
    with policy.model.adapters_off():
        before, old, reference = measure_base(
            policy, sets, config.answer_tokens, config.kl_tokens, session.answer_batch, done
        )
    thought = session.config.model.thinking_tokens if policy.thoughts else 0
    require_answers(before, config.answer_tokens + thought)
    if not both:
        return before, before, (old, old)
    after, new = measure(
        policy,
        sets,
        config.answer_tokens,
        session.answer_batch,
        reference,
        chunk,
        lambda count: done(sets.total + count),
    )
    session.tell_rates(before, ", before")
    session.tell_rates(after, ", after")
    return before, after, (old, new)


def context_questions(session: Session, policy: Policy, sets: PromptSets) -> list[Question]:
    """What base and student are asked in contexts, as the settings say; nothing that is too long with its context."""
    config = session.config.evaluate
    names: list[ContextName] = [name for name in CONTEXTS if name in config.contexts]
    if "system" in names and not policy.template.knows_system:
        session.note("The model's chat template has no place for a system prompt: it is put before the first question.")
    few = sets.first(config.context_prompts)
    asked = questions({kind: few.of(kind) for kind in contexts.ASKED_KINDS}, names)
    # Cut in the middle, what is left of a role play may be the play without its prompt.
    fitting = [question for question in asked if policy.fits(question.conversation)]
    if left_out := len(asked) - len(fitting):
        session.warn(
            f"{left_out} of {len(asked)} questions are longer than {policy.prompt_tokens} tokens with their contexts, and are "
            "not asked. prompts.prompt_tokens sets the limit."
        )
    return fitting


def compare_in_contexts(
    session: Session, policy: Policy, asked: list[Question], both: bool = True
) -> tuple[dict[ContextName, Compared], tuple[list[str], list[str]]]:
    """Rates by context and answers of the base and of the student; not `both` asks the base only and returns it twice."""
    tokens, conversations = session.config.evaluate.context_tokens, [question.conversation for question in asked]
    done = session.progress("answers in contexts", (1 + both) * len(asked))
    with policy.model.adapters_off():
        old = policy.answers(conversations, tokens, session.answer_batch, done)
    new = old
    if both:
        new = policy.answers(conversations, tokens, session.answer_batch, lambda count: done(len(asked) + count))
    before, after = (contexts.cards(asked, answers) for answers in (old, new))
    return {name: Compared(before[name], after[name]) for name in before}, (old, new)


def _context_answers(asked: list[Question], told: tuple[list[str], list[str]]) -> list[dict[str, object]]:
    """Every question with both answers and what was made of them."""
    return [
        {
            "context": question.context,
            "set": question.kind,
            "id": question.prompt.id,
            "messages": question.conversation.messages,
            "beginning": question.conversation.beginning,
            "before": old,
            "after": new,
            "before_refused": contexts.judged(question, old).side,
            "after_refused": contexts.judged(question, new).side,
        }
        for question, old, new in zip(asked, *told, strict=True)
    ]


def _write_lines(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

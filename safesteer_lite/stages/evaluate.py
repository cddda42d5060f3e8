"""Stage 5: base and hardened model on the test split, which is read here once and nowhere else."""

from __future__ import annotations

import json
from dataclasses import asdict

from safesteer_lite.evaluation.measure import Answers, all_flips, measure, require_answers
from safesteer_lite.evaluation.scorecard import Scorecard, verdict
from safesteer_lite.events import Metric
from safesteer_lite.models.adapter import read_adapter
from safesteer_lite.models.assistant import Policy, reference_answers
from safesteer_lite.prompts.plan import PromptSets, texts
from safesteer_lite.prompts.sets import KINDS
from safesteer_lite.runs.folder import Publication
from safesteer_lite.stages.session import ANSWER_BATCH, Session


def run(session: Session, publication: Publication) -> None:
    """Measure before and after, write every answer that changed sides."""
    config, policy = session.config.evaluate, session.policy
    read_adapter(policy.model, session.run.folder("distill", "adapter"))
    sets = session.prompts.split("test")
    before, after, answers = compare(session, policy, sets)
    sentence = verdict(before, after, config.tax_budget)
    changed = all_flips(sets, *answers)
    lines = [json.dumps(asdict(flip), ensure_ascii=False) for flip in changed]
    (publication.path / "flips.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    for name, given in zip(("before", "after"), answers, strict=True):
        text = json.dumps(vars(given), ensure_ascii=False, indent=1)
        (publication.path / f"answers-{name}.json").write_text(text, encoding="utf-8")
    publication.result = {
        "scorecard": {"before": before.to_record(), "after": after.to_record()},
        "verdict": sentence,
        "flips": len(changed),
        "answer_tokens": config.answer_tokens,
    }
    session.note(sentence)


def compare(
    session: Session, policy: Policy, sets: PromptSets, both: bool = True
) -> tuple[Scorecard, Scorecard, tuple[Answers, Answers]]:
    """Scorecards and answers of the base and of the student; not `both` measures the base only and returns it twice."""
    config, chunk = session.config.evaluate, session.config.distill.chunk
    with policy.model.adapters_off():
        reference = reference_answers(policy, texts(sets.harmless), config.kl_tokens, ANSWER_BATCH)
    done = session.progress("answers", (1 + both) * sets.total)
    with policy.model.adapters_off():
        before, old = measure(policy, sets, config.answer_tokens, ANSWER_BATCH, reference, chunk, done)
    require_answers(before, config.answer_tokens)
    if not both:
        return before, before, (old, old)
    after, new = measure(
        policy, sets, config.answer_tokens, ANSWER_BATCH, reference, chunk, lambda count: done(sets.total + count)
    )
    for label, card in (("before", before), ("after", after)):
        for name in KINDS:
            rate = getattr(card, name)
            session.emit(Metric(session.stage, f"{name} refused, {label}", rate.share, rate.n))
    return before, after, (old, new)

"""Stage 2: the refusal direction, and the strength at which it makes a teacher (docs/method.md, the refusal direction)."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import floor

import torch
from safetensors.torch import save_file
from torch import Tensor

from safesteer_lite.config.constants import DEPTH_LIMIT, TEACHER_TOKENS
from safesteer_lite.errors import DirectionError
from safesteer_lite.evaluation import judges
from safesteer_lite.evaluation.measure import counting_from
from safesteer_lite.events import Metric
from safesteer_lite.method import directions as method
from safesteer_lite.method.directions import Activations, Candidate
from safesteer_lite.method.policies import Batch, Steering, teacher
from safesteer_lite.models.assistant import Done, Policy
from safesteer_lite.prompts.plan import texts
from safesteer_lite.runs.folder import Publication
from safesteer_lite.stages.session import ANSWER_BATCH, Session

_BATCH = 32


@dataclass(frozen=True)
class PromptSet:
    """Prompts with what the base showed on them, all in the same order."""

    prompts: list[str]
    scores: Tensor
    activations: Activations

    def where(self, keep: Tensor) -> PromptSet:
        """The prompts at which `keep` is true."""
        chosen = [prompt for prompt, kept in zip(self.prompts, keep.tolist(), strict=True) if kept]
        return PromptSet(chosen, self.scores[keep], Activations(self.activations.values[keep]))


@dataclass(frozen=True)
class Trial:
    """A teacher of one strength on the held-out harmful prompts.

    Attributes:
        strength: multiple of the refusal direction.
        refused: answers judged refusals, of `n`.
        n: prompts.
        broken: answers that repeat themselves.
    """

    strength: float
    refused: int
    n: int
    broken: int


def run(session: Session, publication: Publication) -> None:
    """Find the direction and the strength, or stop with the reason."""
    config, policy = session.config.direction, session.policy
    refusal = policy.token_ids(config.refusal_openings)
    harmful, harmless = session.prompts.direction()
    selection = session.prompts.split("selection")
    total = 2 * (len(harmful) + len(selection.harmful))
    done = session.progress("prompts read", total)
    counts = [0, len(harmful), 2 * len(harmful), 2 * len(harmful) + len(selection.harmful)]
    groups = (harmful, harmless, selection.harmful, selection.harmless)
    sets = [
        read(policy, texts(group), refusal, counting_from(start, done))
        for group, start in zip(groups, counts, strict=True)
    ]
    kept, threshold = keep_clear(sets, config.minimum_prompts)
    session.note(
        f"Of {len(harmful)} + {len(selection.harmful)} harmful prompts {len(kept[0].prompts)} + {len(kept[2].prompts)} "
        f"have a refusal score above {threshold:.2f}; of as many harmless ones {len(kept[1].prompts)} + "
        f"{len(kept[3].prompts)} stay below."
    )
    _require_enough(kept, config.minimum_prompts, policy, session)
    vectors = method.mean_difference(kept[0].activations, kept[1].activations)
    separation = method.separation(vectors, kept[2].activations, kept[3].activations)
    candidates = method.shortlist(separation, DEPTH_LIMIT, config.shortlist)
    scored, coefficient = score(session, vectors, candidates, kept[2].prompts, kept[3].prompts, refusal)
    chosen = scored[0]
    save_file({"candidates": vectors, "separation": separation}, publication.path / "candidates.safetensors")
    (publication.path / "candidates.json").write_text(
        json.dumps([asdict(entry) for entry in scored], indent=1), encoding="utf-8"
    )
    if chosen.failed:
        raise DirectionError(
            "No refusal direction met all criteria. The best were: " + "; ".join(map(describe, scored[:3])) + ".",
            _advice(scored, config.kl_limit),
        )
    vector = vectors[chosen.position, chosen.layer]
    strength, trials = search_strength(session, vector, chosen.layer, coefficient, texts(selection.harmful))
    save_file({"direction": vector.contiguous()}, publication.path / "direction.safetensors")
    publication.result = {
        "position": chosen.position,
        "layer": chosen.layer,
        "strength": strength,
        "coefficient": coefficient,
        "threshold": threshold,
        "kept": [len(entry.prompts) for entry in kept],
        "chosen": asdict(chosen),
        "trials": [asdict(trial) for trial in trials],
    }
    session.note(f"Chosen: {describe(chosen)}; strength {strength:g}.")


def _advice(scored: Sequence[Candidate], kl_limit: float) -> str:
    """What to do where no candidate met all criteria."""
    best = scored[0].kl
    if best is not None and all(entry.kl is None or entry.kl >= kl_limit for entry in scored):
        return (
            "Every one changes harmless answers too much when it is projected out, which is done to score directions only and "
            f"never to your model. To accept the best: --set direction.kl_limit={floor(10 * best + 1) / 10:g}; "
            "its teacher is tested afterwards."
        )
    return "The model may hardly refuse anything. Use more or clearer prompts, or another model."


def describe(candidate: Candidate) -> str:
    """One candidate in words."""
    text = f"position {candidate.position}, layer {candidate.layer}"
    for name, value in (("induce", candidate.induce), ("bypass", candidate.bypass), ("KL", candidate.kl)):
        if value is not None:
            text += f", {name} {value:.2f}"
    return text + (f" ({'; '.join(candidate.failed)})" if candidate.failed else "")


def read(policy: Policy, prompts: list[str], refusal: Tensor, done: Done) -> PromptSet:
    """The base's refusal scores and block inputs, from one forward a prompt; fewer at a time where memory is short."""

    def look(size: int) -> PromptSet:
        order: list[int] = []
        batches: list[Batch] = []
        for places, batch in policy.batches(prompts, size):
            order += places
            batches.append(batch)
        activations, scores = method.read_prompts(policy.model, batches, policy.template_positions, refusal, done)
        return PromptSet([prompts[place] for place in order], scores, activations)

    return policy.fitting(0, _BATCH, look)


def keep_clear(sets: Sequence[PromptSet], minimum: int) -> tuple[list[PromptSet], float]:
    """Harmful prompts that the base refuses and harmless ones that it does not, by refusal score.

    The threshold is 0, the authors' one. A score above 0 needs more than half the probability on the listed openings; where
    that leaves fewer than `minimum` held-out harmful prompts, the threshold is the score that 95 % of the harmless
    prompts stay below.

    Args:
        sets: harmful and harmless direction prompts, then harmful and harmless held-out ones.
        minimum: held-out harmful prompts wanted.
    """
    threshold = 0.0
    if int((sets[2].scores > 0).sum()) < minimum or int((sets[0].scores > 0).sum()) < 2 * minimum:
        threshold = min(0.0, float(torch.cat([sets[1].scores, sets[3].scores]).quantile(0.95)))
    kept = [
        entry.where(entry.scores > threshold if index % 2 == 0 else entry.scores < max(threshold, 0.0))
        for index, entry in enumerate(sets)
    ]
    return kept, threshold


def _require_enough(kept: Sequence[PromptSet], minimum: int, policy: Policy, session: Session) -> None:
    """Stop where the base refuses too little to have a refusal direction (docs/method.md, models that barely refuse)."""
    baseline = session.result("baseline")["scorecard"]["harmful"]
    if baseline["refused"] < max(2, 0.15 * baseline["n"]):
        raise DirectionError(
            f"This model barely refuses: {baseline['refused']} of {baseline['n']} harmful prompts. The difference of its "
            "harmful and harmless activations would be a topic, not a refusal, and a teacher made of it would not refuse.",
            "Start from an instruct model that refuses at times, such as one of the presets (`safesteer-lite presets`).",
        )
    names = ("harmful direction", "harmless direction", "harmful selection", "harmless selection")
    short = [
        f"{len(entry.prompts)} {name}" for entry, name in zip(kept, names, strict=True) if len(entry.prompts) < minimum
    ]
    if short:
        openings = session.result("baseline")["openings"]
        found = ", ".join(f"{word!r} {count}x" for word, count in openings.items())
        raise DirectionError(
            f"Too few prompts are clear cases for this model: {', '.join(short)} prompts, {minimum} are needed. Its refusals "
            f"open with {found}; looked for were {', '.join(map(repr, session.config.direction.refusal_openings))}.",
            "Start a run that looks for those: --set direction.refusal_openings="
            f"{shlex.quote(','.join(word for word in openings if ',' not in word))}",
        )


def score(
    session: Session,
    vectors: Tensor,
    candidates: list[Candidate],
    harmful: list[str],
    harmless: list[str],
    refusal: Tensor,
) -> tuple[list[Candidate], float]:
    """All criteria on the shortlist; the best candidate first. Fewer prompts at a time where memory is short.

    A direction must induce refusal. The authors test that at coefficient 1; where no candidate passes there, the next
    larger of the strengths to be searched is tried, because a weak direction that is long enough still steers.
    """
    return session.policy.fitting(0, _BATCH, partial(_score, session, vectors, candidates, harmful, harmless, refusal))


def _score(
    session: Session,
    vectors: Tensor,
    candidates: list[Candidate],
    harmful: list[str],
    harmless: list[str],
    refusal: Tensor,
    size: int,
) -> tuple[list[Candidate], float]:
    config, policy = session.config.direction, session.policy
    bad = [batch for _, batch in policy.batches(harmful, size)]
    good = [batch for _, batch in policy.batches(harmless, size)]
    done = session.progress("candidates ablated", len(candidates))
    ablated = method.ablation_scores(policy.model, vectors, candidates, bad, good, refusal, done)
    # A direction whose ablation changes harmless answers too much is out, so its induce score need not be measured.
    gentle = [entry for entry in ablated if entry.kl is not None and entry.kl < config.kl_limit]
    rest = [entry for entry in ablated if entry not in gentle]
    judged, coefficient = method.judge_candidates(ablated, config.kl_limit), config.steering_strengths[0]
    for coefficient in config.steering_strengths if gentle else ():
        count = session.progress("prompts steered", len(gentle) * len(harmless))
        induced = method.induce_scores(policy.model, coefficient * vectors, gentle, good, refusal, count)
        judged = method.judge_candidates([*induced, *rest], config.kl_limit)
        if not judged[0].failed:
            if coefficient != 1:
                session.note(f"No candidate induces refusal at coefficient 1; at {coefficient:g} some do.")
            break
    return judged, coefficient


def search_strength(
    session: Session, vector: Tensor, layer: int, smallest: float, harmful: list[str]
) -> tuple[float, list[Trial]]:
    """The smallest strength at which the teacher refuses nearly all held-out harmful prompts in fluent text."""
    config, policy, trials = session.config.direction, session.policy, []
    steps = [value for value in config.steering_strengths if value >= smallest]
    done = session.progress("teacher answers", len(steps) * len(harmful))
    # The teacher is read behind the base's thoughts, so it is tried there too; while it steers, the base cannot think.
    policy.think(harmful, ANSWER_BATCH)
    for index, strength in enumerate(steps):
        with teacher(policy.model, Steering(layer, strength * vector)):
            answers = policy.answers(harmful, TEACHER_TOKENS, ANSWER_BATCH, thinks=False)
        refused = sum(judges.judge(answer).refused for answer in answers)
        trials.append(Trial(strength, refused, len(answers), sum(map(repeats, answers))))
        done((index + 1) * len(harmful))
        session.emit(
            Metric(session.stage, f"teacher refusals at strength {strength:g}", refused / len(answers), len(answers))
        )
        if refused >= config.teacher_refusals * len(answers) and trials[-1].broken <= 0.1 * len(answers):
            return strength, trials
    best = max(trials, key=lambda trial: trial.refused - trial.broken)
    if best.refused - best.broken < 0.5 * best.n:
        raise DirectionError(
            f"No steering strength makes a usable teacher: the best, {best.strength:g}, refuses {best.refused} of {best.n} "
            f"held-out harmful prompts, and {best.broken} of its answers repeat themselves.",
            "Try other steering strengths (direction.steering_strengths) or a larger shortlist (direction.shortlist=0).",
        )
    session.warn(
        f"The best teacher refuses {best.refused} of {best.n} held-out harmful prompts, fewer than the "
        f"{config.teacher_refusals:.0%} asked for; the student can hardly do better."
    )
    return best.strength, trials


def repeats(answer: str) -> bool:
    """Whether more than half of an answer's word triples have been said before: steering too strong shows like this."""
    words = answer.split()
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return len(triples) >= 4 and len(set(triples)) < 0.5 * len(triples)


def load_steering(session: Session) -> Steering:
    """The teacher that a published direction stage chose."""
    result = session.result("direction")
    vector = session.tensors("direction", "direction.safetensors")["direction"]
    return Steering(result["layer"], result["strength"] * vector)

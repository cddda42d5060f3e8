"""Stage 2: the refusal direction, and the strength at which it makes a teacher (docs/method.md, the refusal direction)."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import floor

from safetensors.torch import save_file
from torch import Tensor

from safesteer_lite.config.constants import DEPTH_LIMIT, TEACHER_TOKENS
from safesteer_lite.errors import DirectionError, ModelError, WeakRefusalError
from safesteer_lite.evaluation import judges
from safesteer_lite.evaluation.scorecard import Rate
from safesteer_lite.events import Metric
from safesteer_lite.method import directions as method
from safesteer_lite.method.directions import Candidate
from safesteer_lite.method.policies import Steering, teacher
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.loading import check_template, load_policy
from safesteer_lite.prompts.plan import texts
from safesteer_lite.runs.folder import Publication
from safesteer_lite.sources.base import Base
from safesteer_lite.sources.hub import commit_of
from safesteer_lite.sources.origin import open_origin
from safesteer_lite.stages import prompted
from safesteer_lite.stages.contrast import Contrast, of_replies, of_requests
from safesteer_lite.stages.session import Session
from safesteer_lite.stages.trial import Trial, repeats

_BATCH = 32
_FROM_THE_ORIGIN = (
    "If it was made from an instruct model that refuses at times, start a run that finds the direction there: "
    "--direction-from BASE (a folder or a Hub id)."
)
_TOLD = "--set direction.teacher=prompted tells the teacher to refuse"
_OTHER_WAYS = (
    f"Without such a model there are two ways, both experimental: {_TOLD}, and --set direction.contrast=responses compares "
    "replies that refuse with replies that comply. Or start from a model that refuses, as those of the presets do "
    "(`safesteer-lite presets`)."
)
_LAST_WAY = f"Without such a model there is one more way, experimental too: {_TOLD}."


def run(session: Session, publication: Publication) -> None:
    """Find the direction and the strength, or stop with the reason."""
    config = session.config.direction
    if config.teacher == "prompted":
        prompted.publish(session, publication)
        return
    origin = open_origin(config.source, session.base, session.emit) if config.source else None
    if origin is None:
        if config.contrast == "requests":
            _require_refusals(session)
        found = find(session, session.policy, publication)
    else:
        session.note(f"The direction is found on {config.source}, and its strength on the model itself.")
        session.drop_policy()
        # Nothing here keeps this model, so that it is gone before the run's own is loaded again.
        found = find(session, load_origin(session, origin), publication)
        session.drop_policy()
    harmful = texts(session.prompts.split("selection").harmful)
    # What it takes to steer another model is no measure of what this one takes.
    smallest = found.coefficient if origin is None else config.steering_strengths[0]
    strength, trials = search_strength(session, found.vector, found.chosen.layer, smallest, harmful)
    save_file({"direction": found.vector.contiguous()}, publication.path / "direction.safetensors")
    publication.result = {
        "contrast": config.contrast,
        "position": found.chosen.position,
        "layer": found.chosen.layer,
        "strength": strength,
        "coefficient": found.coefficient,
        "threshold": found.threshold,
        "kept": found.kept,
        "chosen": asdict(found.chosen),
        "trials": [asdict(trial) for trial in trials],
    }
    if origin:
        known = {"name": config.source, "commit": commit_of(origin.folder), "fingerprint": origin.fingerprint}
        publication.result["source"] = known
    session.note(f"Chosen: {describe(found.chosen)}; strength {strength:g}.")


def load_origin(session: Session, origin: Base) -> Policy:
    """The model that the direction is found on, loaded as the run's own is, whose size it has.

    It thinks as the run's own does where its chat template can have it so: what learned to think may come of what does not.
    """
    config = session.config
    try:
        check_template(origin, session.day, config.model.thinking)
    except ModelError:
        config = replace(config, model=replace(config.model, thinking="auto"))
    return load_policy(origin, session.settle(), config, session.day, session.note)


@dataclass(frozen=True)
class Found:
    """A direction that met all criteria.

    Attributes:
        vector: (width,) float32.
        chosen: where it was found, and its scores.
        coefficient: the smallest strength at which it induced refusals.
        threshold: the refusal score that parted the prompts, log-odds.
        kept: how many prompts it rests on: two sides, and two held out.
    """

    vector: Tensor
    chosen: Candidate
    coefficient: float
    threshold: float
    kept: list[int]


def find(session: Session, policy: Policy, publication: Publication) -> Found:
    """The direction of a model, which need not be the run's own; what was measured of all candidates is written down.

    Raises:
        DirectionError: it refuses too little, or no candidate met all criteria.
    """
    config = session.config.direction
    refusal = policy.token_ids(config.refusal_openings)
    contrast = (of_replies if config.contrast == "responses" else of_requests)(session, policy)
    _require_enough(contrast, session)
    vectors = method.mean_difference(contrast.towards.activations, contrast.away.activations)
    separation = method.separation(vectors, contrast.held_towards.activations, contrast.held_away.activations)
    candidates = method.shortlist(separation, DEPTH_LIMIT, config.shortlist)
    scored, coefficient = score(session, policy, vectors, candidates, contrast.harmful, contrast.harmless, refusal)
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
    kept = [len(part.prompts) for part in contrast.parts]
    return Found(vectors[chosen.position, chosen.layer], chosen, coefficient, contrast.threshold, kept)


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


def _require_refusals(session: Session) -> None:
    """Stop where the base refuses too little to have a refusal direction (docs/method.md, models that barely refuse)."""
    harmful = Rate.from_record(session.result("baseline")["scorecard"]["harmful"])
    if harmful.hardly_any:
        raise WeakRefusalError(
            f"This model barely refuses: {harmful.refused} of {harmful.n} harmful prompts. The difference of its "
            "harmful and harmless activations would be a topic, not a refusal, and a teacher made of it would not refuse.",
            f"{_FROM_THE_ORIGIN} {_OTHER_WAYS}",
        )


def _require_enough(contrast: Contrast, session: Session) -> None:
    """Stop where too few prompts are clear cases."""
    config, baseline = session.config.direction, session.result("baseline")
    minimum = config.minimum_prompts
    names = ("harmful direction", "harmless direction", "harmful selection", "harmless selection")
    counts = [len(part.prompts) for part in contrast.parts]
    short = [f"{count} {name}" for count, name in zip(counts, names, strict=True) if count < minimum]
    if short and config.source:
        raise DirectionError(
            f"Too few prompts are clear cases for {config.source}: {', '.join(short)} prompts, {minimum} are needed. Looked "
            f"for were refusals that open with {', '.join(map(repr, config.refusal_openings))}.",
            "Start a run that looks for other openings (direction.refusal_openings), or name another model.",
        )
    if short:
        openings = baseline["openings"]
        found = ", ".join(f"{word!r} {count}x" for word, count in openings.items())
        others = [word for word in openings if word not in config.refusal_openings and "," not in word]
        look = f"Or look for those: --set direction.refusal_openings={shlex.quote(','.join(others))}"
        by_requests = config.contrast == "requests"
        hint = f"{_FROM_THE_ORIGIN} {look if others else _OTHER_WAYS if by_requests else _LAST_WAY}"
        # Where its refusals open otherwise, it may well refuse enough.
        weak = not others and by_requests and any("harmful " in name for name in short)
        raise (WeakRefusalError if weak else DirectionError)(
            f"Too few prompts are clear cases for this model: {', '.join(short)} prompts, {minimum} are needed. Its refusals "
            f"open with {found}; looked for were {', '.join(map(repr, config.refusal_openings))}.",
            hint,
        )


def score(
    session: Session,
    policy: Policy,
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
    work = partial(_score, session, policy, vectors, candidates, harmful, harmless, refusal)
    return policy.fitting(0, _BATCH, work)


def _score(
    session: Session,
    policy: Policy,
    vectors: Tensor,
    candidates: list[Candidate],
    harmful: list[str],
    harmless: list[str],
    refusal: Tensor,
    size: int,
) -> tuple[list[Candidate], float]:
    config = session.config.direction
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
    policy.think(harmful, session.answer_batch)
    for index, strength in enumerate(steps):
        with teacher(policy.model, Steering(layer, strength * vector)):
            answers = policy.answers(harmful, TEACHER_TOKENS, session.answer_batch, thinks=False)
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


def load_steering(session: Session) -> Steering | None:
    """The steering that a published direction stage chose; None where the teacher is told what to do instead."""
    result = session.result("direction")
    if result.get("teacher") == "prompted":
        return None
    vector = session.tensors("direction", "direction.safetensors")["direction"]
    return Steering(result["layer"], result["strength"] * vector)

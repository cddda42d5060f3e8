"""Stage 4: distillation, measured every few steps, with the best step kept (docs/method.md, distillation)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from safesteer_lite.evaluation.scorecard import Scorecard
from safesteer_lite.evaluation.verdict import side_by_side
from safesteer_lite.hardware.known import measured_on
from safesteer_lite.models.adapter import adapter_tensors, load_adapter, save_adapter, scale_adapter
from safesteer_lite.runs.durable import write_json
from safesteer_lite.runs.folder import Publication
from safesteer_lite.runs.steps import Checkpoints
from safesteer_lite.stages.handover import train_elsewhere
from safesteer_lite.stages.history import History
from safesteer_lite.stages.parent import parent_of
from safesteer_lite.stages.session import Session
from safesteer_lite.stages.training import Training, begin, paces, take_steps


def run(session: Session, publication: Publication) -> None:
    """Train, resume where a killed run stopped, publish the best step's adapter."""
    if others := measured_on(session.config.model.name):
        session.note(f"The default way of training was measured on {others}.")
    checkpoints = replace(publication.steps, warn=session.warn)
    saved = checkpoints.newest_checkpoint()
    if saved and saved[0]:
        session.note(f"Resumed after step {saved[0]} of {session.config.distill.steps}.")
    elsewhere = session.settle().library.own_process
    figures = train_elsewhere(session, checkpoints) if elsewhere else {}
    training = train(session, checkpoints)
    loop, history = training.loop, training.history
    load_adapter(session.policy.model, training.best)
    save_adapter(session.policy.model, publication.path / "adapter")
    write_json(publication.path / "history.json", asdict(history))
    publication.result = {
        "best_step": history.best_step,
        "best_strength": history.best_strength,
        "best_score": round(history.best_score, 3),
        "steps": loop.done,
        "measured": history.measured,
        "scaled": history.scaled,
        "micro_batch": loop.micro_batch,
        **paces(loop),
        **figures,
    }
    strength = "" if history.best_strength == 1 else f" at strength {history.best_strength:g}"
    kept = history.kept
    apart = f", separation {kept.separation:+.2f} nats" if kept and kept.separation is not None else ""
    if (parent := parent_of(session.run)) and not history.best_step:
        session.note(f"None of {loop.done} steps has a better trade-off than {parent['run']} has: its adapter is kept.")
        return
    if history.best_score < 0 and history.kept_record:
        before = Scorecard.from_record(session.result("baseline")["scorecard"])
        refused = side_by_side(before, Scorecard.from_record(history.kept_record))
        session.warn(
            "By the selection split the base model is the better choice: what was gained on harmful prompts weighs less than "
            f"what is refused of the others now (score {history.best_score:+.1f} points, where the base has 0). Refused were "
            f"{refused}. The test split shows next whether that holds on other prompts."
        )
    session.note(
        f"Kept step {history.best_step} of {loop.done}{strength}: the best trade-off on the selection split (score "
        f"{history.best_score:+.1f} points{apart})."
    )
    if (other := history.passed_over) and history.kept_record:
        kept_rates, other_rates = (Scorecard.from_record(record) for record in (history.kept_record, other))
        price = side_by_side(kept_rates, other_rates, "there")
        session.note(
            f"Passed over: strength {other['strength']:g}, which refuses more harmful prompts. What is kept refuses {price}. "
            "`safesteer-lite strength` makes it stronger or weaker, without training again."
        )


def train(session: Session, checkpoints: Checkpoints) -> Training:
    """All steps, and the last one's adapter at other strengths."""
    training = begin(session, checkpoints)
    take_steps(session, training, checkpoints)
    if training.history.best_by_trainer:
        training.measure_best_again()
    model = session.policy.model
    with training.loop.optimizer.averaged():
        last = adapter_tensors(model)
    for strength in strengths_to_try(session.config.distill.adapter_strengths, training.history):
        load_adapter(model, last)
        scale_adapter(model, strength)
        training.measure(strength)
    return training


def strengths_to_try(strengths: Sequence[float], history: History) -> Iterator[float]:
    """Those above 1, and after them those below, unless one above is kept by then: what weakening gains is not asked of an
    adapter that strengthening made better."""
    yield from (strength for strength in strengths if strength > 1)
    if history.best_strength <= 1:
        yield from (strength for strength in strengths if strength < 1)

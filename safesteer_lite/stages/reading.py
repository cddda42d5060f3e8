"""What the adapter reads before the first step: directions that set harmful prompts apart, those of the seed, or a parent's."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from safesteer_lite.evaluation.judges import judge
from safesteer_lite.models.adapter import freeze_reading, load_adapter, read_adapter
from safesteer_lite.models.reading import read_discriminants
from safesteer_lite.prompts.contexts import Conversation, begun
from safesteer_lite.prompts.sets import Prompt
from safesteer_lite.stages.parent import parent_adapter, parent_of
from safesteer_lite.stages.session import Session

# Prompts of a kind that are read, at most: each takes memory, and the bundled sets have fewer.
_READ = 640


def prepare_adapter(session: Session, saved: Path | None) -> None:
    """Before the first step, what the settings say the adapter reads; in a resumed run, what it read then.

    A run that continues another one begins with that one's whole adapter.
    """
    settings, policy = session.config.distill, session.policy
    parent = parent_of(session.run)
    if parent and not saved:
        read_adapter(policy.model, parent_adapter(session.run))
        if settings.reading == "discriminant":
            freeze_reading(policy.model)
        session.note(
            f"Training goes on from the adapter of {parent['run']}, after {parent['steps']} steps; the optimizer begins afresh."
        )
        return
    if settings.reading != "discriminant":
        return
    if saved:
        load_adapter(policy.model, load_file(saved / "best.safetensors"))
        freeze_reading(policy.model)
        return
    blocks = len(policy.model.layers) - policy.model.first_adapter_layer
    harmful = session.asked(_read_of(session, "harmful", session.prompts.training() + session.prompts.direction()[0]))
    if settings.reading_prompts == "answered":
        harmful = _answered(session, harmful)
    anchors = [prompt for kind in session.anchors() for prompt in kind]
    harmless = session.asked(_read_of(session, "harmless", anchors))
    done = session.progress("reading directions of blocks", blocks)
    read_discriminants(
        policy,
        harmful,
        harmless,
        settings.reading_ridge,
        session.answer_batch,
        done,
        (begun(harmful), begun(harmless)) if settings.begun else None,
        settings.reading_unread,
    )
    session.note(
        f"Reading directions from {len(harmful)} harmful and {len(harmless)} harmless prompts: what the adapter reads is "
        "set, what it writes is trained."
    )


def _read_of(session: Session, kind: str, prompts: list[Prompt]) -> list[Prompt]:
    """The prompts that reading directions are taken from: all, or evenly spread ones of a large file of the user's own."""
    if len(prompts) <= _READ:
        return prompts
    session.note(f"Reading directions are taken from {_READ} of {len(prompts)} {kind} prompts, evenly spread.")
    return [prompts[place * len(prompts) // _READ] for place in range(_READ)]


def _answered(session: Session, harmful: list[str | Conversation]) -> list[str | Conversation]:
    """The harmful prompts that the base answers, which are what training has to change; all, where those are too few."""
    policy = session.policy
    done = session.progress("harmful prompts answered", len(harmful))
    with policy.model.adapters_off():
        answers = policy.answers(
            harmful, session.config.evaluate.selection_tokens, session.answer_batch, done, thinks=False
        )
    answered = [asked for asked, answer in zip(harmful, answers, strict=True) if not judge(answer).refused]
    if len(answered) < session.config.direction.minimum_prompts:
        session.note(f"The base answers only {len(answered)} of {len(harmful)} harmful prompts: all of them are read.")
        return harmful
    session.note(f"The base answers {len(answered)} of {len(harmful)} harmful prompts: these are read.")
    return answered

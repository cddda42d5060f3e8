"""Stage 3: the safety tokens (docs/method.md, safety tokens)."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safesteer_lite.errors import DirectionError
from safesteer_lite.method import tokens as method
from safesteer_lite.method.memory import fitting
from safesteer_lite.method.tokens import VotePositions
from safesteer_lite.prompts.plan import texts
from safesteer_lite.runs.folder import Publication
from safesteer_lite.stages.direction import load_steering
from safesteer_lite.stages.session import Session

# Prompts a batch, fewer where memory is short; each stands for `samples` sequences.
_BATCH = 8


def run(session: Session, publication: Publication) -> None:
    """Let every position of the teacher's answers to held-out harmless prompts vote."""
    config, policy = session.config.tokens, session.policy
    model, steer = policy.model, load_steering(session)
    prompts = texts(session.prompts.split("selection").harmless)
    done = session.progress("prompts continued", len(prompts))

    def read(size: int) -> list[VotePositions]:
        generator, positions, finished = torch.Generator().manual_seed(session.config.seed), [], 0
        for _, batch in policy.batches(prompts, size):
            positions.append(
                method.collect(model, steer, batch, samples=config.samples, horizon=config.horizon, generator=generator)
            )
            finished += len(batch)
            done(finished)
        return positions

    positions, _ = fitting(_BATCH, read)
    chosen = method.vote(
        positions,
        model.logits,
        excluded=model.special_ids,
        minimum_probability=config.minimum_probability,
        ballots=config.ballots,
        count=config.count,
        chunk=session.config.distill.chunk,
    )
    if not len(chosen.ids):
        raise DirectionError(
            "No token got a vote, so there are no safety tokens.",
            "Lower tokens.minimum_probability or raise tokens.samples.",
        )
    words = [policy.tokenizer.decode([index]) for index in chosen.ids.tolist()]
    save_file({"ids": chosen.ids, "votes": chosen.votes}, publication.path / "tokens.safetensors")
    rows = [
        {"id": index, "text": word, "votes": votes, "teacher": teacher, "base": base}
        for index, word, votes, teacher, base in zip(
            chosen.ids.tolist(),
            words,
            chosen.votes.tolist(),
            chosen.teacher_probability.tolist(),
            chosen.base_probability.tolist(),
            strict=True,
        )
    ]
    (publication.path / "tokens.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    publication.result = {
        "tokens": words,
        "positions": chosen.positions,
        "teacher_mass": float(chosen.teacher_probability.sum()),
        "base_mass": float(chosen.base_probability.sum()),
    }
    session.note(
        f"{chosen.positions} positions voted; the {len(words)} safety tokens begin with {', '.join(map(repr, words[:8]))}."
    )


def load_tokens(session: Session) -> Tensor:
    """The ids that a published token stage chose, (K,) int64."""
    return load_file(session.folder("tokens") / "tokens.safetensors")["ids"]

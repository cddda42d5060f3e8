"""Stage 3: the safety tokens (docs/method.md, safety tokens)."""

from __future__ import annotations

import json
import math
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from safesteer_lite.errors import DirectionError
from safesteer_lite.hardware.pace import SHARE_PLACES
from safesteer_lite.method import tokens as method
from safesteer_lite.method.draws import Draws
from safesteer_lite.method.policies import pad_left
from safesteer_lite.method.tokens import VotePositions
from safesteer_lite.prompts.plan import texts
from safesteer_lite.runs.folder import Publication
from safesteer_lite.stages.direction import load_steering
from safesteer_lite.stages.prompted import taught_batches
from safesteer_lite.stages.session import Session

# Prompts a batch, fewer where memory is short; each may stand for several sequences.
_BATCH = 8
# What the table of shares looks at: so many tokens.
SHARE_COUNTS = (10, 20, 50, 100, 200)
# A set that sees less than this of the divergence where an answer begins cannot teach the model to begin otherwise.
LEAST_SHARE = 0.1


def run(session: Session, publication: Publication) -> None:
    """Let positions of answers vote, and tell how much of the divergence the chosen tokens see."""
    config, policy = session.config.tokens, session.policy
    ranked = method.vote(
        _voters(session),
        policy.model.logits,
        by=cast(method.Vote, config.vote),
        excluded=policy.model.special_ids,
        minimum_probability=config.minimum_probability,
        ballots=config.ballots,
        count=max(config.count, *SHARE_COUNTS),
        chunk=session.config.distill.chunk,
    )
    chosen = ranked.first(config.count)
    if not len(chosen.ids):
        raise DirectionError(
            "No token got a vote, so there are no safety tokens.",
            "Lower tokens.minimum_probability or raise tokens.samples.",
        )
    shares = _shares(session, ranked.ids)
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
        "shares": shares,
    }
    session.note(
        f"{chosen.positions} positions voted; the {len(words)} safety tokens begin with {', '.join(map(repr, words[:8]))}."
    )
    _tell_share(session, shares, len(words))


def _voters(session: Session) -> list[VotePositions]:
    """The positions that vote: where the loss will be read, or (paper) along the teacher's answers to harmless prompts."""
    config = session.config.tokens
    if config.voters == "harmless":
        prompts = texts(session.prompts.direction()[1]) + texts(session.prompts.split("selection").harmless)
        return _collect(session, prompts, config.samples, config.horizon, by_teacher=True)
    # A file of the user's own may hold any number; as many as the bundled ones are enough to vote.
    harmful = texts(session.prompts.training())[: session.config.prompts.train]
    return _collect(session, harmful, config.samples, config.horizon, by_teacher=False)


def _collect(
    session: Session, prompts: list[str], samples: int, horizon: int, *, by_teacher: bool
) -> list[VotePositions]:
    policy, steer = session.policy, load_steering(session)
    done = session.progress("prompts continued", len(prompts))

    # One number a token beyond the last prompt position, which is the first to be read.
    drawn = Draws.of(horizon - 1, len(prompts), samples, torch.Generator().manual_seed(session.config.seed))

    def read(size: int) -> list[VotePositions]:
        positions, finished = [], 0
        for places, batch in policy.batches(prompts, size):
            told = taught_batches(session, [prompts[place] for place in places])
            found = method.collect(
                policy.model,
                steer,
                batch,
                samples=samples,
                horizon=horizon,
                chance=drawn.at(places),
                by_teacher=by_teacher,
                taught=pad_left(told) if told else None,
            )
            positions.append(found)
            finished += len(batch)
            done(finished)
        return positions

    return policy.fitting(horizon, _BATCH, read, samples)


def _shares(session: Session, ids: Tensor) -> dict[str, Any]:
    """The share of the divergence that the first tokens see, by place, along the base's answers to held-out prompts."""
    prompts = texts(session.prompts.split("selection").harmful)
    positions = _collect(session, prompts, 1, SHARE_PLACES, by_teacher=False)
    counts = sorted({min(count, len(ids)) for count in (*SHARE_COUNTS, session.config.tokens.count)})
    found = method.carried(positions, session.policy.model.logits, ids, counts, session.config.distill.chunk)
    reached = torch.cat([entry.place for entry in positions]).bincount(minlength=found.shape[1])
    return {
        "counts": counts,
        "positions": reached.tolist(),
        # Where teacher and base agree there is no divergence to see a share of.
        "shares": [[None if math.isnan(share) else round(share, 4) for share in row] for row in found.tolist()],
    }


def _tell_share(session: Session, shares: dict[str, Any], count: int) -> None:
    """Say what the chosen tokens see where answers to harmful prompts begin, and warn where that is next to nothing."""
    first = next(iter(shares["shares"][shares["counts"].index(count)]), None)
    if first is None:
        session.warn("Base and teacher begin their answers to harmful prompts alike: there is nothing to distil there.")
        return
    session.note(
        f"Where an answer to a harmful prompt begins, these {count} tokens see {first:.0%} of the divergence between base "
        f"and teacher (n {shares['positions'][0]})."
    )
    reads = {session.config.distill.objective, session.config.distill.anchor_objective}
    if first < LEAST_SHARE and not reads <= {"full", "top-k"}:
        session.warn(
            "The loss reads the safety tokens only, and these see next to nothing of what the teacher wants changed: set "
            "tokens.vote=mass, or raise tokens.count."
        )


def load_tokens(session: Session) -> Tensor:
    """The ids that a published token stage chose, (K,) int64."""
    return session.tensors("tokens", "tokens.safetensors")["ids"]

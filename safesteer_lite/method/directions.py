"""The refusal direction: candidates, scores and selection (Arditi et al. 2024, arXiv 2406.11717).

A candidate is r[position, layer] = mean over harmful - mean over harmless prompts of the block INPUT, at one of the
template positions after the user's text. The authors of SafeSteer score every candidate three times with full
forwards; here a cheap separation score shortlists them, and the induce score reruns only the blocks above the injection point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from safesteer_lite.method import policies, steering
from safesteer_lite.method.policies import Batch, LanguageModel


@dataclass(frozen=True)
class Candidate:
    """One direction and what was measured of it; None is "not measured".

    Attributes:
        position: template position, -1 is the last prompt token.
        layer: block whose input the direction belongs to.
        separation: distance of harmful and harmless held-out projections, in pooled standard deviations.
        induce: mean refusal score on harmless prompts with the direction added, log-odds; must be > 0.
        bypass: mean refusal score on harmful prompts with the direction projected out, log-odds; lower is better.
        kl: KL(base || ablated) at the last position of harmless prompts, nats; must be < the limit.
        failed: the criteria it does not meet.
    """

    position: int
    layer: int
    separation: float
    induce: float | None = None
    bypass: float | None = None
    kl: float | None = None
    failed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Activations:
    """Block inputs at the template positions, (prompts, positions, layers, width) float32."""

    values: Tensor


def read_prompts(
    model: LanguageModel, batches: Sequence[Batch], positions: int, refusal_tokens: Tensor, done: Callable[[int], None]
) -> tuple[Activations, Tensor]:
    """The base's block inputs at the template positions and its refusal scores, from one forward a prompt.

    Args:
        batches: left-padded prompts.
        positions: how many template positions follow the user's text.
        refusal_tokens: (n,) int64, tokens that open a refusal.
        done: called with the number of prompts read so far.

    Returns:
        Activations, and scores (prompts,) float32, both in the order of the batches.
    """
    rows, scores, total = [], [], 0
    with torch.no_grad(), policies.base(model):
        for batch in batches:
            with steering.record(model.layers, positions) as seen:
                logits = policies.last_logits(model, batch)
            rows.append(torch.stack([seen[layer] for layer in range(len(seen))], dim=2).float().cpu())
            scores.append(refusal_score(logits, refusal_tokens).cpu())
            total += len(batch)
            done(total)
    return Activations(torch.cat(rows)), torch.cat(scores)


def mean_difference(harmful: Activations, harmless: Activations) -> Tensor:
    """All candidate directions, (positions, layers, width) float32, accumulated in float64 (docs/method.md)."""
    return (harmful.values.double().mean(0) - harmless.values.double().mean(0)).float()


def refusal_score(logits: Tensor, refusal_tokens: Tensor) -> Tensor:
    """log p_ref - log(1 - p_ref), p_ref being the probability mass on the tokens that open a refusal.

    Args:
        logits: (batch, vocabulary).
        refusal_tokens: (n,) int64.

    Returns:
        (batch,) float32 log-odds.
    """
    total = logits.float().logsumexp(-1)
    is_refusal = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    is_refusal[refusal_tokens] = True
    refusing = logits.float().masked_fill(~is_refusal, -torch.inf).logsumexp(-1)
    other = logits.float().masked_fill(is_refusal, -torch.inf).logsumexp(-1)
    return (refusing - total) - (other - total)


def separation(directions: Tensor, harmful: Activations, harmless: Activations) -> Tensor:
    """How far apart each direction holds harmful and harmless held-out prompts, (positions, layers) float32.

    Both sets are projected on the unit direction of their own position and layer; the distance of the means is divided
    by the pooled standard deviation.
    """
    unit = directions / directions.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    first = torch.einsum("npld,pld->npl", harmful.values, unit)
    second = torch.einsum("npld,pld->npl", harmless.values, unit)
    pooled = ((first.var(0) + second.var(0)) / 2).sqrt().clamp_min(1e-12)
    return (first.mean(0) - second.mean(0)) / pooled


def shortlist(scores: Tensor, depth_limit: float, size: int) -> list[Candidate]:
    """The `size` candidates with the largest separation among layers below `depth_limit` x depth, best first.

    Args:
        scores: (positions, layers), from `separation`.
        depth_limit: share of the depth from which on a layer is too late (authors: 0.8).
        size: how many to keep; 0 keeps all (the authors' sweep), but those that part nothing: at the first block the template's
            tokens are the same for all prompts, and there is no direction.
    """
    positions, layers = scores.shape
    candidates = [
        Candidate(position - positions, layer, float(scores[position, layer]))
        for position in range(positions)
        for layer in range(layers)
        if layer < depth_limit * layers and bool(scores[position, layer].isfinite()) and float(scores[position, layer])
    ]
    candidates.sort(key=lambda candidate: -candidate.separation)
    return candidates[:size] if size else candidates


def induce_scores(
    model: LanguageModel,
    directions: Tensor,
    candidates: Sequence[Candidate],
    harmless: Sequence[Batch],
    refusal_tokens: Tensor,
    done: Callable[[int], None],
) -> list[Candidate]:
    """Fill in `induce`: climb the blocks once a batch, and branch off at each candidate's layer (coefficient 1)."""
    totals = dict.fromkeys(candidates, 0.0)
    prompts = sum(len(batch) for batch in harmless)
    finished = 0
    with torch.no_grad(), policies.base(model):
        for batch in harmless:
            trunk = model.start(batch)
            for candidate in sorted(candidates, key=lambda entry: entry.layer):
                trunk = model.advance(trunk, candidate.layer)
                vector = directions[candidate.position, candidate.layer]
                score = refusal_score(policies.last_logits_from(model, trunk.shifted(vector)), refusal_tokens)
                totals[candidate] += float(score.sum())
                finished += len(batch)
                done(finished)
    return [replace(candidate, induce=totals[candidate] / prompts) for candidate in candidates]


def ablation_scores(
    model: LanguageModel,
    directions: Tensor,
    candidates: Sequence[Candidate],
    harmful: Sequence[Batch],
    harmless: Sequence[Batch],
    refusal_tokens: Tensor,
    done: Callable[[int], None],
) -> list[Candidate]:
    """Fill in `bypass` and `kl`, from full forwards with the direction projected out everywhere."""
    scored, finished = [], 0
    with torch.no_grad(), policies.base(model):
        reference = [policies.last_logits(model, batch).log_softmax(-1) for batch in harmless]
        for candidate in candidates:
            direction = directions[candidate.position, candidate.layer]
            with steering.ablate(model.layers, direction):
                bypass = torch.cat(
                    [refusal_score(policies.last_logits(model, batch), refusal_tokens) for batch in harmful]
                )
                kl = torch.cat(
                    [
                        (known.exp() * (known - policies.last_logits(model, batch).log_softmax(-1))).sum(-1)
                        for known, batch in zip(reference, harmless, strict=True)
                    ]
                )
            scored.append(replace(candidate, bypass=float(bypass.mean()), kl=float(kl.mean())))
            finished += 1
            done(finished)
    return scored


def judge_candidates(candidates: Sequence[Candidate], kl_limit: float) -> list[Candidate]:
    """Note what each candidate fails, and order them: survivors by lowest bypass score first, then the rest the same way."""
    judged = []
    for candidate in candidates:
        failed = []
        gentle = candidate.kl is not None and candidate.kl < kl_limit
        if not gentle:
            failed.append(f"KL not below {kl_limit:g}")
        if candidate.induce is not None and not candidate.induce > 0:
            failed.append("does not induce refusal")
        if candidate.induce is None and gentle:
            failed.append("induce score not measured")
        judged.append(replace(candidate, failed=tuple(failed)))

    def rank(candidate: Candidate) -> tuple[bool, float]:
        return bool(candidate.failed), candidate.bypass if candidate.bypass is not None else float("inf")

    return sorted(judged, key=rank)

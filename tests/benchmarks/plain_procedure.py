"""The method as its authors run it, written plainly: the yardstick of `tests.benchmarks.reference`.

Two copies of the model, one for the teacher and one for the student; every (position, layer) is swept with forwards that
give all logits; log-probabilities of the full vocabulary, (batch, tokens, vocabulary), for both policies; nothing kept
from one forward to the next. It shares no code with `safesteer_lite.method`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Left-padded prompts: ids and attention mask, (prompts, length) int64."""

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Score:
    """What the sweep measured of the direction of one template position and layer."""

    position: int
    layer: int
    bypass: float
    induce: float
    kl: float


def encode(tokenizer: Any, prompts: Sequence[str]) -> Tokens:
    """Prompts through the chat template, padded on the left."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in prompts
    ]
    tokenizer.padding_side = "left"
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    return Tokens(batch.input_ids, batch.attention_mask)


def all_logits(model: Any, tokens: Tokens) -> Tensor:
    """(batch, length, vocabulary) float32."""
    places = (tokens.mask.cumsum(-1) - 1).clamp_min(0)
    output = model(input_ids=tokens.ids, attention_mask=tokens.mask, position_ids=places, use_cache=False)
    logits: Tensor = output.logits.float()
    return logits


def blocks(model: Any) -> Any:
    """The decoder blocks, under a LoRA wrapper or not."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).model.layers


@contextmanager
def inputs_changed(model: Any, layers: Sequence[int], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the input of each of the named blocks is `change` of it."""

    def hook(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(arguments[0]), *arguments[1:])

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(blocks(model)[layer].register_forward_pre_hook(hook).remove)
        yield


def adding(vector: Tensor) -> Callable[[Tensor], Tensor]:
    """What adds a vector to hidden states, in their type."""
    return lambda hidden: hidden + vector.to(hidden)


@contextmanager
def direction_removed(model: Any, direction: Tensor) -> Iterator[None]:
    """Inside, a direction is projected out of every block input and of every attention and MLP output."""
    unit = direction / direction.norm()

    def without(hidden: Tensor) -> Tensor:
        axis = unit.to(hidden)
        return hidden - (hidden @ axis)[..., None] * axis

    def hook(_: Any, __: Any, output: Any) -> Any:
        return (without(output[0]), *output[1:]) if isinstance(output, tuple) else without(output)

    with ExitStack() as stack:
        stack.enter_context(inputs_changed(model, range(len(blocks(model))), without))
        for block in blocks(model):
            for part in (block.self_attn, block.mlp):
                stack.callback(part.register_forward_hook(hook).remove)
        yield


def block_inputs(model: Any, tokens: Tokens, positions: int) -> tuple[Tensor, Tensor]:
    """Block inputs at the last `positions` positions, (prompts, positions, layers, width) float64, and last logits."""
    seen: list[Tensor] = []

    def note(hidden: Tensor) -> Tensor:
        seen.append(hidden[:, -positions:].double())
        return hidden

    with inputs_changed(model, range(len(blocks(model))), note):
        last = all_logits(model, tokens)[:, -1]
    return torch.stack(seen, dim=2), last


def refusal_log_odds(last_logits: Tensor, refusal: Tensor) -> Tensor:
    """log p - log(1 - p), p the probability of the tokens that open a refusal; float64 leaves 1 - p exact enough."""
    mass = last_logits.double().softmax(-1)[:, refusal].sum(-1)
    return mass.log() - (1 - mass).log()


def threshold(scores: Sequence[Tensor], minimum: int) -> float:
    """The refusal score from which on a prompt counts as refused: 0, as the authors have it.

    Where that leaves fewer than `minimum` held-out harmful prompts, or twice as many others, it is this project's
    fall-back, the score that 95 % of the harmless prompts stay below: without one there would be nothing to compare.

    Args:
        scores: of harmful and harmless direction prompts, then of harmful and harmless held-out ones.
        minimum: held-out harmful prompts wanted.
    """
    if int((scores[2] > 0).sum()) >= minimum and int((scores[0] > 0).sum()) >= 2 * minimum:
        return 0.0
    return min(0.0, float(torch.cat([scores[1], scores[3]]).quantile(0.95)))


def sweep(
    model: Any,
    directions: Tensor,
    candidates: Sequence[tuple[int, int]],
    harmful: Tokens,
    harmless: Tokens,
    refusal: Tensor,
    coefficient: float,
) -> list[Score]:
    """Three forwards with all logits for each candidate.

    Args:
        directions: (positions, layers, width) float32.
        candidates: (position, layer) pairs; position -1 is the last prompt token.
        harmful, harmless: held-out prompts.
        refusal: ids of the tokens that open a refusal.
        coefficient: factor on the direction where it is added; the authors take 1.
    """
    scores = []
    known = all_logits(model, harmless)[:, -1].log_softmax(-1)
    for position, layer in candidates:
        direction = directions[position, layer]
        with direction_removed(model, direction):
            bypass = refusal_log_odds(all_logits(model, harmful)[:, -1], refusal).mean()
        with inputs_changed(model, [layer], adding(coefficient * direction)):
            induce = refusal_log_odds(all_logits(model, harmless)[:, -1], refusal).mean()
        with direction_removed(model, direction):
            ablated = all_logits(model, harmless)[:, -1].log_softmax(-1)
        kl = (known.exp() * (known - ablated)).sum(-1).mean()
        scores.append(Score(position, layer, float(bypass), float(induce), float(kl)))
    return scores


def choose(scores: Sequence[Score], depth: int, depth_limit: float, kl_limit: float) -> Score | None:
    """The survivor with the lowest bypass score; None where nothing survives."""
    alive = [
        score for score in scores if score.induce > 0 and score.kl < kl_limit and score.layer < depth_limit * depth
    ]
    return min(alive, key=lambda score: score.bypass, default=None)


def sample(
    model: Any, tokens: Tokens, layer: int, vector: Tensor, samples: int, length: int, ends: list[int]
) -> Tensor:
    """Continuations by the steered model through transformers' own generate: (prompts * samples, length) at most."""
    with inputs_changed(model, [layer], adding(vector)):
        found: Tensor = model.generate(
            input_ids=tokens.ids,
            attention_mask=tokens.mask,
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_new_tokens=length,
            num_return_sequences=samples,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
    return found[:, tokens.ids.shape[1] :]


def read_policies(
    model: Any,
    batches: Sequence[tuple[Tokens, Tensor, Tensor]],
    layer: int,
    vector: Tensor,
    horizon: int,
    ends: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Full log-probabilities of both policies along continuations.

    Args:
        batches: prompts (one row a continuation), continuation ids and their mask, each (rows, horizon - 1).
        layer, vector: the steering.
        horizon: positions read a continuation (H).
        ends: ids that end a turn.

    Returns:
        Teacher's and base's log-probabilities, (rows, horizon, vocabulary) float32 each, and which positions are valid.
    """
    teacher, base, valid = [], [], []
    stop = torch.tensor(ends)
    for prompts, ids, mask in batches:
        whole = Tokens(torch.cat([prompts.ids, ids], 1), torch.cat([prompts.mask, mask.long()], 1))
        with inputs_changed(model, [layer], adding(vector)):
            teacher.append(all_logits(model, whole).log_softmax(-1)[:, -horizon:].clone())
        base.append(all_logits(model, whole).log_softmax(-1)[:, -horizon:].clone())
        text = torch.cat([torch.ones(len(ids), 1, dtype=torch.bool), mask & ~torch.isin(ids, stop)], 1)
        ended = torch.isin(base[-1].argmax(-1), stop).cumsum(1) > 0
        valid.append(text & ~ended)
    return torch.cat(teacher), torch.cat(base), torch.cat(valid)


def vote(
    teacher: Tensor,
    base: Tensor,
    valid: Tensor,
    special: Sequence[int],
    minimum_probability: float,
    ballots: int,
    count: int,
) -> list[int]:
    """The `count` tokens with most votes, most votes first, then the lower id; those without a vote are left out."""
    at_teacher = teacher[valid]
    barred = at_teacher.exp().double().mean(0) < minimum_probability
    barred[torch.tensor(list(special))] = True
    delta = (at_teacher - base[valid]).masked_fill(barred, -torch.inf)
    votes = torch.zeros(delta.shape[-1], dtype=torch.long)
    for row in delta.topk(min(ballots, int((~barred).sum())), dim=-1).indices:
        votes[row] += 1
    order = sorted(range(len(votes)), key=lambda index: (-int(votes[index]), index))[:count]
    return [index for index in order if votes[index] > 0]


def backward(
    student: Any,
    teacher: Any,
    prompts: Tokens,
    completions: Tensor,
    mask: Tensor,
    layer: int,
    vector: Tensor,
    safety: Tensor,
    batch: int,
) -> float:
    """The authors' loss of one optimizer step; its gradients are left in the student's parameters.

    Args:
        student, teacher: two copies of the model; the student has what is trained.
        prompts: one row a rollout.
        completions, mask: (rollouts, tokens), mask True up to and including the end of turn.
        layer, vector: the steering of the teacher.
        safety: (K,) ids.
        batch: rollouts a forward.

    Returns:
        The loss, nats: sum over the safety tokens of p (log p - log q), mean over valid positions, then over rollouts.
    """
    total, length = 0.0, completions.shape[1]
    for start in range(0, len(completions), batch):
        rows = slice(start, start + batch)
        whole = Tokens(
            torch.cat([prompts.ids[rows], completions[rows]], 1), torch.cat([prompts.mask[rows], mask[rows].long()], 1)
        )
        with torch.no_grad(), inputs_changed(teacher, [layer], adding(vector)):
            log_q = all_logits(teacher, whole).log_softmax(-1)
        log_p = all_logits(student, whole).log_softmax(-1)
        log_p, log_q = (part[:, -length - 1 : -1][..., safety] for part in (log_p, log_q))
        each = (log_p.exp() * (log_p - log_q)).sum(-1) * mask[rows]
        loss = (each.sum(-1) / mask[rows].sum(-1)).sum() / len(completions)
        loss.backward()
        total += float(loss.detach())
    return total

"""Divergences between student and teacher at completion positions, chunked so that no (batch, positions, vocabulary)
tensor exists.

Notation: p = student, q = teacher, both probabilities of the FULL vocabulary; S = the safety tokens.

| objective     | per position                                            | least at                        |
| ------------- | ------------------------------------------------------- | ------------------------------- |
| `paper`       | sum_S p log(p / q)                                      | p = q / e, where it is negative |
| `generalized` | sum_S [p log(p / q) - p + q]                            | p = q on S                      |
| `rest-bucket` | sum_S p log(p / q) + (1 - P_S) log((1 - P_S) / (1 - Q_S)) | p = q on S                      |
| `full`        | sum_V p log(p / q), the ordinary reverse KL             | p = q                           |
| `top-k`       | `rest-bucket` with S = the teacher's K likeliest tokens at that position | p = q on those  |
| `forward`     | sum_S q log(q / p) + (1 - Q_S) log((1 - Q_S) / (1 - P_S)) | p = q on S                      |

`paper` is the authors' loss (arXiv 2606.02530); the others are this project's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from safesteer_lite.method.directions import refusal_score

Objective = Literal["paper", "generalized", "rest-bucket", "full", "top-k", "forward"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)

# A probability mass of the rest bucket below this is numerical noise of float32; it keeps the logarithm finite.
_SMALLEST_REST = 1e-7


def divergence(
    student_logits: Tensor, teacher_logits: Tensor, objective: Objective, safety_tokens: Tensor, top_k: int
) -> Tensor:
    """The loss at each position.

    Args:
        student_logits: (positions, vocabulary) float32.
        teacher_logits: (positions, vocabulary) float32, no gradient.
        objective: one of `OBJECTIVES`.
        safety_tokens: (K,) int64 token ids; not used by `full` and `top-k`.
        top_k: how many of the teacher's likeliest tokens `top-k` looks at.

    Returns:
        (positions,) float32, nats.
    """
    student_norm = student_logits.logsumexp(-1, keepdim=True)
    teacher_norm = teacher_logits.logsumexp(-1, keepdim=True)
    if objective == "full":
        log_p, log_q = student_logits - student_norm, teacher_logits - teacher_norm
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if objective == "top-k":
        columns = teacher_logits.topk(min(top_k, teacher_logits.shape[-1]), dim=-1).indices
        log_p = student_logits.gather(-1, columns) - student_norm
        log_q = teacher_logits.gather(-1, columns) - teacher_norm
    else:
        log_p = student_logits[:, safety_tokens] - student_norm
        log_q = teacher_logits[:, safety_tokens] - teacher_norm
    p, q = log_p.exp(), log_q.exp()
    sliced = (p * (log_p - log_q)).sum(-1)
    if objective == "paper":
        return sliced
    p_mass, q_mass = p.sum(-1), q.sum(-1)
    if objective == "generalized":
        return sliced - p_mass + q_mass
    p_rest = (1 - p_mass).clamp_min(_SMALLEST_REST)
    q_rest = (1 - q_mass).clamp_min(_SMALLEST_REST)
    if objective == "forward":
        return (q * (log_q - log_p)).sum(-1) + q_rest * (q_rest.log() - p_rest.log())
    return sliced + p_rest * (p_rest.log() - q_rest.log())


class _ChunkedSum(torch.autograd.Function):
    """sum_i weight_i * loss_i, whose gradient is taken chunk by chunk during the forward.

    The LM head is frozen, so the only gradient needed is that of the student's hidden states. Taking it while a chunk's
    logits exist costs one head product less than recomputing them in backward, and holds the same one chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        weights: Tensor,
        head: Callable[[Tensor], Tensor],
        loss: Callable[[Tensor, Tensor], Tensor],
        chunk: int,
    ) -> Tensor:
        """The sum, a float32 scalar; arguments as in `chunked_divergence`."""
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        gradient = torch.zeros_like(student)
        for start in range(0, student.shape[0], chunk):
            rows = slice(start, start + chunk)
            with torch.no_grad():
                teacher_logits = head(teacher[rows]).float()
            with torch.enable_grad():
                hidden = student[rows].detach().requires_grad_(True)
                part = (loss(head(hidden).float(), teacher_logits) * weights[rows]).sum()
                (gradient[rows],) = torch.autograd.grad(part, hidden)
            total += part.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        """The gradient of `student`, in its shape and dtype; nothing else has one."""
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None, None, None


def chunked_divergence(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weights: Tensor,
    head: Callable[[Tensor], Tensor],
    objective: Objective,
    safety_tokens: Tensor,
    top_k: int,
    chunk: int,
) -> Tensor:
    """The weighted sum of `divergence` over positions, with at most `chunk` positions' logits in memory at a time.

    Args:
        student_hidden: (positions, width) final hidden states, with gradient.
        teacher_hidden: (positions, width), no gradient.
        weights: (positions,) float32; `position_weights` makes the authors' mean of means.
        head: the LM head, (n, width) to (n, vocabulary).
        objective, safety_tokens, top_k: as in `divergence`.
        chunk: positions at a time.

    Returns:
        A scalar, float32, nats.
    """

    def loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return divergence(student_logits, teacher_logits, objective, safety_tokens, top_k)

    result: Tensor = _ChunkedSum.apply(student_hidden, teacher_hidden, weights, head, loss, chunk)
    return result


def refusal_score_rise(student_logits: Tensor, base_logits: Tensor, refusal_tokens: Tensor) -> Tensor:
    """Half the squared rise of the refusal score, which is the log-odds that an answer opens with a refusal; 0 for a fall.

    The KL of an everyday prompt hardly sees a refusal that becomes ten times likelier while it stays unlikely, so it
    lets the score drift up everywhere, and prompts on which answers compete closely flip. Here a rise counts alike
    wherever the score begins. A fall costs nothing: a harmless prompt that is refused less is no harm, and it is the KL
    that keeps the answer the base's.

    Args:
        student_logits: (prompts, vocabulary), at the first position of the answer.
        base_logits: the same of the base, no gradient.
        refusal_tokens: (n,) int64, tokens that open a refusal.

    Returns:
        (prompts,) float32, squared nats.
    """
    shift = refusal_score(student_logits, refusal_tokens) - refusal_score(base_logits, refusal_tokens)
    return shift.clamp(min=0).square() / 2


def position_weights(mask: Tensor, rollouts: int, half_life: float = 0.0) -> Tensor:
    """Weights of the mean over valid positions, then over rollouts.

    Args:
        mask: (batch, length) bool, True at valid positions.
        rollouts: rollouts in the whole optimizer step, of which this batch may be a part.
        half_life: tokens after which a position counts half as much, because whether an answer refuses is decided in its
            first words; 0 counts all alike, which is the paper's mean.

    Returns:
        (valid positions,) float32, in the order of `tensor[mask]`.
    """
    each = mask.float()
    if half_life:
        each = each * 0.5 ** (torch.arange(mask.shape[1], device=mask.device) / half_life)
    each = each / each.sum(-1, keepdim=True).clamp_min(torch.finfo(each.dtype).tiny)
    return each[mask] / rollouts

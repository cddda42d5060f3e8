"""Whether two processes have loaded the same model: the same adapter, and the same expectations after a few prompts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from safesteer_lite.errors import SelfCheckError
from safesteer_lite.method import policies
from safesteer_lite.models.adapter import adapter_tensors
from safesteer_lite.prompts.plan import texts
from safesteer_lite.stages.direction import load_steering
from safesteer_lite.stages.prompted import taught_batches
from safesteer_lite.stages.session import Session

LARGEST_KL = 0.05
"""Nats, the mean over the prompts: kernels round differently, and nothing else may differ."""
_PROMPTS_A_KIND = 4
# bf16 keeps 8 bits: a library may hold the same adapter in it or in float32.
_ROUNDING = 2**-7


def expectations(session: Session) -> dict[str, Tensor]:
    """What the loaded model is to be known by.

    Returns:
        The log-probabilities of the first token of an answer, (prompts, vocabulary) float32, under `student` and `teacher`;
        and every weight of the adapter, by name. All on the CPU.
    """
    policy, steer = session.policy, load_steering(session)
    harmful, harmless = session.prompts.training(), session.prompts.direction()[1]
    prompts = texts([*harmful[:_PROMPTS_A_KIND], *harmless[:_PROMPTS_A_KIND]])
    batches = [policy.encode(prompt) for prompt in prompts]
    told = taught_batches(session, prompts) or batches
    with torch.no_grad():
        student = [policies.last_logits(policy.model, batch).log_softmax(-1) for batch in batches]
        with policies.teacher(policy.model, steer):
            teacher = [policies.last_logits(policy.model, batch).log_softmax(-1) for batch in told]
    return {
        "student": torch.cat(student).cpu(),
        "teacher": torch.cat(teacher).cpu(),
        **adapter_tensors(policy.model),
    }


def check_likeness(known: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Compare the expectations of two processes.

    Args:
        known: of the process that trusts its model.
        found: of the other.

    Returns:
        How far apart they are, as a part of a sentence.

    Raises:
        SelfCheckError: farther than rounding explains.
    """
    if strange := sorted(known.keys() ^ found.keys()):
        raise SelfCheckError(f"its adapter is another one: only one of the two has {strange[0]}")
    divergences = []
    for name, value in known.items():
        if name in ("student", "teacher"):
            divergences.append(float((value.exp() * (value - found[name])).sum(-1).mean()))
        elif not torch.allclose(value.float(), found[name].float(), rtol=_ROUNDING, atol=0):
            raise SelfCheckError(f"its adapter is another one: {name} has other values")
    largest, prompts = max(divergences), len(known["student"])
    if not largest <= LARGEST_KL:
        raise SelfCheckError(
            f"student or teacher is {largest:.3f} nats from that of plain transformers on {prompts} prompts"
        )
    # A rounded sum may come out below zero.
    return f"student and teacher are within {max(largest, 0):.4f} nats of plain transformers on {prompts} prompts"

"""The checks at the start of every run: does this model, as loaded here, do what the method assumes?

They take a second or two, and a run that fails one stops before it trains on wrong figures.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from safesteer_lite.errors import SelfCheckError
from safesteer_lite.method import policies, steering
from safesteer_lite.method.policies import Batch, Steering, pad_left
from safesteer_lite.models.assistant import Policy

# Nats; bf16 rounding leaves a hundredth of it, and attention to padding or to later tokens far more.
_LARGEST_PADDING_KL = 0.1

# Nats between two ways to the same logits on a card, where kernels add up in another order for another shape; on a CPU both give
# the same bits.
_LARGEST_ROUNDING_KL = 1e-3

# Far above rounding, far below what adding a vector as long as the residual itself does to the logits.
_SMALLEST_MOVE = 1e-3

# What is added to the adapter's weights until the model tells it from none.
_SWITCH_SIZES = (0.01, 0.1, 1.0)


def self_check(policy: Policy) -> list[str]:
    """Run all checks.

    Returns:
        One sentence for each check that passed.

    Raises:
        SelfCheckError: naming the check that failed.
    """
    model, batch = policy.model, policy.prompt("Say hello.")
    layer = len(model.layers) // 2
    exactly = f"within {_LARGEST_ROUNDING_KL:g} nats" if model.device.type == "cuda" else "bit for bit"
    passed = []

    with torch.no_grad():
        _check_finite(_full_forward(policy, batch))
        model.generate(batch, 2, 1.0, torch.Generator().manual_seed(0), 2)
        plain = policies.last_logits(model, batch)
        full = _full_forward(policy, batch)
        _require(same_logits(plain, full), "running the blocks one by one differs from the model's own forward")
        passed.append(f"running the blocks one by one equals the model's own forward, {exactly}")
        _check_padding(policy)
        passed.append("a prompt reads the same beside a longer one")

        residual = model.advance(model.start(batch), layer).hidden
        vector = torch.full((residual.shape[-1],), float(residual[:, -1].float().norm()) / residual.shape[-1] ** 0.5)
        with steering.count_calls(model.layers, layer) as calls:
            _full_forward(policy, batch)
        _require(
            len(calls) == 1 and calls[0][:2] == batch.input_ids.shape,
            f"the hook on block {layer} fired {len(calls)} times in one full forward",
        )
        passed.append("a steering hook fires once in a full forward")

        steer = Steering(layer, vector)
        with policies.teacher(model, steer):
            steered = _full_forward(policy, batch)
        moved = float((steered - full).abs().max())
        _require(moved > _SMALLEST_MOVE, "steering does not move the logits")
        _check_sampling(policy, batch, steer, int(steered.argmax()))
        passed.append(f"steering moves the logits (by up to {moved:.1f}), in sampling too")

        with policies.base(model):
            base = _full_forward(policy, batch)
        _require(same_logits(base, full), "switching the adapter off changes a model whose adapter is still zero")
        _check_switch(policy, batch, base)
        passed.append(f"with the adapter off, the model is the base, {exactly}")

    _check_gradients(policy, batch)
    passed.append("every adapted layer receives gradients after sampling")
    return passed


def stays_finite(policy: Policy) -> bool:
    """Whether logits and gradients are numbers on an ordinary prompt; fp16 ends at 65,504, and some models go beyond."""
    parameters = policy.model.parameters_to_train()
    logits = policies.last_logits(policy.model, policy.prompt("Say hello."))
    gradients = torch.autograd.grad(logits.logsumexp(-1).sum(), parameters, allow_unused=True)
    return all(bool(value.isfinite().all()) for value in (logits, *gradients) if value is not None)


def same_logits(found: torch.Tensor, known: torch.Tensor) -> bool:
    """Whether two ways came to the same logits: to the last bit on a CPU, to rounding on a card.

    Args:
        found, known: (batch, vocabulary) float32, finite.
    """
    return within_rounding(found, known) if found.device.type == "cuda" else torch.equal(found, known)


def within_rounding(found: torch.Tensor, known: torch.Tensor) -> bool:
    """Whether two ways came to the same logits but for what kernels round; arguments as `same_logits` has them."""
    log_known, log_found = known.log_softmax(-1), found.log_softmax(-1)
    return float((log_known.exp() * (log_known - log_found)).sum(-1).max()) < _LARGEST_ROUNDING_KL


def _check_finite(logits: torch.Tensor) -> None:
    """What is not finite equals nothing, not even itself: every later check would fail for a reason that is none."""
    if not bool(logits.isfinite().all()):
        raise SelfCheckError(
            f"The model computes values that are not numbers ({int((~logits.isfinite()).sum()):,} of "
            f"{logits.numel():,} after an ordinary prompt).",
            "Nothing was trained. Its weights are damaged, or too large for this precision: copy or download the model again, "
            "or try model.precision=fp32.",
        )


def _full_forward(policy: Policy, batch: Batch) -> torch.Tensor:
    """Last-position logits through the model's own forward, as a user would call it."""
    model = policy.model
    positions = (batch.attention_mask.cumsum(-1) - 1).clamp_min(0)
    hidden = model.decoder(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions, use_cache=False
    )[0]
    return model.logits(hidden[:, -1]).float()


def _check_padding(policy: Policy) -> None:
    """Alone, a prompt needs no mask at all, and some kernels are not causal then; padded, it needs one."""
    prompts = [policy.prompt(text) for text in ("Say hello.", "Tell me how rivers find their way to the sea.")]
    padded = replace(pad_left(prompts), prefix=0)
    together = policies.last_logits(policy.model, padded)[:1].log_softmax(-1)
    alone = policies.last_logits(policy.model, prompts[0]).log_softmax(-1)
    kl = float((alone.exp() * (alone - together)).sum())
    _require(kl < _LARGEST_PADDING_KL, f"padding changes what a prompt reads as, by {kl:.2f} nats")


def _check_sampling(policy: Policy, batch: Batch, steer: Steering, likeliest: int) -> None:
    """Sampling must be steered at the prompt and at each later token, which some backends decode on another path."""
    model = policy.model
    with policies.teacher(model, steer):
        greedy = model.generate(batch, 1, 0.0, None, 1)
        with steering.count_calls(model.layers, steer.layer) as calls:
            # Sampled hot, so that some row goes on after its first token.
            hot = model.generate(batch, 3, 5.0, torch.Generator().manual_seed(0), 4)
    _require(
        int(greedy.tokens[0, 0]) == likeliest and len(calls) == hot.tokens.shape[1], "sampling ignores the steering"
    )


def _check_switch(policy: Policy, batch: Batch, base: torch.Tensor) -> None:
    """While the adapter is zero nobody can tell whether it is off, so it is given values for a moment: larger ones where the
    model takes the smaller for rounding, as a small or very certain one does on a card."""
    model = policy.model
    parameters = model.parameters_to_train()
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        for size in _SWITCH_SIZES:
            for parameter in parameters:
                parameter.add_(size)
            student = _full_forward(policy, batch)
            if changes := not same_logits(student, base):
                break
        with policies.base(model):
            off = _full_forward(policy, batch)
    finally:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    _require(changes, "the adapter does not change the model")
    _require(same_logits(off, base), "switching the adapter off does not give the base")


def _check_gradients(policy: Policy, batch: Batch) -> None:
    """LoRA starts with B = 0, where A has no gradient: B's gradients show whether autograd reaches a layer."""
    model = policy.model
    policies.last_logits(model, batch).logsumexp(-1).sum().backward()
    dead = [
        name
        for name, parameter in model.network.named_parameters()
        if parameter.requires_grad
        and "lora_B" in name
        and (parameter.grad is None or not bool(parameter.grad.abs().sum() > 0))
    ]
    for parameter in model.parameters_to_train():
        parameter.grad = None
    _require(not dead, f"{len(dead)} adapted layers receive no gradient, the first is {dead[0] if dead else ''}")


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise SelfCheckError(
            f"The start-up self-check failed: {problem}.",
            "Nothing was trained. Try model.backend=plain or model.precision=bf16; else report the versions `doctor` shows.",
        )

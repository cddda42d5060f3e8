"""The policy of a run: the base loaded as decided, with a fresh adapter, and checked before it is trusted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import date

from safesteer_lite.config import RunConfig
from safesteer_lite.config.sections import Thinking
from safesteer_lite.hardware.backend import Decision
from safesteer_lite.hardware.machine import use_card
from safesteer_lite.hardware.peaks import Demand
from safesteer_lite.method.memory import release
from safesteer_lite.models import plain, unsloth
from safesteer_lite.models.adapter import Adapter, with_adapter
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.loaded import PlainModel
from safesteer_lite.models.selfcheck import self_check, stays_finite
from safesteer_lite.models.template import ChatTemplate, stop_ids
from safesteer_lite.sources.base import Base, check_values

Note = Callable[[str], None]


def load_policy(
    base: Base, decision: Decision, config: RunConfig, day: date, note: Note, library: str = "plain"
) -> Policy:
    """Load a model with a fresh adapter (B = 0, so the student starts as the base).

    Args:
        base: the model.
        decision: how it is loaded on this machine.
        config: all settings.
        day: what a chat template that asks the date is told.
        note: is told each choice with its reason, and what was checked.
        library: `plain`, or `unsloth` in the process that trains with it.

    Raises:
        ModelError: it cannot be loaded.
        SelfCheckError: loaded, it does not behave as the method needs.
    """
    check_values(base)
    check_template(base, day, config.model.thinking)
    note(decision.reason)
    note(decision.library.reason)
    policy = _loaded(base, decision, config, day, library)
    if decision.compute_dtype == "fp16" and not stays_finite(policy):
        note(
            "In fp16 the model computes values that are not numbers, so it is loaded again and computed in fp32: slower."
        )
        del policy
        release()
        policy = _loaded(base, replace(decision, compute_dtype="fp32"), config, day, library)
    for remark in policy.notes:
        note(remark)
    passed = self_check(policy)
    note(f"Self-check: {len(passed)} of {len(passed)} passed ({'; '.join(passed)}).")
    return policy


def _loaded(base: Base, decision: Decision, config: RunConfig, day: date, library: str) -> Policy:
    use_card(decision.place)
    distill, layers = config.distill, base.shape.layers
    adapter = Adapter(distill.rank, distill.lora_alpha, min(layers - 1, round(distill.depth_start * layers)))
    if library == "unsloth":
        model: PlainModel = unsloth.load(base, decision.precision, adapter, config.seed, decision.place)
    else:
        network, tokenizer = plain.load(
            base,
            precision=decision.precision,
            device=decision.place,
            unpack=decision.unpack,
            compute=decision.compute_dtype,
        )
        model = with_adapter(network, tokenizer, adapter, config.seed)
    model.checkpointing = Demand.of(config).recomputes(decision.device)
    settings = config.model
    return Policy(model, config.prompts.prompt_tokens, day, settings.thinking, settings.thinking_tokens)


def check_template(base: Base, day: date | None = None, thinking: Thinking = "auto") -> ChatTemplate:
    """Try out how a model is prompted and what ends its answers, without its weights.

    Args:
        base: the model.
        day: what a chat template that asks the date is told; None for today.
        thinking: whether the model thinks before it answers.

    Raises:
        ModelError: the chat template will not do, or nothing ends an answer.
    """
    tokenizer = plain.load_tokenizer(base.words, base.config)
    with plain.loading(base.folder, "chat template"):
        stop_ids(tokenizer, base.generation.get("eos_token_id"), base.config.get("eos_token_id"))
        return ChatTemplate(tokenizer, day, thinking)

"""A guard: a language model whose chat template asks it to assess a prompt and its answer, and which writes what it finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

import torch
from torch import nn

from safesteer_lite.errors import ModelError
from safesteer_lite.method.memory import fitting
from safesteer_lite.method.policies import Batch, pad_left
from safesteer_lite.models import plain
from safesteer_lite.models.rendering import refuse_powers, run_template
from safesteer_lite.models.sampling import generate
from safesteer_lite.models.template import ids_of, unused_character
from safesteer_lite.sources.base import Base

_BATCH = 16
_TOKENS = 64
"""Tokens of an assessment, at most: three short lines."""


class Guard:
    """A loaded guard.

    Attributes:
        network: a causal language model in evaluation mode.
    """

    def __init__(self, network: nn.Module, tokenizer: Any) -> None:
        """Wrap a loaded guard.

        Args:
            network: a causal language model in evaluation mode.
            tokenizer: its tokenizer, padding on the left.

        Raises:
            ModelError: its chat template cannot be used, or nothing ends what it writes.
        """
        self.network: Any = network
        self._tokenizer = tokenizer
        self._template = tokenizer.chat_template
        if not isinstance(self._template, str):
            raise ModelError("The guard has several chat templates.", "Keep the one for moderation.")
        refuse_powers(self._template)
        named = getattr(self.network.generation_config, "eos_token_id", None)
        self._ends = ids_of(tokenizer.eos_token_id, named)
        if not self._ends:
            raise ModelError("Nothing says which token ends what the guard writes.", "Use another guard.")

    def assessments(self, prompts: Sequence[str], answers: Sequence[str], done: Callable[[int], None]) -> list[str]:
        """What the guard writes, greedily, about each answer to a prompt.

        Args:
            prompts: what was asked.
            answers: what was answered, as many.
            done: called with the number of assessments so far.

        Raises:
            ModelError: its chat template cannot write such a conversation.
        """
        encoded = [self._encode(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        order = sorted(range(len(encoded)), key=lambda place: len(encoded[place]))

        def assess(size: int) -> list[str]:
            found = [""] * len(encoded)
            for start in range(0, len(order), size):
                places = order[start : start + size]
                for place, text in zip(places, self._write([encoded[place] for place in places]), strict=True):
                    found[place] = text
                done(start + len(places))
            return found

        return fitting(_BATCH, assess)[0]

    def _encode(self, prompt: str, answer: str) -> list[int]:
        """The token ids of one conversation, in which tokens that mark turns come from the template alone."""
        mark = unused_character([self._template, prompt, answer])
        special = [token for token in self._tokenizer.all_special_tokens if len(token) > 1]
        turns = []
        for role, text in (("user", prompt), ("assistant", answer)):
            for token in special:
                text = text.replace(token, token[0] + mark + token[1:])
            turns.append({"role": role, "content": text})
        text = run_template(self._tokenizer, self._template, turns, date.today(), {"add_generation_prompt": True})
        return [
            token for part in text.split(mark) for token in self._tokenizer(part, add_special_tokens=False).input_ids
        ]

    def _write(self, rows: Sequence[Sequence[int]]) -> list[str]:
        device = self.network.device
        tensors = [torch.tensor([row], dtype=torch.long, device=device) for row in rows]
        completions = generate(
            self.network.model,
            self.network.lm_head,
            pad_left([Batch(tensor, torch.ones_like(tensor)) for tensor in tensors]),
            max_new_tokens=_TOKENS,
            temperature=0.0,
            chance=None,
            repeats=1,
            end_of_turn=self._ends,
            padding=min(self._ends),
        )
        return [
            self._tokenizer.decode(row[mask], skip_special_tokens=True)
            for row, mask in zip(completions.tokens, completions.mask, strict=True)
        ]


def load_guard(base: Base, device: str) -> Guard:
    """Load a guard: in bfloat16 on CUDA, in float32 elsewhere.

    Raises:
        ModelError: it cannot be loaded, or its chat template cannot be used.
    """
    precision = "bf16" if device.startswith("cuda") else "fp32"
    return Guard(*plain.load(base, precision=precision, device=device, unpack=False))

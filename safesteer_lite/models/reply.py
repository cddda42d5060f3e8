"""One answer in the making, token by token: what a chat shows while it grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from safesteer_lite.errors import ModelError
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.sampling import draw
from safesteer_lite.models.template import Message


class Reply:
    """One answer in the making. Every call of `step` belongs to the policy that is on at that moment."""

    def __init__(self, policy: Policy, messages: Sequence[Message], tokens: int, temperature: float, seed: int) -> None:
        """Prepare an answer; nothing is computed yet.

        Args:
            policy: the model.
            messages: the conversation so far; the last one is the user's.
            tokens: longest answer, without the thought before it.
            temperature: 0 takes the likeliest token each time.
            seed: of the sampling.

        Raises:
            ModelError: the chat template cannot write this conversation, or it is longer than the model can read.
        """
        self._policy = policy
        ids = policy.template.encode(messages)
        self._waiting = torch.tensor([ids], dtype=torch.long, device=policy.model.device)
        if policy.thoughts:
            tokens += policy.thoughts.tokens
        longest: int | None = getattr(policy.model.causal.config, "max_position_embeddings", None)
        if longest is not None and self._waiting.shape[1] + tokens > longest:
            tokens = longest - self._waiting.shape[1]
        if tokens < 1:
            raise ModelError("The conversation is longer than the model can read.", "Begin anew with /reset.")
        self._cache, self._read = policy.model.new_cache(), 0
        self._tokens, self._temperature = tokens, temperature
        self._generator = torch.Generator().manual_seed(seed)
        self._written: list[int] = []
        self.done = False

    @property
    def text(self) -> str:
        """What has been said so far, the thought before it too; half a character at the end is held back."""
        return self._policy.text(self._written).removesuffix("\ufffd")

    @torch.no_grad()
    def step(self) -> None:
        """Say one token more; nothing once the answer has ended."""
        if self.done:
            return
        model = self._policy.model
        read = self._read + self._waiting.shape[1]
        output: Any = model.decoder(
            input_ids=self._waiting,
            attention_mask=torch.ones(1, read, dtype=torch.long, device=self._waiting.device),
            position_ids=torch.arange(self._read, read, device=self._waiting.device).unsqueeze(0),
            past_key_values=self._cache.given,
            use_cache=True,
        )
        self._cache.take(output)
        self._read = read
        logits = model.logits(output[0][:, -1]).float()
        uniform = torch.rand(1, generator=self._generator).to(logits.device) if self._temperature else None
        chosen = draw(logits, self._temperature, uniform)
        token = int(chosen)
        ended = token in model.end_of_turn
        if not ended:
            self._written.append(token)
        self._waiting = chosen.unsqueeze(-1)
        self.done = ended or len(self._written) >= self._tokens

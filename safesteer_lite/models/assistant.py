"""One loaded model with its chat template: prompts in, answers out, for whichever policy is switched on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import torch
from torch import Tensor

from safesteer_lite.errors import ModelError
from safesteer_lite.method.memory import Result, fitting
from safesteer_lite.method.policies import Batch, Completions, completion_hidden, pad_left
from safesteer_lite.models.loaded import PlainModel
from safesteer_lite.models.sampling import Ended, draw
from safesteer_lite.models.template import ChatTemplate, Message, ids_of
from safesteer_lite.prompts.contexts import Conversation

Done = Callable[[int], None]


def ignore(done: int) -> None:
    """A progress callback that does nothing."""


class Policy:
    """A model that can be prompted as an assistant."""

    def __init__(self, model: PlainModel, prompt_tokens: int, day: date | None = None) -> None:
        """Wrap a loaded model.

        Args:
            model: base, teacher and student in one.
            prompt_tokens: longest prompt; longer ones lose tokens from the middle of the user's text.
            day: what a chat template that asks the date is told; None for today.

        Raises:
            ModelError: the model's chat template will not do; see `ChatTemplate`.
        """
        self.model = model
        self.tokenizer = model.tokenizer
        self.template = ChatTemplate(model.tokenizer, day)
        self.prompt_tokens = prompt_tokens
        self._prefix, self.template_positions = self._template_around()
        # Sequences at a time that fitted in memory where fewer than asked for did, by the longest answer.
        self._fitted: dict[int, int] = {}

    @property
    def notes(self) -> list[str]:
        """A sentence for each thing about prompts and answers that a user should know."""
        end, named = self.template.end, ids_of(getattr(self.model.causal.generation_config, "eos_token_id", None))
        if end is None or end in named or end == self.tokenizer.eos_token_id:
            return self.template.notes
        token = self.tokenizer.convert_ids_to_tokens(end)
        return [
            *self.template.notes,
            f"The model's settings do not say that {token} ends an answer, but its chat template does: answers end there.",
        ]

    def encode(self, asked: str | Conversation) -> Batch:
        """What is asked, chat-templated, as a batch of one without padding.

        Args:
            asked: a prompt, which gets no system prompt unless the template adds one, or a conversation. Of what is
                longer than `prompt_tokens`, the user's last turn loses its middle.

        Raises:
            ModelError: too little room is left for the user's last turn.
        """
        conversation = Conversation(asked) if isinstance(asked, str) else asked
        ids = self._template_ids(conversation)
        if len(ids) > self.prompt_tokens:
            text = self.tokenizer(conversation.prompt, add_special_tokens=False).input_ids
            room = self.prompt_tokens - (len(ids) - len(text))
            if room < 1:
                around = "alone takes" if isinstance(asked, str) else "and what is said before the prompt take"
                raise ModelError(
                    f"The chat template {around} {len(ids) - len(text)} tokens, the limit is {self.prompt_tokens}.",
                    "Raise prompts.prompt_tokens.",
                )
            cut = self.tokenizer.decode(text[: room // 2] + text[len(text) - (room - room // 2) :])
            ids = self._template_ids(replace(conversation, prompt=cut))
        tensor = torch.tensor([ids], dtype=torch.long, device=self.model.device)
        prefix = len(self._prefix) if ids[: len(self._prefix)] == self._prefix else 0
        return Batch(tensor, torch.ones_like(tensor), prefix)

    def fits(self, asked: str | Conversation) -> bool:
        """Whether what is asked has at most `prompt_tokens` tokens with its template, so that `encode` cuts nothing."""
        conversation = Conversation(asked) if isinstance(asked, str) else asked
        return len(self._template_ids(conversation)) <= self.prompt_tokens

    def too_long(self, prompts: Sequence[str]) -> int:
        """How many prompts have more than `prompt_tokens` tokens with their template, so that `encode` cuts them."""
        room = self.prompt_tokens - len(self._template_ids(Conversation("x")))
        # No tokenizer makes more tokens of a text than it has bytes, which spares most texts being tokenized.
        doubtful = [prompt for prompt in prompts if len(prompt.encode()) > room]
        return sum(not self.fits(prompt) for prompt in doubtful)

    def batches(self, prompts: Sequence[str | Conversation], size: int) -> Iterator[tuple[list[int], Batch]]:
        """Left-padded batches of similar length, each with the places of its prompts in `prompts`."""
        encoded = [self.encode(prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda place: (encoded[place].input_ids.shape[1], place))
        for start in range(0, len(order), size):
            places = order[start : start + size]
            yield places, pad_left([encoded[place] for place in places])

    def answers(
        self,
        prompts: Sequence[str | Conversation],
        tokens: int,
        size: int,
        done: Done = ignore,
        ended: Ended | None = None,
    ) -> list[str]:
        """Greedy answers of at most `tokens` tokens, in the order of `prompts`; `size` prompts at a time, or fewer
        where memory is short. Of an answer that had begun, what follows its beginning. `ended` may end them earlier."""

        def answer(size: int) -> list[str]:
            found = [""] * len(prompts)
            finished = 0
            for places, batch in self.batches(prompts, size):
                completions = self.model.generate(batch, tokens, 0.0, None, 1, ended)
                for place, text in zip(places, self.decode(completions), strict=True):
                    found[place] = text
                finished += len(places)
                done(finished)
            return found

        return self.fitting(tokens, size, answer)

    def fitting(self, tokens: int, size: int, work: Callable[[int], Result], samples: int = 1) -> Result:
        """`work(size)`, or with fewer prompts at a time where memory is short, which is remembered for the next call.

        Args:
            tokens: longest answer, 0 where prompts are read only; what did not fit for some is not tried again for as many or
                more.
            size: prompts at a time.
            work: must do the same whenever it is called again.
            samples: sequences that each prompt stands for.
        """
        known = [fitted // samples for length, fitted in self._fitted.items() if length <= tokens]
        found, fitted = fitting(max(1, min([size, *known])), work)
        if fitted < size:
            self._fitted[tokens] = fitted * samples
        return found

    def first_block_ended(self) -> Ended:
        """Tells which answers have closed a fenced block of code, for which a reader of that block need not wait longer.

        Fences are counted in whole tokens. One that a model spells with several is not seen, and its answer goes on.
        """
        fences = [token for text, token in self.tokenizer.get_vocab().items() if "```" in text]
        known = torch.tensor(sorted(fences), dtype=torch.long, device=self.model.device)
        return lambda tokens: torch.isin(tokens, known).sum(-1) >= 2

    def decode(self, completions: Completions) -> list[str]:
        """Completions as text, without special tokens."""
        tokens, mask = completions.tokens.cpu(), completions.mask.cpu()
        return [
            self.tokenizer.decode(row[kept], skip_special_tokens=True) for row, kept in zip(tokens, mask, strict=True)
        ]

    def token_ids(self, openings: Sequence[str]) -> Tensor:
        """The first token of each string in this model's own vocabulary, each id once, ascending."""
        ids = {self.tokenizer(text, add_special_tokens=False).input_ids[0] for text in openings}
        return torch.tensor(sorted(ids), dtype=torch.long, device=self.model.device)

    def _template_ids(self, asked: Conversation) -> list[int]:
        return self.template.encode(asked.messages, asked.beginning)

    def _template_around(self) -> tuple[list[int], int]:
        """What the template puts around the user's text, read off two different prompts: the tokens that every prompt
        begins with (system prompt, opening of the user's turn), and how many tokens it ends in."""
        first, second = (
            self._template_ids(Conversation(text)) for text in ("Tell me about rivers", "What is in 7x9 = ?!")
        )
        ending = _common(first[::-1], second[::-1])
        if ending == 0:
            raise ModelError(
                "The chat template adds nothing after the user's text.", "Use a model whose template opens the answer."
            )
        return first[: _common(first, second)], ending


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading elements two sequences have in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


@dataclass(frozen=True)
class Reference:
    """One policy's own answers to harmless prompts, and its hidden states along them, to measure KL against.

    Attributes:
        batches: prompts with their answers.
        hidden: that policy's final hidden states at the answer's valid positions, one (positions, width) tensor a batch.
    """

    batches: list[tuple[Batch, Completions]]
    hidden: list[Tensor]

    @property
    def positions(self) -> int:
        """How many answer tokens the measurement rests on."""
        return sum(tensor.shape[0] for tensor in self.hidden)


def reference_answers(policy: Policy, prompts: Sequence[str], tokens: int, size: int, done: Done = ignore) -> Reference:
    """Greedy answers of whichever policy is on, and its hidden states along them; `size` prompts at a time, or fewer
    where memory is short."""
    model = policy.model

    def read(size: int) -> Reference:
        pairs, hidden, finished = [], [], 0
        for places, batch in policy.batches(prompts, size):
            completions = model.generate(batch, tokens, 0.0, None, 1)
            states = completion_hidden(model, model.start(completions.after(batch)), completions.tokens.shape[1])
            pairs.append((batch, completions))
            hidden.append(states[completions.mask])
            finished += len(places)
            done(finished)
        return Reference(pairs, hidden)

    with torch.no_grad():
        return policy.fitting(tokens, size, read)


def kl_to_reference(policy: Policy, reference: Reference, chunk: int) -> float:
    """Mean KL(reference || policy) over all tokens of the reference's answers, nats a token.

    Whole answers, because damage hides behind the first token. Both policies must share the LM head.
    """
    model, total = policy.model, 0.0
    with torch.no_grad():
        for (batch, completions), known in zip(reference.batches, reference.hidden, strict=True):
            states = completion_hidden(model, model.start(completions.after(batch)), completions.tokens.shape[1])
            total += kl_of_states(known, states[completions.mask], model.logits, chunk)
    return max(total, 0.0) / max(reference.positions, 1)


def kl_of_states(known: Tensor, now: Tensor, head: Callable[[Tensor], Tensor], chunk: int) -> float:
    """KL(known || now) summed over positions, nats.

    Args:
        known, now: (positions, width) final hidden states.
        head: the LM head that both share, (n, width) to (n, vocabulary).
        chunk: positions whose logits exist at a time.
    """
    total = 0.0
    for before, after in zip(known.split(chunk), now.split(chunk), strict=True):
        log_known, log_now = head(before).float().log_softmax(-1), head(after).float().log_softmax(-1)
        total += float((log_known.exp() * (log_known - log_now)).sum())
    return total


class Reply:
    """One answer in the making. Every call of `step` belongs to the policy that is on at that moment."""

    def __init__(self, policy: Policy, messages: Sequence[Message], tokens: int, temperature: float, seed: int) -> None:
        """Prepare an answer; nothing is computed yet.

        Args:
            policy: the model.
            messages: the conversation so far; the last one is the user's.
            tokens: longest answer.
            temperature: 0 takes the likeliest token each time.
            seed: of the sampling.

        Raises:
            ModelError: the chat template cannot write this conversation, or it is longer than the model can read.
        """
        self._policy = policy
        ids = policy.template.encode(messages)
        self._waiting = torch.tensor([ids], dtype=torch.long, device=policy.model.device)
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
        """What has been said so far; half a character at the end is held back."""
        text: str = self._policy.tokenizer.decode(self._written, skip_special_tokens=True)
        return text.removesuffix("\ufffd")

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

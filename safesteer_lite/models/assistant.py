"""One loaded model with its chat template: prompts in, answers out, for whichever policy is switched on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date

import torch
from torch import Tensor

from safesteer_lite.config.sections import Thinking
from safesteer_lite.errors import ModelError
from safesteer_lite.method.memory import Result, fitting
from safesteer_lite.method.policies import Batch, Completions, pad_left
from safesteer_lite.models.loaded import PlainModel
from safesteer_lite.models.sampling import Ended
from safesteer_lite.models.template import ChatTemplate, ids_of
from safesteer_lite.models.thoughts import Thoughts
from safesteer_lite.prompts.contexts import Conversation

Done = Callable[[int], None]


def ignore(done: int) -> None:
    """A progress callback that does nothing."""


@dataclass(frozen=True)
class Written:
    """A batch of answers as a model wrote it.

    Attributes:
        places: of its prompts among all that were asked.
        prompts: what it read, left-padded.
        completions: what it wrote.
        first: what was made of the logits of each answer's first token; None where nothing was.
    """

    places: list[int]
    prompts: Batch
    completions: Completions
    first: Tensor | None


@dataclass(frozen=True)
class _Part:
    """Prompts that are answered alike.

    Attributes:
        prompts: as the model reads them, by their place among all that are asked.
        tokens: of an answer, at most.
        ended: may end answers earlier.
        opened: whether the answer may go on with a thought that the prompt has opened.
    """

    prompts: dict[int, Batch]
    tokens: int
    ended: Ended | None
    opened: bool


class Policy:
    """A model that can be prompted as an assistant.

    Where the model thinks first, it is judged by what it thinks and answers itself (`answers`); whatever is computed at the
    positions of an answer (`encode`, `batches`) stands behind the base's own thought, which is part of the prompt then.
    """

    def __init__(
        self,
        model: PlainModel,
        prompt_tokens: int,
        day: date | None = None,
        thinking: Thinking = "auto",
        thought_tokens: int = 512,
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: base, teacher and student in one.
            prompt_tokens: longest prompt; longer ones lose tokens from the middle of the user's text.
            day: what a chat template that asks the date is told; None for today.
            thinking: whether the model thinks before it answers.
            thought_tokens: longest thought.

        Raises:
            ModelError: the model's chat template will not do; see `ChatTemplate`.
        """
        self.model = model
        self.tokenizer = model.tokenizer
        self.template = ChatTemplate(model.tokenizer, day, thinking)
        marks = self.template.marks
        self.thoughts = Thoughts(marks, model.tokenizer, thought_tokens) if marks else None
        self.prompt_tokens = prompt_tokens
        self._prefix, self.template_positions = self._template_around()
        self.fitted: dict[int, int] = {}
        """Sequences at a time that fitted in memory where fewer than asked for did, by the longest answer."""

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
        """What is asked, chat-templated, up to where the answer begins, as a batch of one without padding: behind the
        base's own thought where the model thinks.

        Raises:
            ModelError: as `prompt`.
        """
        self.think([asked], 1)
        return self._behind_thought(_conversation(asked))

    def prompt(self, asked: str | Conversation) -> Batch:
        """What is asked, chat-templated, up to where the model begins to write, as a batch of one without padding.

        Args:
            asked: a prompt, which gets no system prompt unless the template adds one, or a conversation. Of what is
                longer than `prompt_tokens`, the user's last turn loses its middle.

        Raises:
            ModelError: too little room is left for the user's last turn.
        """
        conversation = _conversation(asked)
        ids = self._template_ids(conversation)
        if len(ids) > self.prompt_tokens:
            text = self.tokenizer(conversation.prompt, add_special_tokens=False).input_ids
            room = self.prompt_tokens - (len(ids) - len(text))
            if room < 1:
                alone = conversation == Conversation(conversation.prompt)
                around = "alone takes" if alone else "and what is said before the prompt take"
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
        """Whether what is asked has at most `prompt_tokens` tokens with its template, so that `prompt` cuts nothing."""
        return len(self._template_ids(_conversation(asked))) <= self.prompt_tokens

    def too_long(self, prompts: Sequence[str]) -> int:
        """How many prompts have more than `prompt_tokens` tokens with their template, so that `prompt` cuts them."""
        room = self.prompt_tokens - len(self._template_ids(Conversation("x")))
        # No tokenizer makes more tokens of a text than it has bytes, which spares most texts being tokenized.
        doubtful = [prompt for prompt in prompts if len(prompt.encode()) > room]
        return sum(not self.fits(prompt) for prompt in doubtful)

    def batches(self, prompts: Sequence[str | Conversation], size: int) -> Iterator[tuple[list[int], Batch]]:
        """Left-padded batches of similar length, each with the places of its prompts in `prompts`; each prompt up to where
        its answer begins, as `encode` has it."""
        self.think(prompts, size)
        return _batches([self._behind_thought(_conversation(prompt)) for prompt in prompts], size)

    def think(self, prompts: Sequence[str | Conversation], size: int, done: Done = ignore) -> int:
        """Let the base think about prompts of which its thoughts are not known; nothing where the model does not think.

        Not to be called while the model is steered.

        Args:
            prompts: what is asked. An answer that was begun stands behind an empty thought.
            size: prompts at a time, or fewer where memory is short.
            done: called with the number of prompts so far.

        Returns:
            How many of these thoughts were cut at the longest length, and closed there.
        """
        thoughts = self.thoughts
        if thoughts is None:
            return 0
        asked = [entry for entry in dict.fromkeys(map(_conversation, prompts)) if not entry.beginning]
        missing = [entry for entry in asked if entry not in thoughts.known]
        if not missing:
            return 0

        def write(size: int) -> dict[Conversation, tuple[list[int], bool]]:
            found = {}
            for places, batch in _batches([self.prompt(entry) for entry in missing], size):
                written = self.model.generate(batch, thoughts.tokens, 0.0, None, 1, thoughts.ended)
                for place, ids in zip(places, _rows(written), strict=True):
                    kept = [index for index in ids if index not in self.model.end_of_turn]
                    found[missing[place]] = thoughts.before_answer(kept)
                done(len(found))
            return found

        with self.model.adapters_off():
            found = self.fitting(thoughts.tokens, size, write)
        thoughts.known.update({entry: ids for entry, (ids, _) in found.items()})
        return sum(not finished for _, finished in found.values())

    def answers(
        self,
        prompts: Sequence[str | Conversation],
        tokens: int,
        size: int,
        done: Done = ignore,
        ended: Ended | None = None,
        *,
        thinks: bool = True,
    ) -> list[str]:
        """Greedy answers, in the order of `prompts`.

        Of a model that thinks, its thought comes first, between `thinking.OPENING` and `thinking.CLOSING`, and is not counted
        among the tokens of its answer.

        Args:
            prompts: what is asked. Of an answer that was begun, what follows the beginning is returned.
            tokens: of an answer, at most.
            size: prompts at a time, or fewer where memory is short.
            done: called with the number of answers so far.
            ended: may end answers earlier.
            thinks: False to go on from what the base thought of a prompt, instead of thinking anew.
        """
        thoughts = self.thoughts if thinks else None
        if thoughts is None:
            return self.looked_at(prompts, tokens, size, _nothing, done=done, ended=ended)[0]
        asked = [_conversation(prompt) for prompt in prompts]
        # An answer that was begun has left its thought behind.
        begun = [place for place, conversation in enumerate(asked) if conversation.beginning]
        free = [place for place, conversation in enumerate(asked) if not conversation.beginning]
        ends = thoughts.answered(tokens, ended)
        parts = [
            _Part({place: self.prompt(asked[place]) for place in free}, tokens + thoughts.tokens, ends, opened=True),
            _Part({place: self._behind_thought(asked[place]) for place in begun}, tokens, ended, opened=False),
        ]
        return self._written(parts, size, _nothing, None, done)[0]

    def looked_at(
        self,
        prompts: Sequence[str | Conversation],
        tokens: int,
        size: int,
        look: Callable[[Written], Result],
        read_first: Callable[[Tensor], Tensor] | None = None,
        done: Done = ignore,
        ended: Ended | None = None,
    ) -> tuple[list[str], list[Result]]:
        """Greedy answers, behind the base's own thought where the model thinks, and what is to be known of each batch of them.

        Args:
            prompts, tokens, size, done, ended: as for `answers`.
            look: is given each batch as it was written.
            read_first: makes `Written.first` of the logits of first tokens, (prompts, vocabulary) float32, which are too
                large to be kept.

        Returns:
            The answers in the order of `prompts`, and what `look` returned, a batch each.
        """
        asked = [_conversation(prompt) for prompt in prompts]
        self.think(asked, size)
        encoded = {place: self._behind_thought(conversation) for place, conversation in enumerate(asked)}
        return self._written([_Part(encoded, tokens, ended, opened=False)], size, look, read_first, done)

    def _written(
        self,
        parts: Sequence[_Part],
        size: int,
        look: Callable[[Written], Result],
        read_first: Callable[[Tensor], Tensor] | None,
        done: Done,
    ) -> tuple[list[str], list[Result]]:
        """The answers of all parts, in the order of their places, and what `look` made of each batch."""

        def write(size: int) -> tuple[list[str], list[Result]]:
            found: dict[int, str] = {}
            looked: list[Result] = []
            for part in parts:
                chosen = list(part.prompts)
                for rows, batch in _batches(list(part.prompts.values()), size):
                    first: list[Tensor] = []
                    reads = _reading_into(first, read_first) if read_first else None
                    completions = self.model.generate(batch, part.tokens, 0.0, None, 1, part.ended, reads)
                    places = [chosen[row] for row in rows]
                    found.update(zip(places, self.decode(completions, opened=part.opened), strict=True))
                    looked.append(look(Written(places, batch, completions, first[0] if first else None)))
                    done(len(found))
            return [found[place] for place in sorted(found)], looked

        return self.fitting(max(part.tokens for part in parts), size, write)

    def fitting(self, tokens: int, size: int, work: Callable[[int], Result], samples: int = 1) -> Result:
        """`work(size)`, or with fewer prompts at a time where memory is short, which is remembered for the next call.

        Args:
            tokens: longest answer, 0 where prompts are read only; what did not fit for some is not tried again for as many or
                more.
            size: prompts at a time.
            work: must do the same whenever it is called again.
            samples: sequences that each prompt stands for.
        """
        known = [fitted // samples for length, fitted in self.fitted.items() if length <= tokens]
        found, fitted = fitting(max(1, min([size, *known])), work)
        if fitted < size:
            self.fitted[tokens] = fitted * samples
        return found

    def first_block_ended(self) -> Ended:
        """Tells which answers have closed a fenced block of code, for which a reader of that block need not wait longer.

        Fences are counted in whole tokens. One that a model spells with several is not seen, and its answer goes on.
        """
        fences = [token for text, token in self.tokenizer.get_vocab().items() if "```" in text]
        known = torch.tensor(sorted(fences), dtype=torch.long, device=self.model.device)
        return lambda tokens: torch.isin(tokens, known).sum(-1) >= 2

    def decode(self, completions: Completions, *, opened: bool = True) -> list[str]:
        """Completions as text; see `text`."""
        return [self.text(ids, opened=opened) for ids in _rows(completions)]

    def text(self, written: Sequence[int], *, opened: bool = True) -> str:
        """Tokens that the model wrote as text, without special tokens, and with the marks of a thought that every judge knows.

        Args:
            written: token ids.
            opened: whether they follow a prompt, in which the template may have opened the thought.
        """
        if self.thoughts:
            return self.thoughts.text(written, opened=opened)
        return str(self.tokenizer.decode(written, skip_special_tokens=True))

    def _behind_thought(self, asked: Conversation) -> Batch:
        prompt = self.prompt(asked)
        if self.thoughts is None or asked.beginning:
            return prompt
        thought = prompt.input_ids.new_tensor([self.thoughts.known[asked]])
        return Completions(thought, torch.ones_like(thought, dtype=torch.bool)).after(prompt)

    def token_ids(self, openings: Sequence[str]) -> Tensor:
        """The first token of each string in this model's own vocabulary, each id once, ascending."""
        ids = {self.tokenizer(text, add_special_tokens=False).input_ids[0] for text in openings}
        return torch.tensor(sorted(ids), dtype=torch.long, device=self.model.device)

    def _template_ids(self, asked: Conversation) -> list[int]:
        return self.template.encode(asked.messages, asked.beginning)

    def _template_around(self) -> tuple[list[int], int]:
        """What the template puts around the user's text, read off two different prompts: the tokens that every prompt
        begins with (system prompt, opening of the user's turn), and how many tokens stand between that text, or a thought,
        and the answer."""
        first, second = (
            self._template_ids(Conversation(text)) for text in ("Tell me about rivers", "What is in 7x9 = ?!")
        )
        ending = _common(first[::-1], second[::-1])
        if ending == 0:
            raise ModelError(
                "The chat template adds nothing after the user's text.", "Use a model whose template opens the answer."
            )
        return first[: _common(first, second)], len(self.thoughts.behind) if self.thoughts else ending


def _nothing(written: Written) -> None:
    """Of each batch of answers, their text is all that is wanted."""


def _reading_into(found: list[Tensor], read: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    return lambda logits: found.append(read(logits))


def _conversation(asked: str | Conversation) -> Conversation:
    return Conversation(asked) if isinstance(asked, str) else asked


def _rows(completions: Completions) -> list[list[int]]:
    tokens, mask = completions.tokens.cpu(), completions.mask.cpu()
    return [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]


def _batches(encoded: Sequence[Batch], size: int) -> Iterator[tuple[list[int], Batch]]:
    """Left-padded batches of similar length, each with the places of its rows in `encoded`."""
    order = sorted(range(len(encoded)), key=lambda place: (encoded[place].input_ids.shape[1], place))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        yield places, pad_left([encoded[place] for place in places])


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading elements two sequences have in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))

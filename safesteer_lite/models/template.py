"""A model's chat template: conversations in, the text and tokens that the model reads out.

What people wrote never becomes one of the tokens that mark turns. What a template must do for this method is tried when it
is taken up, which needs the tokenizer but no weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from functools import cached_property
from typing import Any

from safesteer_lite.errors import ModelError
from safesteer_lite.models.rendering import TAKE_ANOTHER, refuse_powers, run_template

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`."""

_NO_OPTIONS: Mapping[str, bool] = {}
_UNOPENED = {"add_generation_prompt": False}
_BEFORE_THE_QUESTION = "\n\n"
# What the templates of models that may or may not think call the switch.
_WITHOUT_THINKING: tuple[Mapping[str, bool], ...] = ({"enable_thinking": False}, {"thinking": False})
_OPEN_THOUGHT = re.compile(r"<(think|thinking|reasoning)>(?!.*</\1>)", re.DOTALL | re.IGNORECASE)

# Words that no template has of its own, so that what it does with them can be seen.
_ASKED, _ALSO_ASKED, _ANSWERED = "Zebras wander quietly.", "Is 7 < 9 & 'x' a \"NAME\"?", "Herons answer slowly."
_TOLD = "Otters listen first."
_ANOTHER_DAY = date(1999, 11, 30)


class ChatTemplate:
    """What one tokenizer's chat template makes of conversations.

    Attributes:
        notes: a sentence for each thing that a user should know of what was found.
        end: the token that the template puts behind an answer; None where it puts none there.
        switches: what the template is told besides the conversation, so that the model answers without thinking first.
    """

    def __init__(self, tokenizer: Any, day: date | None = None) -> None:
        """Try the template out.

        Args:
            tokenizer: with its chat template.
            day: what a template that asks the date is told; None for today.

        Raises:
            ModelError: the template cannot be run, loses what the user says, does not open the answer, or opens a thought
                that it has no way to leave out.
        """
        self.notes: list[str] = []
        self._tokenizer = tokenizer
        self._day = day or date.today()
        self._source = self._choose_source()
        self._in_parts = False
        self.switches: Mapping[str, bool] = {}
        self._check_the_user_is_heard()
        self._leave_thoughts_out()
        behind = self._check_the_answer_is_opened()
        self._note_the_date()
        self.end = self._marker_at_start(behind)
        self._spelled_out = self._pattern_of_markers()

    def render(self, messages: Sequence[Mapping[str, str]], day: date | None = None) -> str:
        """The text that the model reads, up to the opening of its answer.

        A system prompt that the template has no place for begins the first question, which is what the makers of such
        models advise (Gemma, Mistral).

        Args:
            messages: `role` and `content` of each turn.
            day: another date than the template's own.

        Raises:
            ModelError: the template cannot write this conversation, or would never be done with it.
        """
        return self._render(messages if self.knows_system else _folded(messages), day=day)

    def encode(self, messages: Sequence[Mapping[str, str]], beginning: str = "") -> list[int]:
        """The token ids of `render`, in which the tokens that mark turns come from the template alone.

        Where a message spells one of them out, that is read as the letters it is made of.

        Args:
            messages: `role` and `content` of each turn.
            beginning: the first words of the answer, as tokens of their own, like those that the model writes itself.

        Raises:
            ModelError: as `render`.
        """
        mark = unused_character([self._source, beginning, *(turn["content"] for turn in messages)])
        # Cut behind its first letter, a spelled-out token is two ordinary texts.
        cut = [{**turn, "content": self._spelled_out.sub(rf"\g<0>{mark}", turn["content"])} for turn in messages]
        begun = self._spelled_out.sub(rf"\g<0>{mark}", beginning)
        ids: list[int] = []
        for piece in [*self.render(cut).split(mark), *(begun.split(mark) if begun else ())]:
            ids += self._tokenizer(piece, add_special_tokens=False).input_ids
        return ids

    @cached_property
    def knows_system(self) -> bool:
        """Whether the template has a place for a system prompt; some refuse one, others lose it without a word."""
        try:
            text = self._render([_turn("system", _TOLD), _turn("user", _ASKED)])
        except ModelError:
            return False
        return _TOLD in text and _ASKED in text

    def spells_out(self, text: str) -> bool:
        """Whether a text spells out a token that only the template may write, which other programs read as that token."""
        return self._spelled_out.search(text) is not None

    def _choose_source(self) -> str:
        """The template's text; of several named ones the one for plain conversations."""
        found = self._tokenizer.chat_template
        if isinstance(found, Mapping):
            names = ", ".join(map(str, found))
            if "default" not in found:
                raise ModelError(
                    f"The model has the chat templates {names or '(none)'}, and none is called default.",
                    "Save the one for plain conversations in a file, and give that with --chat-template FILE.",
                )
            if len(found) > 1:
                self.notes.append(f"Of the model's chat templates ({names}), default is the one that is used.")
            found = found["default"]
        if not isinstance(found, str) or not found.strip():
            raise ModelError(
                "The model has no chat template, so it cannot be prompted as an assistant.",
                "Use an instruct model, or give its template with --chat-template FILE.",
            )
        refuse_powers(found)
        return found

    def _render(
        self, messages: Sequence[Mapping[str, str]], options: Mapping[str, bool] = _NO_OPTIONS, day: date | None = None
    ) -> str:
        turns: list[dict[str, Any]] = [dict(turn) for turn in messages]
        if self._in_parts:
            turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        told = {"add_generation_prompt": True, **self.switches, **options}
        return run_template(self._tokenizer, self._source, turns, day or self._day, told)

    def _check_the_user_is_heard(self) -> None:
        """Find out whether the template takes a message as a text or in parts."""
        problem = ModelError("The chat template loses or changes what the user says.", TAKE_ANOTHER)
        for in_parts in (False, True):
            self._in_parts = in_parts
            try:
                heard = [text in self._render([_turn("user", text)]) for text in (_ASKED, _ALSO_ASKED)]
                # A list of parts that is printed as Python prints it, quotes and all.
                shows_parts = f"'text': '{_ASKED}'" in self._render([_turn("user", _ASKED)])
            except ModelError as error:
                # What it makes of a plain text says more than what it makes of parts, which few templates know.
                problem = problem if in_parts else error
                continue
            if all(heard) and not shows_parts:
                return
        raise problem

    def _leave_thoughts_out(self) -> None:
        """Use the template's own switch where it has one, and refuse an answer that can only begin with a thought."""
        asked = [_turn("user", _ASKED)]
        plain = self._render(asked)
        for switch in _WITHOUT_THINKING:
            if self._render(asked, switch) != plain:
                self.switches = switch
                name = next(iter(switch))
                self.notes.append(
                    f"The model can think before it answers. It is trained, judged and asked without ({name}=false in its "
                    "chat template), and whoever uses the result should switch its thinking off too."
                )
                break
        opening = self._render(asked).rpartition(_ASKED)[2]
        if _OPEN_THOUGHT.search(opening):
            raise ModelError(
                "The chat template makes the model think before each answer, and has no switch that leaves this out; "
                "models that always think cannot be trained or judged yet.",
                "Use the model's instruct version.",
            )

    def _check_the_answer_is_opened(self) -> str:
        """Compare a prompt with the same prompt and its answer: what comes between them, the model would have to write
        itself, as if it were part of the answer. Returns what the template puts behind the answer."""
        asked, answer = [_turn("user", _ASKED)], _turn("assistant", _ANSWERED)
        prompt = self._render(asked)
        before, found, behind = self._render([*asked, answer], _UNOPENED).partition(_ANSWERED)
        if not found:
            raise ModelError("The chat template loses what the assistant says.", TAKE_ANOTHER)
        if prompt.startswith(before.rstrip()):
            return behind
        missing = before.removeprefix(prompt.rstrip()).lstrip()
        if before.startswith(prompt.rstrip()) or prompt == self._render(asked, _UNOPENED):
            raise ModelError(
                f"The chat template does not open the answer: the model would have to write {missing[-80:]!r} itself.",
                f"Add to its end: {{% if add_generation_prompt %}}{missing[-80:]}{{% endif %}}",
            )
        return behind

    def _note_the_date(self) -> None:
        asked = [_turn("user", _ASKED)]
        if self.render(asked) != self.render(asked, _ANOTHER_DAY):
            self.notes.append(f"The chat template writes the date: it says {self._day:%d %B %Y} whatever the day.")

    def _marker_at_start(self, text: str) -> int | None:
        """The added token that a text begins with."""
        ids: list[int] = self._tokenizer(text.lstrip(), add_special_tokens=False).input_ids[:1]
        return ids[0] if ids and ids[0] in self._tokenizer.added_tokens_decoder else None

    def _pattern_of_markers(self) -> re.Pattern[str]:
        """Matches the first letter of each token that only the template may write: special ones, and whatever other added
        ones it marks turns with."""
        added = {int(index): token for index, token in self._tokenizer.added_tokens_decoder.items()}
        turns = [_turn("user", _ASKED), _turn("assistant", _ANSWERED), _turn("user", _ASKED)]
        written = set(self._tokenizer(self._render(turns), add_special_tokens=False).input_ids)
        names = {token.content for index, token in added.items() if token.special or index in written}
        names |= set(self._tokenizer.all_special_tokens)
        # One letter cannot be cut, and white space marks nothing.
        names = {name for name in names if len(name) > 1 and name.strip()}
        return re.compile(f"(?={'|'.join(map(re.escape, sorted(names)))})." if names else "(?!)", re.DOTALL)


def stop_ids(tokenizer: Any, *named: object) -> frozenset[int]:
    """Every token id that ends an answer: in training, judging, chat and whatever is exported.

    Args:
        tokenizer: its end-of-sequence token counts, and the token that its chat template puts behind an answer.
        named: `eos_token_id` as generation_config.json and config.json have it: an id, a list of ids, or None.

    Raises:
        ModelError: nothing ends an answer.
    """
    found = ids_of(tokenizer.eos_token_id, ChatTemplate(tokenizer).end, *named)
    if not found:
        raise ModelError(
            "Nothing says which token ends an answer, so answers would run on: neither generation_config.json nor the "
            "tokenizer has an end token, and the chat template puts none behind an answer.",
            "Set eos_token_id in the model's generation_config.json.",
        )
    return found


def ids_of(*named: object) -> frozenset[int]:
    """The token ids among what settings hold, which name one, a list, or none."""
    ids = [index for entry in named for index in (entry if isinstance(entry, Iterable) else [entry])]
    return frozenset(index for index in ids if isinstance(index, int) and not isinstance(index, bool) and index >= 0)


def _folded(messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """A conversation whose system prompt begins the first question."""
    system = [turn["content"] for turn in messages if turn["role"] == "system"]
    turns = [turn for turn in messages if turn["role"] != "system"]
    first = next((place for place, turn in enumerate(turns) if turn["role"] == "user"), None)
    if system and first is not None:
        content = _BEFORE_THE_QUESTION.join([*system, turns[first]["content"]])
        turns[first] = {**turns[first], "content": content}
    return turns


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def unused_character(texts: Iterable[str]) -> str:
    """A character for private use that occurs in none of the texts."""
    used = set().union(*texts)
    return next(character for character in map(chr, range(0xE000, 0xF8FF)) if character not in used)

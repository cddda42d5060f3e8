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

from safesteer_lite.config.sections import Thinking
from safesteer_lite.errors import ModelError
from safesteer_lite.models.rendering import TAKE_ANOTHER, refuse_powers, run_template
from safesteer_lite.models.thinking import SWITCHES, Marks, closing_of, left_open, marks_in

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`."""

_NO_OPTIONS: Mapping[str, bool] = {}
_UNOPENED = {"add_generation_prompt": False}
_BEFORE_THE_QUESTION = "\n\n"

# Words that no template has of its own, so that what it does with them can be seen.
_ASKED, _ALSO_ASKED, _ANSWERED = "Zebras wander quietly.", "Is 7 < 9 & 'x' a \"NAME\"?", "Herons answer slowly."
_TOLD = "Otters listen first."
_ANOTHER_DAY = date(1999, 11, 30)


class ChatTemplate:
    """What one tokenizer's chat template makes of conversations.

    Attributes:
        notes: a sentence for each thing that a user should know of what was found.
        end: the token that the template puts behind an answer; None where it puts none there.
        switches: what the template is told besides the conversation, so that the model thinks first, or does not.
        marks: how thoughts are marked; None where the model answers without thinking first.
    """

    def __init__(self, tokenizer: Any, day: date | None = None, thinking: Thinking = "auto") -> None:
        """Try the template out.

        Args:
            tokenizer: with its chat template.
            day: what a template that asks the date is told; None for today.
            thinking: whether the model thinks before it answers.

        Raises:
            ModelError: the template cannot be run, loses what the user says, does not open the answer, opens a thought that
                shall be left out, or marks no thoughts where there shall be some.
        """
        self.notes: list[str] = []
        self._tokenizer = tokenizer
        self._day = day or date.today()
        self._source = self._choose_source()
        self._in_parts = False
        self.switches: Mapping[str, bool] = {}
        self._check_the_user_is_heard()
        self.marks = self._find_marks(thinking)
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
            beginning: the first words of the answer, as tokens of their own, like those that the model writes itself; of a
                model that thinks they stand behind an empty thought.

        Raises:
            ModelError: as `render`.
        """
        mark = unused_character([self._source, beginning, *(turn["content"] for turn in messages)])
        # Cut behind its first letter, a spelled-out token is two ordinary texts.
        cut = [{**turn, "content": self._spelled_out.sub(rf"\g<0>{mark}", turn["content"])} for turn in messages]
        begun = self._spelled_out.sub(rf"\g<0>{mark}", beginning)
        ids: list[int] = []
        text = self.render(cut) + (self.marks.empty if self.marks and begun else "")
        for piece in [*text.split(mark), *(begun.split(mark) if begun else ())]:
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

    def _find_marks(self, thinking: Thinking) -> Marks | None:
        """Set the template's own switch where it has one, and find how thoughts are marked where the model has them."""
        asked = [_turn("user", _ASKED)]
        switch = next((name for name in SWITCHES if self._rendered(name, True) != self._rendered(name, False)), None)
        if thinking == "auto":
            thinking = "on" if switch is None and left_open(self._opening_of_answer()) else "off"
        self.switches = {switch: thinking == "on"} if switch else {}
        opened = left_open(self._opening_of_answer())
        if thinking == "off":
            if opened:
                raise ModelError(
                    "The chat template makes the model think before each answer, and has no switch that leaves this out.",
                    "Set model.thinking=on, or use the model's instruct version.",
                )
            if switch:
                self.notes.append(
                    f"The model can think before it answers. It is trained, judged and asked without ({switch}=false in its "
                    "chat template), and whoever uses the result should switch its thinking off too."
                )
            return None
        found = opened or marks_in([self._rendered(switch, False) if switch else "", self._source])
        if found is None:
            raise ModelError(
                "Nothing in the chat template marks a thought, so that it could not be told from the answer.",
                "Set model.thinking=off.",
            )
        closing = closing_of(found)
        for mark in (found, closing):
            if len(self._tokenizer(mark, add_special_tokens=False).input_ids) != 1:
                raise ModelError(
                    f"The model's tokenizer has no token {mark}, so that the end of a thought cannot be found among the "
                    "tokens.",
                    "Set model.thinking=off, or use the model's instruct version.",
                )
        whole = self._render([*asked, _turn("assistant", f"{found}\n{_TOLD}\n{closing}\n\n{_ANSWERED}")], _UNOPENED)
        written = re.search(rf"{re.escape(closing)}(\s*){re.escape(_ANSWERED)}", whole)
        self.notes.append(
            f"The model thinks before it answers. It is trained, judged and asked with its thoughts: what is read is the "
            f"answer behind {closing}."
        )
        return Marks(found, closing, bool(opened), written[1] if written else "\n\n")

    def _rendered(self, switch: str, on: bool) -> str:
        return self._render([_turn("user", _ASKED)], {switch: on})

    def _opening_of_answer(self) -> str:
        return self._render([_turn("user", _ASKED)]).rpartition(_ASKED)[2]

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
        if self.marks and missing.startswith((self.marks.opening, self.marks.closing)):
            # The thought, or the rest of one that is opened for it, which such a model does write itself.
            return behind
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
        names |= {self.marks.opening, self.marks.closing} if self.marks else set()
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

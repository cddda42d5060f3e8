"""Ollama's Modelfile: the chat template in Ollama's own language, stop tokens and parameters.

Ollama does not run the template that a model brings along, so it is written anew, from what the model's own template turns
out to put around the turns of a conversation, and only where the result is the same text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from safesteer_lite.config.sections import Thinking
from safesteer_lite.export import drafts
from safesteer_lite.export.weights import shards
from safesteer_lite.models.plain import load_tokenizer
from safesteer_lite.models.template import ChatTemplate, stop_ids

Render = Callable[[Sequence[Mapping[str, str]]], str]
"""Chat messages (`role`, `content`) to the text that the model reads, with the opening of its answer."""

CONTEXT = 4096
"""Tokens of a conversation that Ollama is told to keep, or fewer where the model was made for fewer."""

_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}
_SYSTEM, _USER, _ANSWER, _NEXT = "Be brief.", "What is rain?", "Water that falls.", "And snow?"


@dataclass(frozen=True)
class Family:
    """How a family of models marks turns: what stands before and after the text of each.

    Attributes:
        user: around a user's text.
        answer: around an answer that was given.
        opening: opens the answer that is asked for.
        system: around a system prompt; None where a family has no turn of its own for it.
        begin: what begins the text in the model's own template, and llama.cpp adds by itself.
    """

    user: tuple[str, str]
    answer: tuple[str, str]
    opening: str
    system: tuple[str, str] | None
    begin: str = ""


def _of_roles(opening: str, closing: str, begin: str = "") -> Family:
    """A family that marks all turns alike; `opening` has `{role}`."""
    user, answer, system = ((opening.format(role=role), closing) for role in ("user", "assistant", "system"))
    return Family(user, answer, answer[0], system, begin)


FAMILIES = (
    _of_roles("<|im_start|>{role}\n", "<|im_end|>\n"),
    _of_roles("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "<|begin_of_text|>"),
)
"""ChatML (Qwen, SmolLM) and Llama 3, which may add a system prompt of their own; others are measured."""


@dataclass(frozen=True)
class ChatFormat:
    """A model's chat format as Ollama can express it.

    Attributes:
        family: how turns are marked.
        system: the system prompt that the model's template adds where none is given; empty if it adds none.
        preamble: what its template always puts before a system prompt, in the same turn.
        fold: the question that a system prompt is put before, where it has no turn of its own.
        between: what stands between the two then.
    """

    family: Family
    system: str = ""
    preamble: str = ""
    fold: Literal["first", "last"] = "first"
    between: str = ""

    @property
    def template(self) -> str:
        """The template in Ollama's language, Go's `text/template`."""
        family = self.family
        (before, after), (open_answer, close_answer) = family.user, family.answer
        question, head = "{{ .Content }}", ""
        if family.system:
            head = family.system[0] + self.preamble + "{{ .System }}" + family.system[1]
            if not self.preamble:
                head = "{{ if .System }}" + head + "{{ end }}"
            loop = "{{ range .Messages }}"
        elif self.fold == "first":
            # Ollama's messages have the system prompt among them, so the first question has no fixed place.
            system = "{{ if $system }}{{ $system }}" + self.between + '{{ $system = "" }}{{ end }}'
            head, loop, question = "{{ $system := .System }}", "{{ range .Messages }}", system + question
        else:
            last = "{{ if eq (len (slice $.Messages $place)) 1 }}"
            question = last + "{{ if $.System }}{{ $.System }}" + self.between + "{{ end }}{{ end }}" + question
            loop = "{{ range $place, $turn := .Messages }}"
        turns = (
            f'{{{{ if eq .Role "user" }}}}{before}{question}{after}'
            f'{{{{ else if eq .Role "assistant" }}}}{open_answer}{{{{ .Content }}}}{close_answer}{{{{ end }}}}'
        )
        return head + loop + turns + "{{ end }}" + family.opening


def chat_format(render: Render, begin: str = "") -> ChatFormat | None:
    """The format that gives the same text as a model's own template, or None if there is none.

    Args:
        render: the model's own template.
        begin: the text of the token that llama.cpp puts before every prompt of this model; empty if it puts none.
    """
    for found in _candidates(render, begin):
        if _can_be_written(found) and all(
            _rendered(render, messages) == found.family.begin + expected(found, messages)
            for messages in _conversations()
        ):
            return found
    return None


def expected(form: ChatFormat, messages: Sequence[Mapping[str, str]]) -> str:
    """What Ollama makes of a conversation, up to the opening of the model's answer; without the begin-of-text token."""
    family, turns, system, text = form.family, list(messages), form.system, ""
    if turns[0]["role"] == "system":
        system = turns.pop(0)["content"]
    if family.system and (form.preamble or system):
        text = family.system[0] + form.preamble + system + family.system[1]
    questions = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
    folded = questions[0 if form.fold == "first" else -1] if system and not family.system else None
    for place, turn in enumerate(turns):
        before, after = family.user if turn["role"] == "user" else family.answer
        text += before + (system + form.between if place == folded else "") + turn["content"] + after
    return text + family.opening


@dataclass(frozen=True)
class Chat:
    """Everything that a model's Modelfiles say of it.

    Attributes:
        form: the chat format.
        stops: the tokens that end an answer, as text.
        generation: the model's generation_config.json; sampling parameters are taken over where it states some.
        context: the longest context that the model was made for, in tokens.
        knows_system: whether the model's own template has a place for a system prompt.
        day: the date that the model's own template was told; None where it writes none.
        head: what begins the text and has to be in the Modelfile, since llama.cpp does not add it; empty if it does.
        thinking: whether the model thinks before it answers, as a sentence; empty where it has no choice and does not.
    """

    form: ChatFormat
    stops: Sequence[str]
    generation: Mapping[str, Any]
    context: int
    knows_system: bool = True
    day: date | None = None
    head: str = ""
    thinking: str = ""

    def modelfile(self, file: str) -> str:
        """The Modelfile's text.

        Args:
            file: the weights, relative to the Modelfile: a GGUF file, or `.` for a folder of safetensors.
        """
        lines = [f"FROM {'.' if file == '.' else './' + file}", ""]
        if not self.knows_system:
            lines += ["# The model's own template knows no system prompt: it is put before the first question.", ""]
        if self.thinking:
            lines += [f"# {self.thinking}", ""]
        if self.day:
            lines += [
                f"# The model's own template writes the date; this one says the day of the training, {self.day}.",
                "",
            ]
        lines += [f'TEMPLATE """{self.head}{self.form.template}"""', ""]
        if self.form.system:
            lines += [f'SYSTEM """{self.form.system}"""', ""]
        lines += [f'PARAMETER stop "{stop}"' for stop in self.stops]
        lines.append(f"PARAMETER num_ctx {min(CONTEXT, self.context)}")
        lines += [
            f"PARAMETER {theirs} {self.generation[ours]:g}"
            for ours, theirs in _SAMPLING.items()
            if _is_number(self.generation.get(ours))
        ]
        return "\n".join(lines) + "\n"


def read_chat(model_folder: Path, day: date, thinking: Thinking = "auto") -> Chat | None:
    """What the Modelfiles of a model say, or None where its chat template cannot be written in Ollama's language.

    Args:
        model_folder: a folder with the model's tokenizer, template and configuration.
        day: what a chat template that asks the date is told.
        thinking: whether the model thinks before it answers.

    Raises:
        ModelError, ExportError: one of those files cannot be read, or is of no use.
    """
    config = shards.read_json(model_folder / "config.json")
    place = model_folder / "generation_config.json"
    generation = shards.read_json(place) if place.is_file() else {}
    tokenizer = load_tokenizer(model_folder, config)
    own = ChatTemplate(tokenizer, day, thinking)
    form = chat_format(own.render, str(tokenizer.bos_token or ""))
    if form is None:
        return None
    asked = [{"role": "user", "content": _USER}]
    dated = own.render(asked) != own.render(asked, date(1999, 11, 30))
    ends = stop_ids(tokenizer, generation.get("eos_token_id"), config.get("eos_token_id"))
    # Ollama's quoted words have no escapes, so a stop with a quote or a line break in it cannot be said.
    stops = [str(stop) for stop in tokenizer.convert_ids_to_tokens(sorted(ends)) if not {'"', "\n"} & set(stop or '"')]
    longest = config.get("max_position_embeddings")
    context = longest if isinstance(longest, int) else CONTEXT
    # llama.cpp adds what the tokenizer adds by itself, and some tokenizers leave that to the template.
    added = tokenizer.bos_token_id is not None and tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
    told = ""
    if own.marks:
        told = f"The model thinks before it answers, and was trained and measured so: it answers behind {own.marks.closing}."
    elif own.switches:
        told = "The model could think before it answers. It was trained and measured without, as this template asks it."
    head = "" if added else form.family.begin
    return Chat(form, stops, generation, context, own.knows_system, day if dated else None, head, told)


def write_modelfiles(
    folder: Path, model_folder: Path, files: Sequence[str], day: date, thinking: Thinking = "auto"
) -> list[str]:
    """Write a Modelfile for each file of weights: `Modelfile` for the first, `Modelfile.<quantisation>` for others.

    Args:
        folder: where the weights lie.
        model_folder: a folder with the model's tokenizer, template and configuration.
        files: the weights: GGUF files, or `.` alone.
        day: what a chat template that asks the date is told.
        thinking: whether the model thinks before it answers.

    Returns:
        The names written; none where the model's template cannot be written in Ollama's language.
    """
    chat = read_chat(model_folder, day, thinking)
    if chat is None:
        return []
    names = []
    for number, file in enumerate(files):
        names.append("Modelfile" if number == 0 else f"Modelfile.{Path(file).stem.rpartition('-')[2]}")
        drafts.write_text(folder / names[-1], chat.modelfile(file))
    return names


def _conversations() -> list[list[dict[str, str]]]:
    """What the two templates are compared on: with and without a system prompt, one question and two."""
    system = {"role": "system", "content": _SYSTEM}
    first = {"role": "user", "content": _USER}
    rest = [first, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}]
    return [[first], [system, first], rest, [system, *rest]]


def _candidates(render: Render, begin: str) -> Iterator[ChatFormat]:
    for family in FAMILIES:
        if found := _fitted(family, render):
            yield found
    if found := _measured(render, begin):
        yield found


def _fitted(family: Family, render: Render) -> ChatFormat | None:
    """The family's format with the system prompt and the preamble that the template turns out to add."""
    first, with_system = _conversations()[:2]
    plain, given = _rendered(render, first), _rendered(render, with_system)
    assert family.system is not None
    start, end = family.begin + family.system[0], family.system[1]
    if plain is None or given is None or not given.startswith(start) or _SYSTEM + end not in given:
        return None
    # Behind the header of the answer a thought may be opened, or an empty one written.
    thought = plain.rpartition(family.opening)[2]
    if plain.endswith(family.opening + thought) and _USER not in thought:
        family = replace(family, opening=family.opening + thought)
    preamble = given[len(start) : given.index(_SYSTEM + end)]
    system = plain[len(start) :].partition(end)[0] if plain.startswith(start) else ""
    return ChatFormat(family, system.removeprefix(preamble), preamble)


def _measured(render: Render, begin: str) -> ChatFormat | None:
    """The format of a template that puts the same text around each turn, such as Mistral's, by what it puts there."""
    first, with_system, two, two_with_system = _conversations()
    plain, longer = _rendered(render, first), _rendered(render, two)
    if plain is None or longer is None:
        return None
    begin = begin if plain.startswith(begin) else ""
    (start, end), around = _around(plain, _USER), _around(longer, _USER, _ANSWER, _NEXT)
    before = start.removeprefix(begin)
    if len(around) != 4 or around[0] != start or around[3] != end or not around[2].endswith(before):
        return None
    same = takewhile(lambda pair: pair[0] == pair[1], zip(around[1], end, strict=False))
    after = "".join(letter for letter, _ in same)
    answer = (around[1].removeprefix(after), around[2].removesuffix(before))
    family = Family((before, after), answer, end.removeprefix(after), None, begin)
    around = _around(_rendered(render, with_system) or "", _SYSTEM, _USER)
    if len(around) != 3 or around[2] != end:
        return None
    if around[0] == start:
        whole = _rendered(render, two_with_system) or ""
        place: Literal["first", "last"] = "first" if whole.startswith(start + _SYSTEM) else "last"
        return ChatFormat(family, fold=place, between=around[1])
    if not around[1].endswith(before):
        return None
    turn = (around[0].removeprefix(begin), around[1].removesuffix(before))
    return ChatFormat(Family(family.user, family.answer, family.opening, turn, begin))


def _around(text: str, *parts: str) -> list[str]:
    """What stands before, between and after the parts of a text; fewer pieces where a part is not there."""
    pieces = []
    for part in parts:
        before, found, text = text.partition(part)
        pieces.append(before)
        if not found:
            return pieces
    return [*pieces, text]


def _rendered(render: Render, messages: Sequence[Mapping[str, str]]) -> str | None:
    """What the model's template makes of a conversation; None where it refuses it."""
    try:
        return render(messages)
    except Exception:  # A template is a program of somebody else's, and may raise anything.
        return None


def _can_be_written(form: ChatFormat) -> bool:
    """Whether a Modelfile can hold the format: its quotes have no escapes, and Go would run what stands in braces."""
    family = form.family
    system = family.system or ("", "")
    marks = (family.begin, *family.user, *family.answer, *system, family.opening, form.preamble, form.between)
    return not any(stop in text for text in (*marks, form.system) for stop in ('"""', "\0")) and not any(
        "{{" in mark or "}}" in mark for mark in marks
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

"""Ollama's Modelfile: the chat template in Ollama's own language, stop tokens and parameters.

Ollama does not run the template that a model brings along, so it is written anew, for the two families that the
supported models use, and only where it gives the same text as the model's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safesteer_lite.export.weights import shards

Render = Callable[[Sequence[Mapping[str, str]]], str]
"""Chat messages (`role`, `content`) to the text that the model reads, with the opening of its answer."""

CONTEXT = 4096
"""Tokens of a conversation that Ollama is told to keep, or fewer where the model was made for fewer."""

_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}
_SYSTEM, _USER, _ANSWER, _NEXT = "Be brief.", "What is rain?", "Water that falls.", "And snow?"


@dataclass(frozen=True)
class Family:
    """How a family of models marks turns.

    Attributes:
        opening: before a turn's text, with `{role}`.
        closing: after it.
        begin: what begins the text in the model's own template, and llama.cpp adds by itself.
    """

    opening: str
    closing: str
    begin: str = ""

    def turn(self, role: str, text: str) -> str:
        """One whole turn."""
        return self.opening.format(role=role) + text + self.closing


FAMILIES = (
    Family("<|im_start|>{role}\n", "<|im_end|>\n"),
    Family("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "<|begin_of_text|>"),
)
"""ChatML (Qwen, SmolLM) and Llama 3."""


@dataclass(frozen=True)
class ChatFormat:
    """A model's chat format as Ollama can express it.

    Attributes:
        family: how turns are marked.
        system: the system prompt that the model's template adds where none is given; empty if it adds none.
        preamble: what its template always puts before a system prompt, in the same turn.
    """

    family: Family
    system: str = ""
    preamble: str = ""

    @property
    def template(self) -> str:
        """The template in Ollama's language, Go's `text/template`."""
        family = self.family
        system = family.turn("system", self.preamble + "{{ .System }}")
        if not self.preamble:
            system = "{{ if .System }}" + system + "{{ end }}"
        user, answer = (family.turn(role, "{{ .Content }}") for role in ("user", "assistant"))
        turns = f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}'
        return system + "{{ range .Messages }}" + turns + "{{ end }}" + family.opening.format(role="assistant")


def chat_format(render: Render) -> ChatFormat | None:
    """The format that gives the same text as a model's own template, or None if there is none.

    Args:
        render: the model's own template.
    """
    for family in FAMILIES:
        found = _fitted(family, render)
        if found is not None and all(
            render(messages) == family.begin + expected(found, messages) for messages in _conversations()
        ):
            return found
    return None


def expected(form: ChatFormat, messages: Sequence[Mapping[str, str]]) -> str:
    """What Ollama makes of a conversation, up to the opening of the model's answer; without the begin-of-text token."""
    family, turns, system = form.family, list(messages), form.system
    if turns[0]["role"] == "system":
        system = turns.pop(0)["content"]
    text = family.turn("system", form.preamble + system) if form.preamble or system else ""
    text += "".join(family.turn(turn["role"], turn["content"]) for turn in turns)
    return text + family.opening.format(role="assistant")


def modelfile(file: str, form: ChatFormat, stops: Sequence[str], generation: Mapping[str, Any], context: int) -> str:
    """The Modelfile's text.

    Args:
        file: the weights, relative to the Modelfile: a GGUF file, or `.` for a folder of safetensors.
        form: the chat format.
        stops: the tokens that end an answer, as text.
        generation: the model's generation_config.json; sampling parameters are taken over where it states some.
        context: the longest context that the model was made for, in tokens.
    """
    lines = [f"FROM {'.' if file == '.' else './' + file}", "", f'TEMPLATE """{form.template}"""', ""]
    if form.system:
        lines += [f'SYSTEM """{form.system}"""', ""]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines.append(f"PARAMETER num_ctx {min(CONTEXT, context)}")
    lines += [
        f"PARAMETER {theirs} {generation[ours]:g}"
        for ours, theirs in _SAMPLING.items()
        if isinstance(generation.get(ours), int | float)
    ]
    return "\n".join(lines) + "\n"


def write_modelfiles(folder: Path, model_folder: Path, files: Sequence[str]) -> list[str]:
    """Write a Modelfile for each file of weights: `Modelfile` for the first, `Modelfile.<quantisation>` for others.

    Args:
        folder: where the weights lie.
        model_folder: a folder with the model's tokenizer, template and configuration.
        files: the weights: GGUF files, or `.` alone.

    Returns:
        The names written; none where the model's template is of no known family.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)

    def render(messages: Sequence[Mapping[str, str]]) -> str:
        text = tokenizer.apply_chat_template(
            [dict(turn) for turn in messages], tokenize=False, add_generation_prompt=True
        )
        return str(text)

    form = chat_format(render)
    if form is None:
        return []
    config = shards.read_json(model_folder / "config.json")
    place = model_folder / "generation_config.json"
    generation = shards.read_json(place) if place.is_file() else {}
    ends = generation.get("eos_token_id", config.get("eos_token_id", tokenizer.eos_token_id))
    stops = [str(tokenizer.convert_ids_to_tokens(end)) for end in (ends if isinstance(ends, list) else [ends])]
    context = int(config.get("max_position_embeddings", CONTEXT))
    names = []
    for number, file in enumerate(files):
        names.append("Modelfile" if number == 0 else f"Modelfile.{Path(file).stem.rpartition('-')[2]}")
        shards.write_text(folder / names[-1], modelfile(file, form, stops, generation, context))
    return names


def _conversations() -> list[list[dict[str, str]]]:
    """What the two templates are compared on: with and without a system prompt, one question and two."""
    system = {"role": "system", "content": _SYSTEM}
    first = {"role": "user", "content": _USER}
    rest = [first, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}]
    return [[first], [system, first], rest, [system, *rest]]


def _fitted(family: Family, render: Render) -> ChatFormat | None:
    """The family's format with the system prompt and the preamble that the template turns out to add."""
    first = [{"role": "user", "content": _USER}]
    start, end = family.begin + family.opening.format(role="system"), family.closing
    plain = render(first)
    given = render([{"role": "system", "content": _SYSTEM}, *first])
    if not given.startswith(start) or _SYSTEM + end not in given:
        return None
    preamble = given[len(start) : given.index(_SYSTEM + end)]
    system = plain[len(start) :].partition(end)[0] if plain.startswith(start) else ""
    return ChatFormat(family, system.removeprefix(preamble), preamble)

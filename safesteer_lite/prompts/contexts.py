"""Contexts in which a prompt is asked: under a system prompt, after earlier turns, in a role play, with the answer begun.

People seldom ask a model one bare question. What a model refuses in their contexts is measured with contexts that it was not
trained in: each split has its own (`data/contexts.toml`).
"""

from __future__ import annotations

import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from safesteer_lite.config import ContextName
from safesteer_lite.errors import PromptError
from safesteer_lite.prompts.sets import Kind, Prompt

CONTEXTS: dict[ContextName, str] = {
    "system": "system prompt",
    "turns": "earlier turns",
    "role": "role play",
    "agreed": "begun with a yes",
    "steps": "begun with steps",
}
"""Every kind of context with its name in tables, in the order in which they are told."""

BEGUN: frozenset[ContextName] = frozenset({"agreed", "steps"})
"""Contexts in which the answer has begun, so that the model can only turn back."""

TRAINED: tuple[ContextName, ...] = ("system", "turns", "role")
"""Contexts that prompts are trained in."""

CONTEXT_SPLITS = ("train", "selection", "test")

_PROMPT = "{prompt}"


@dataclass(frozen=True)
class Conversation:
    """What a model is asked: one prompt, with whatever stands before it and after it.

    Attributes:
        prompt: the user's last turn.
        system: the system prompt; empty for none, or for what the model's template has of its own.
        turns: earlier turns, each what the user said and what the assistant answered.
        beginning: the first words of the answer, which the model goes on from; empty for none.
    """

    prompt: str
    system: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    beginning: str = ""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns up to the user's last, each with `role` and `content`; the beginning of the answer is not among them."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        earlier = [
            {"role": role, "content": text}
            for turn in self.turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        return [*system, *earlier, {"role": "user", "content": self.prompt}]


@dataclass(frozen=True)
class Context:
    """One context, which any prompt can be put into.

    Attributes:
        name: its kind.
        system: the system prompt; empty for none.
        turns: earlier turns, each what the user said and what the assistant answered.
        frame: the user's last turn, with `{prompt}` where the prompt goes.
        beginning: the first words of the answer; empty for none.
    """

    name: ContextName
    system: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    frame: str = _PROMPT
    beginning: str = ""

    def around(self, prompt: str) -> Conversation:
        """The prompt, asked in this context."""
        # Not str.format: a prompt may hold braces of its own.
        return Conversation(self.frame.replace(_PROMPT, prompt), self.system, self.turns, self.beginning)


def contexts(name: ContextName, split: str) -> tuple[Context, ...]:
    """The bundled contexts of one kind.

    Args:
        name: a key of `CONTEXTS`.
        split: `train`, `selection` or `test`; what a model trains with is never what it is judged by.

    Raises:
        PromptError: there is no such kind or split.
    """
    found = _bundled().get((name, split))
    if found is None:
        raise PromptError(
            f"There are no contexts '{name}' of the split '{split}'.",
            f"There are {', '.join(CONTEXTS)}, each with the splits {', '.join(CONTEXT_SPLITS)}.",
        )
    return found


@dataclass(frozen=True)
class Question:
    """One prompt in one context.

    Attributes:
        context: the kind of context.
        kind: the kind of prompt.
        prompt: the prompt by itself.
        conversation: what the model is asked.
    """

    context: ContextName
    kind: Kind
    prompt: Prompt
    conversation: Conversation


def questions(
    prompts: Mapping[Kind, Sequence[Prompt]], names: Sequence[ContextName], split: str = "test"
) -> list[Question]:
    """Every prompt in every kind of context, each in one of the contexts of that kind.

    Args:
        prompts: by kind.
        names: keys of `CONTEXTS`.
        split: which contexts; see `contexts`.
    """
    return [
        Question(name, kind, prompt, conversation)
        for name in names
        for kind, entries in prompts.items()
        for prompt, conversation in zip(
            entries, asked_in([entry.text for entry in entries], contexts(name, split)), strict=True
        )
    ]


def asked_in(prompts: Sequence[str], drawn: Sequence[Context]) -> list[Conversation]:
    """Each prompt in one of the contexts, which take turns, so that all of them are used about equally often."""
    return [drawn[place % len(drawn)].around(prompt) for place, prompt in enumerate(prompts)]


def partly_in_contexts(prompts: Sequence[str], share: float) -> list[str | Conversation]:
    """The prompts to train with, an evenly spread share of them in contexts of the training split.

    Args:
        prompts: as they are.
        share: of them that is asked in a context, 0 to 1; the kinds of contexts take turns, and so do those of a kind.
    """
    drawn = [contexts(name, "train") for name in TRAINED]
    asked: list[str | Conversation] = []
    count = 0
    for place, prompt in enumerate(prompts):
        if int((place + 1) * share) == int(place * share):
            asked.append(prompt)
            continue
        turn, kind = divmod(count, len(drawn))
        asked.append(drawn[kind][turn % len(drawn[kind])].around(prompt))
        count += 1
    return asked


def begun(asked: Sequence[str | Conversation]) -> list[Conversation]:
    """What is asked, with the answer begun in one of the ways of the training split, which take turns."""
    pairs = zip(*(contexts(name, "train") for name in sorted(BEGUN)), strict=True)
    beginnings = [context.beginning for pair in pairs for context in pair]
    ones = [Conversation(entry) if isinstance(entry, str) else entry for entry in asked]
    return [replace(one, beginning=beginnings[place % len(beginnings)]) for place, one in enumerate(ones)]


@cache
def _bundled() -> dict[tuple[ContextName, str], tuple[Context, ...]]:
    text = (files("safesteer_lite") / "data" / "contexts.toml").read_text(encoding="utf-8")
    tables = tomllib.loads(text)
    found: defaultdict[tuple[ContextName, str], list[Context]] = defaultdict(list)
    for name in CONTEXTS:
        for entry in tables[name]:
            found[name, entry["split"]].append(_context(name, entry))
    return {key: tuple(entries) for key, entries in found.items()}


def _context(name: ContextName, entry: Mapping[str, Any]) -> Context:
    match name:
        case "system":
            return Context(name, system=entry["text"])
        case "turns":
            return Context(name, turns=tuple((user, assistant) for user, assistant in entry["turns"]))
        case "role":
            return Context(name, frame=entry["text"])
        case "agreed" | "steps":
            return Context(name, beginning=entry["text"])

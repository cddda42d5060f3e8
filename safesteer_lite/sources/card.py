"""The card of a base model, its README.md: what its head states, and what its authors say below."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from safesteer_lite.runs.durable import read_bytes

NAME = "README.md"
_LARGEST = 10_000_000
_FENCE = "---"
# Identifiers alone: what a stranger's card says goes into a card of ours.
_WORD = r"[A-Za-z0-9][\w.+/-]*"


@dataclass(frozen=True)
class BaseCard:
    """What a model's folder says of it in words.

    Attributes:
        licence: an identifier of the model hub; empty where the head states none.
        base_model: the hub id of the model that it was made from; empty where the head states none.
        languages: codes of the languages that it speaks.
        text: everything below the head.
    """

    licence: str = ""
    base_model: str = ""
    languages: tuple[str, ...] = ()
    text: str = ""


def read_card(folder: Path) -> BaseCard:
    """The card in a model's folder; an empty one where there is none that can be read."""
    try:
        text = read_bytes(folder / NAME, _LARGEST).decode("utf-8", "replace").replace("\r\n", "\n")
    except (OSError, ValueError):
        return BaseCard()
    head = ""
    if text.startswith(_FENCE):
        head, _, text = text.partition(f"\n{_FENCE}")
        text = text.partition("\n")[2]
    licences, bases = _stated(head, "license"), _stated(head, "base_model")
    return BaseCard(
        licences[0].lower() if licences else "",
        bases[0] if bases else "",
        tuple(_stated(head, "language")),
        text.strip(),
    )


def _stated(head: str, name: str) -> list[str]:
    """The words that the head has under a name: on its line, or in the list below it."""
    found = re.search(rf"^{name}:(.*(?:\n[ \t]*-[ \t].*)*)", head, re.MULTILINE)
    values = re.split(r"[\n,\[\]]", found[1]) if found else []
    words = (re.fullmatch(rf"[ \t-]*[\"']?({_WORD})[\"']?[ \t]*(?:#.*)?", value) for value in values)
    return [word[1] for word in words if word]

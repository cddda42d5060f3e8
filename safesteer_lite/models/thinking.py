"""Thoughts before an answer: how a model's chat template marks them, found from the template, and read alike for all models."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

SWITCHES = ("enable_thinking", "thinking")
"""What the templates of models that may or may not think call the switch."""

OPENING, CLOSING = "<think>", "</think>"
"""What marks a thought in every answer that leaves `models/`, whatever the model itself writes."""

_MARK = re.compile(r"[<\[](?:\w+:)?(?:think|thinking|thought|reason|reasoning)[>\]]", re.IGNORECASE)


@dataclass(frozen=True)
class Marks:
    """How one model marks its thoughts.

    Attributes:
        opening, closing: the marks themselves.
        opened: whether the prompt ends within the thought, so that the model writes no opening mark.
        behind: the white space between the closing mark and the answer.
    """

    opening: str
    closing: str
    opened: bool
    behind: str

    @property
    def empty(self) -> str:
        """What makes of the end of a prompt the end of an empty thought."""
        return ("\n" if self.opened else f"{self.opening}\n\n") + self.closing + self.behind

    def unified(self, written: str, *, opened: bool) -> str:
        """What a model wrote, with the marks that every judge knows.

        Args:
            written: thought and answer.
            opened: whether the prompt ended within the thought, whose opening mark is then put back.
        """
        text = written.replace(self.opening, OPENING).replace(self.closing, CLOSING)
        return f"{OPENING}\n{text}" if opened else text


def left_open(text: str) -> str | None:
    """The mark of a thought that a text opens and does not close; None if there is none."""
    marks = [found[0] for found in _MARK.finditer(text) if closing_of(found[0]) not in text[found.end() :]]
    return marks[-1] if marks else None


def marks_in(texts: Iterable[str]) -> str | None:
    """The opening mark of the first thought that the texts close, or speak of closing; None if there is none."""
    for text in texts:
        for found in _MARK.finditer(text.replace("</", "<").replace("[/", "[")):
            if closing_of(found[0]) in text:
                return found[0]
    return None


def closing_of(opening: str) -> str:
    """`</think>` of `<think>`."""
    return f"{opening[0]}/{opening[1:]}"

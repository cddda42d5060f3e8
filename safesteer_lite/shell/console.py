"""The one console that everything painted goes through: a string is text, whatever is in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.status import Status
from rich.text import Text

from safesteer_lite.text import visible, visible_piece


def as_text(text: str, style: str = "") -> Text:
    """A string as it is, with brackets and colons as they are, and with what could steer the terminal made visible."""
    return Text(visible(text, lines=True), style)


class SafeConsole(Console):
    """A console that takes no string for markup and passes no control character on.

    Names, prompts and answers come from elsewhere: `[/INST]` is no end of a style and ESC no start of a command. Strings are
    made visible before they are laid out; any other text, such as a `Text` made elsewhere, at the latest when it is painted.
    """

    def __init__(self, **options: Any) -> None:
        """Prepare a console; nothing is written.

        Args:
            options: as of `rich.console.Console`, which needs none.
        """
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """A string of a table, or one that is printed, as text."""
        return super().render_str(visible(text, lines=True), **{**options, "markup": False, "emoji": False})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is painted, piece by piece: only what rich itself commands reaches the terminal as a command."""
        for piece in super().render(renderable, options):
            text = piece.text if piece.control else visible_piece(piece.text)
            yield piece if text == piece.text else Segment(text, piece.style)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """A line that shows that something is being done."""
        dots = "dots" if self.encoding.startswith("utf") else "line"
        words = as_text(status) if isinstance(status, str) else status
        return super().status(words, **{"spinner": dots, **options})

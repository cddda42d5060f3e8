"""Questions at the terminal: one way to ask each kind; Esc goes back, Ctrl-C and Ctrl-D leave."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import questionary
from prompt_toolkit.application import Application
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent, merge_key_bindings
from prompt_toolkit.keys import Keys

from safesteer_lite.text import visible

if sys.platform == "win32":
    import msvcrt
else:
    import termios

Answer = TypeVar("Answer")

# A lone Esc is told from an arrow key, which begins with the same byte, by nothing following it for so long (seconds).
_ESCAPE_SECONDS = 0.1


class Back(Exception):
    """The user pressed Esc: the question before this one is wanted."""


@dataclass(frozen=True)
class Option:
    """One line of a list to choose from.

    Attributes:
        value: what the answer is.
        title: what the user reads.
    """

    value: Any
    title: str


def choose(message: str, options: Sequence[Option], default: Any = None, escape: str = "back") -> Any:
    """The value of the chosen option; digits and letters point at a line, Enter takes it.

    Args:
        message: the question.
        options: at least one.
        default: the value that is pointed at first.
        escape: what Esc does here, in a word.

    Raises:
        Back: Esc. KeyboardInterrupt: Ctrl-C.
    """
    choices = [questionary.Choice(visible(option.title), value=index) for index, option in enumerate(options)]
    start = next((choice for choice, option in zip(choices, options, strict=True) if option.value == default), None)
    question = questionary.select(
        visible(message),
        choices,
        default=start,
        use_shortcuts=len(options) <= 9,
        instruction=f"(arrows, Enter; Esc: {escape})",
    )
    return options[_ask(question)].value


def write(message: str, default: str = "", instruction: str = "") -> str:
    """A line of text, without the space around it.

    Raises:
        Back: Esc. KeyboardInterrupt: Ctrl-C.
    """
    return str(_ask(questionary.text(visible(message), default=default, instruction=instruction or None))).strip()


def write_path(message: str, default: str = "") -> str:
    """A path, with Tab to complete it.

    Raises:
        Back: Esc. KeyboardInterrupt: Ctrl-C.
    """
    return str(_ask(questionary.path(visible(message), default=default))).strip()


def until_right(question: Callable[[], Answer], wrong: type[Exception], tell: Callable[[Exception], None]) -> Answer:
    """Ask again until the answer is one that can be used.

    Args:
        question: asks, and raises `wrong` where the answer will not do.
        wrong: the errors that the user can mend by answering differently.
        tell: shows such an error.
    """
    while True:
        try:
            return question()
        except wrong as error:
            tell(error)


def forget_typed_ahead() -> None:
    """Drop the keys that were pressed while the program was busy: they were not meant for the next question."""
    if not sys.stdin.isatty():
        return
    if sys.platform == "win32":
        while msvcrt.kbhit():
            msvcrt.getwch()
    else:
        termios.tcflush(sys.stdin, termios.TCIFLUSH)


def _ask(question: questionary.Question) -> Any:
    application: Application[Any] = question.application
    escape = KeyBindings()

    @escape.add(Keys.Escape, eager=True)
    def _(event: KeyPressEvent) -> None:
        event.app.exit(exception=Back())

    known = [application.key_bindings] if application.key_bindings else []
    application.key_bindings = merge_key_bindings([*known, escape])
    application.ttimeoutlen = _ESCAPE_SECONDS
    try:
        return question.unsafe_ask()
    except EOFError:
        # Ctrl-D, or an input that has ended: there is nobody to ask again.
        raise KeyboardInterrupt from None

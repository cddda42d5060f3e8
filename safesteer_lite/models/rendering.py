"""Running a chat template: a program by somebody else, with a bound on its work, a date that stays, and errors in sentences."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime, time
from types import FrameType
from typing import Any

from safesteer_lite.errors import ModelError

LARGEST_TEXT = 4_000_000
"""Characters that a template may make; whole libraries of tools stay far below, and so does what any model can read."""

TAKE_ANOTHER = "Take the template from the model's own page, or use another model."

# Lines of the code that Jinja makes of a template. Real ones take some fifty for each message, a loop in a loop billions.
_MOST_STEPS = 300_000

# Jinja's name for the generated code of a template that came as a text.
_TEMPLATE_CODE = "<template>"


def run_template(
    tokenizer: Any, source: str, turns: Sequence[Mapping[str, Any]], day: date, options: Mapping[str, Any]
) -> str:
    """The text that a template makes of a conversation.

    Args:
        tokenizer: whose template it is; its special tokens are given to it.
        source: the template.
        turns: messages with `role` and `content`.
        day: the date that the template is told, if it asks.
        options: whatever else it is told.

    Raises:
        ModelError: the template fails, refuses the conversation, or would never be done with it.
    """
    with _explained(", ".join(str(turn["role"]) for turn in turns)), _bounded():
        text = str(
            tokenizer.apply_chat_template(
                list(turns), chat_template=source, tokenize=False, strftime_now=_clock(day), **options
            )
        )
    if len(text) > LARGEST_TEXT:
        raise ModelError(f"The chat template makes {len(text):,} characters of {len(turns)} messages.", TAKE_ANOTHER)
    return text


def refuse_powers(source: str) -> None:
    """Refuse a template that could take a machine's whole memory in a single step, which nothing could stop.

    Raises:
        ModelError: it computes a power, or cannot be taken apart.
    """
    import jinja2

    with _explained("user"):
        if any(kind == "operator" and value == "**" for _, kind, value in jinja2.Environment().lex(source)):
            raise ModelError("The chat template computes powers, which no template needs.", TAKE_ANOTHER)


def _clock(day: date) -> Callable[[str], str]:
    """What templates call `strftime_now`, at noon of one day."""
    return datetime.combine(day, time(12)).strftime


class _NeverDone(Exception):
    """The template took more steps than any real one."""


@contextmanager
def _bounded() -> Iterator[None]:
    """Inside, templates that take too many steps are stopped. Steps are counted, not seconds, so that a template is refused
    on every machine or on none."""
    left = _MOST_STEPS

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise _NeverDone
        return count

    def enter(frame: FrameType, event: str, argument: object) -> Any:
        return count if frame.f_code.co_filename == _TEMPLATE_CODE else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def _explained(roles: str) -> Iterator[None]:
    """Turn what a template raises, which can be anything, into an error that the user can act on."""
    import jinja2

    try:
        yield
    except ModelError:
        raise
    except _NeverDone:
        raise ModelError(f"The chat template was stopped after {_MOST_STEPS:,} steps.", TAKE_ANOTHER) from None
    except (jinja2.TemplateSyntaxError, RecursionError, MemoryError) as error:
        raise ModelError(f"The chat template cannot be run ({_said_by(error)}).", TAKE_ANOTHER) from error
    except jinja2.TemplateError as error:
        raise ModelError(
            f"The chat template refuses a conversation of {roles} ({_said_by(error)}).",
            "Leave the system prompt out." if "system" in roles else TAKE_ANOTHER,
        ) from error
    except Exception as error:
        raise ModelError(f"The chat template fails ({_said_by(error)}).", TAKE_ANOTHER) from error


def _said_by(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__

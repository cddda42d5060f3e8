"""One setting: its unit, its source, what it may be, and how a value of it is read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import Field, dataclass, field
from typing import Any

from safesteer_lite.runs.durable import parse_json
from safesteer_lite.text import is_unicode

_LONGEST_SHOWN = 100


@dataclass(frozen=True)
class Bounds:
    """What a number may be: from `low` to `high`, both included unless said otherwise.

    The upper ends of counts are far above what helps: they are there so that a slip of the finger, such as one zero too many
    or a date, is told at once instead of computing for months.

    Attributes:
        low, high: the ends.
        above: whether `low` itself is too low.
        below: whether `high` itself is too high.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __contains__(self, number: float) -> bool:
        low = number > self.low if self.above else number >= self.low
        return low and (number < self.high if self.below else number <= self.high)

    def __str__(self) -> str:
        if not self.above and not self.below:
            return f"from {_figure(self.low)} to {_figure(self.high)}"
        low = f"{'above' if self.above else 'at least'} {_figure(self.low)}"
        return f"{low} and {'below' if self.below else 'at most'} {_figure(self.high)}"


def _figure(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def setting(
    default: Any,
    unit: str,
    source: str,
    choices: Sequence[str] = (),
    bounds: Bounds | None = None,
    entries: Bounds | None = None,
    expert: bool = False,
) -> Any:
    """A dataclass field that knows what it may be.

    Args:
        default: its value where nothing else is said.
        unit: what it counts.
        source: where its default comes from.
        choices: the words that it accepts, or that each entry of a list may be; empty for any.
        bounds: of a number, or of each number of a list.
        entries: how many entries a list may have.
        expert: whether hardly anybody wants to change it, so that it is shown only where all settings are asked for.
    """
    told = {
        "unit": unit,
        "source": source,
        "choices": tuple(choices),
        "bounds": bounds,
        "entries": entries,
        "expert": expert,
    }
    return field(default=default, metadata=told)


def converted(raw: Any, item: Field[Any]) -> Any:
    """A value as it was written, from TOML or as text, in the type that the setting has.

    Args:
        raw: the value.
        item: a field that `setting` made.

    Raises:
        ValueError: it is no such value; the message says what is expected.
    """
    default, choices = item.default, item.metadata["choices"]
    if isinstance(default, (int, float)):
        return _number(raw, type(default), item.metadata["bounds"])
    if isinstance(default, tuple):
        entries = _list(raw, type(default[0]), item.metadata["bounds"], item.metadata["entries"])
        if unknown := [entry for entry in entries if choices and entry not in choices]:
            raise ValueError(f"expected some of {', '.join(choices)}, got {_shown(unknown[0])}")
        return entries
    text = _text(raw)
    if choices and text not in choices:
        raise ValueError(f"expected one of {', '.join(choices)}, got {_shown(raw)}")
    return text


def _number(raw: Any, kind: type, bounds: Bounds | None) -> float:
    if isinstance(raw, bool):
        raise ValueError(f"expected a number, got {_shown(raw)}")
    try:
        number: float = kind(raw) if not (kind is int and isinstance(raw, float)) else _whole(raw)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"expected {'a whole number' if kind is int else 'a number'}, got {_shown(raw)}") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(f"expected a finite number, got {_shown(raw)}")
    if bounds and number not in bounds:
        raise ValueError(f"must be {bounds}, got {_shown(raw)}")
    return number


def _list(raw: Any, kind: type, bounds: Bounds | None, entries: Bounds) -> tuple[Any, ...]:
    items = _entries(raw) if isinstance(raw, str) else raw
    if not isinstance(items, (list, tuple)):
        raise ValueError(f"expected a list, got {_shown(raw)}")
    if not items and entries.low:
        raise ValueError(f"must not be empty, got {_shown(raw)}")
    if len(items) not in entries:
        raise ValueError(f"must have {entries} entries, got {len(items)}")
    found = tuple(_text(item) if kind is str else _number(item, kind, bounds) for item in items)
    if "" in found:
        raise ValueError(f"expected no empty entry, got {_shown(raw)}")
    return found


def _entries(raw: str) -> list[Any]:
    """The entries of a list that was written as text: between commas, or as TOML and JSON write a list."""
    with suppress(ValueError):
        if isinstance(found := parse_json(raw), list):
            return found
    return [part.strip() for part in raw.split(",")] if raw.strip() else []


def _text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise ValueError(f"expected text, got {_shown(raw)}")
    if "\0" in raw or not is_unicode(raw):
        raise ValueError(f"expected text without NUL in UTF-8, got {_shown(raw)}")
    return raw


def _shown(raw: Any) -> str:
    """A wrong value as it was given, as far as it fits into a line."""
    try:
        text = repr(raw)
    except (
        ValueError,
        RecursionError,
    ):  # An integer of thousands of digits has no decimal form, a list in lists no end.
        return f"a value of type {type(raw).__name__}"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _whole(raw: float) -> int:
    if raw != int(raw):
        raise ValueError
    return int(raw)

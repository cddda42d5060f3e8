"""As much of Go's `text/template` as the Modelfiles use: fields, `if`, `else if eq`, `range`, `end`; no trimming."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_ACTION = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)


def run(template: str, data: Mapping[str, Any]) -> str:
    """The text that Go would make of a template."""
    pieces = _ACTION.split(template)
    text, rest = _block(pieces, 0, data)
    assert rest == len(pieces), "an `end` too many"
    return text


def _block(pieces: list[str], at: int, data: Mapping[str, Any]) -> tuple[str, int]:
    """Run pieces (text at even places, actions at odd ones) up to the action that closes the block."""
    out = ""
    while at < len(pieces):
        if at % 2 == 0:
            out += pieces[at]
            at += 1
        elif pieces[at] == "end" or pieces[at].startswith("else"):
            return out, at
        elif pieces[at].startswith("if "):
            text, at = _branches(pieces, at, data)
            out += text
        elif pieces[at].startswith("range "):
            items = data[pieces[at].removeprefix("range .")]
            _, end = _block(pieces, at + 1, items[0])
            out += "".join(_block(pieces, at + 1, item)[0] for item in items)
            at = end + 1
        else:
            out += str(data[pieces[at].removeprefix(".")])
            at += 1
    return out, at


def _branches(pieces: list[str], at: int, data: Mapping[str, Any]) -> tuple[str, int]:
    out, done = "", False
    while pieces[at] != "end":
        true = _holds(pieces[at].removeprefix("else ").removeprefix("if "), data)
        text, at = _block(pieces, at + 1, data)
        if true and not done:
            out, done = text, True
    return out, at + 1


def _holds(condition: str, data: Mapping[str, Any]) -> bool:
    if match := re.fullmatch(r'eq \.(\w+) "(\w+)"', condition):
        return bool(data[match[1]] == match[2])
    return bool(data[condition.removeprefix(".")])

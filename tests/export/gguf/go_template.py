"""As much of Go's `text/template` as the Modelfiles use: fields, variables, `if`, `else if eq`, `range`, `end`; no trimming."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_ACTION = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)


@dataclass
class _Scope:
    """What an action can see: the dot, what the template was given (`$`), and the variables."""

    dot: Any
    root: Mapping[str, Any]
    variables: dict[str, Any] = field(default_factory=dict)

    def value(self, name: str) -> Any:
        """A quoted text, a number, `.Field`, `$.Field` or `$variable`."""
        if name.startswith('"'):
            return name.strip('"')
        if name.isdigit():
            return int(name)
        if name.startswith("$."):
            return self.root[name.removeprefix("$.")]
        return self.variables[name] if name.startswith("$") else self.dot[name.removeprefix(".")]


def run(template: str, data: Mapping[str, Any]) -> str:
    """The text that Go would make of a template."""
    pieces = _ACTION.split(template)
    text, rest = _block(pieces, 0, _Scope(data, data))
    assert rest == len(pieces), "an `end` too many"
    return text


def _block(pieces: list[str], at: int, scope: _Scope, runs: bool = True) -> tuple[str, int]:
    """Run pieces (text at even places, actions at odd ones) up to the action that closes the block; or only pass them by."""
    out = ""
    while at < len(pieces):
        action, text, after = pieces[at], "", at + 1
        if at % 2 == 0:
            text = action
        elif action == "end" or action.startswith("else"):
            return out, at
        elif action.startswith("if "):
            text, after = _branches(pieces, at, scope, runs)
        elif action.startswith("range "):
            text, after = _loop(pieces, at, scope, runs)
        elif assignment := re.fullmatch(r"(\$\w+) :?= (\S+)", action):
            if runs:
                scope.variables[assignment[1]] = scope.value(assignment[2])
        elif runs:
            text = str(scope.value(action))
        out, at = out + (text if runs else ""), after
    return out, at


def _loop(pieces: list[str], at: int, scope: _Scope, runs: bool) -> tuple[str, int]:
    head = re.fullmatch(r"range (?:(\$\w+), \$\w+ := )?\.(\w+)", pieces[at])
    assert head, pieces[at]
    out, (_, end) = "", _block(pieces, at + 1, scope, runs=False)
    for place, item in enumerate(scope.dot[head[2]] if runs else ()):
        if head[1]:
            scope.variables[head[1]] = place
        out += _block(pieces, at + 1, _Scope(item, scope.root, scope.variables))[0]
    return out, end + 1


def _branches(pieces: list[str], at: int, scope: _Scope, runs: bool) -> tuple[str, int]:
    out, done = "", not runs
    while pieces[at] != "end":
        true = not done and _holds(pieces[at].removeprefix("else ").removeprefix("if "), scope)
        text, at = _block(pieces, at + 1, scope, runs=true)
        out, done = out + text, done or true
    return out, at + 1


def _holds(condition: str, scope: _Scope) -> bool:
    if match := re.fullmatch(r"eq \(len \(slice (\S+) (\S+)\)\) (\d+)", condition):
        return len(scope.value(match[1])[scope.value(match[2]) :]) == int(match[3])
    if match := re.fullmatch(r"eq (\S+) (\S+)", condition):
        return bool(scope.value(match[1]) == scope.value(match[2]))
    return bool(scope.value(condition))

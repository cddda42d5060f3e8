"""Plain lines: whole in a file, wrapped between words at a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from safesteer_lite.events import Note
from safesteer_lite.shell.lines import Lines

MESSAGE = "4-bit weights unpacked once to bf16 on the CPU: the same numbers, faster, 988.1 MB of memory."


@pytest.mark.parametrize("terminal", [True, False])
def test_a_note_is_not_broken_within_a_word(terminal: bool) -> None:
    stream = io.StringIO()
    Lines(Console(file=stream, width=40, force_terminal=terminal, color_system=None))(Note("load", MESSAGE))
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    if not terminal:
        assert lines == [f"   {MESSAGE}"]
        return
    assert len(lines) > 2 and all(line.startswith("   ") and len(line) <= 40 for line in lines)
    assert " ".join(line.strip() for line in lines) == MESSAGE

"""The standard streams: every text can be written to them, whatever their encoding, and none steers the terminal.

Nothing else in the package writes to them, but for `shell.console`, which paints.
"""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings

from safesteer_lite.text import visible


def protect() -> None:
    """Give each stream a way to write what its encoding lacks, and make visible what libraries log and warn of.

    A pipe on Windows, the C locale and `PYTHONIOENCODING` know few characters: the others are written as escapes, instead of
    ending a run. What is typed may be no text of the encoding either: it comes as lone surrogates, which whoever reads refuses.
    """
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != errors:
            stream.reconfigure(errors=errors)
    logging.setLogRecordFactory(_VisibleRecord)
    warnings.formatwarning = _visible_warning


def tell(text: str) -> None:
    """Lines on standard output."""
    sys.stdout.write(visible(text, lines=True) + "\n")


def complain(text: str) -> None:
    """Lines on standard error."""
    sys.stderr.write(visible(text, lines=True) + "\n")


def tell_json(record: object, indent: int | None = None) -> None:
    """JSON on standard output, of ASCII characters alone: whole in any encoding, and exact once it is read.

    Args:
        record: anything that JSON holds.
        indent: spaces a level; without it everything is on one line.
    """
    sys.stdout.write(json.dumps(record, indent=indent) + "\n")


class _VisibleRecord(logging.LogRecord):
    """What a library logs, with the names and texts of a model that it may quote."""

    def getMessage(self) -> str:
        return visible(super().getMessage(), lines=True)


def _visible_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"{filename}:{lineno}: {category.__name__}: {visible(str(message), lines=True)}\n"

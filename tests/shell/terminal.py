"""A program in a terminal of its own: keys go in, and what it shows is waited for."""

from __future__ import annotations

import codecs
import os
import re
import select
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

if sys.platform != "win32":
    import fcntl
    import pty
    import termios

ENTER, ESCAPE, INTERRUPT, END, DOWN, CLEAR = "\r", "\x1b", "\x03", "\x04", "\x1b[B", "\x15"
_MARKUP = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[()][A-Z0-9]|\x1b[=>78]|\x1b\][^\x07]*\x07")


class Terminal:
    """A pseudo-terminal with a program in it."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        columns: int = 80,
        rows: int = 24,
    ) -> None:
        """Start the program.

        Args:
            command: the program with its arguments.
            folder: where it starts.
            environment: variables besides this process's own.
            columns, rows: the terminal's size.
        """
        self._main, inner = pty.openpty()
        self.resize(columns, rows)
        variables = {**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", **(environment or {})}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            variables.pop(name, None)
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=variables,
            stdin=inner,
            stdout=inner,
            stderr=inner,
            # The terminal must be the program's controlling one, or Ctrl-C would reach nobody.
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(inner)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.raw = ""
        self._seen = 0

    @property
    def text(self) -> str:
        """Everything shown so far, without colours and cursor movements."""
        return _MARKUP.sub("", self.raw).replace("\r", "")

    def send(self, keys: str) -> None:
        """Press keys."""
        os.write(self._main, keys.encode())

    def expect(self, words: str, seconds: float = 60.0) -> str:
        """Wait until `words` are shown after what was last expected; spaces and line ends count alike.

        Returns:
            What was shown up to them.
        """
        pattern = re.compile(r"\s+".join(map(re.escape, words.split())))
        until = time.monotonic() + seconds
        while True:
            shown = self.text
            if found := pattern.search(shown, self._seen):
                before, self._seen = shown[self._seen : found.start()], found.end()
                return before
            if time.monotonic() > until or not self._read(0.2):
                raise AssertionError(f"{words!r} was not shown. Shown was:\n{shown[self._seen :]}")

    def answer(self, question: str, keys: str, seconds: float = 60.0) -> str:
        """Wait for a question, and press keys; returns what was shown before it."""
        before = self.expect(question, seconds)
        self._wait_for_raw_mode()
        self.send(keys)
        return before

    def resize(self, columns: int, rows: int) -> None:
        """Change the terminal's size, as dragging its corner does."""
        fcntl.ioctl(self._main, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def close(self) -> None:
        """Close the window."""
        os.close(self._main)

    def end(self, seconds: float = 60.0) -> int:
        """Wait for the program to end; returns its exit code."""
        until = time.monotonic() + seconds
        while self._read(0.2) and time.monotonic() < until:
            pass
        return self.process.wait(max(until - time.monotonic(), 1.0))

    def _read(self, seconds: float) -> bool:
        """Take in what is there; False once the program has closed the terminal."""
        ready, _, _ = select.select([self._main], [], [], seconds)
        if ready:
            try:
                content = os.read(self._main, 65536)
            except OSError:  # Linux reports the other side's end like this.
                return False
            self.raw += self._decoder.decode(content)
            return bool(content)
        return True

    def _wait_for_raw_mode(self) -> None:
        """The words may be on the screen a moment before the program listens for keys as keys, not for lines."""
        until = time.monotonic() + 10
        while termios.tcgetattr(self._main)[3] & termios.ICANON and time.monotonic() < until:
            self._read(0.01)


def program(*arguments: str) -> list[str]:
    """The command line of safesteer-lite in this environment."""
    return [sys.executable, "-m", "safesteer_lite", *arguments]

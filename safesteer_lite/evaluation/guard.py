"""The process in which a program that a model wrote is run: reads it from standard input and runs it within limits.

It ends with `PASSED` only where the program ran to its end without an error. The limits hinder accidents: much time, memory
or disk, files written elsewhere, other programs, the network. They are no sandbox, and a program that wants to get round
them can. `evaluation.programs` starts it, as a file of its own, since importing the package would take seconds a program.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PASSED = 17
"""The exit status of a program that did all it should; one that ends itself early has another."""
SECONDS = 5
"""Of processor time."""
MEMORY_BYTES = 1 << 30
FILE_BYTES = 1 << 20
OPEN_FILES = 32

# Events of Python's own audit (PEP 578), by the beginning of their names: none of them is needed to compute something.
_REFUSED = (
    "ctypes.",
    "ftplib.",
    "http.",
    "imaplib.",
    "os.chmod",
    "os.chown",
    "os.exec",
    "os.fork",
    "os.kill",
    "os.link",
    "os.mkdir",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.spawn",
    "os.startfile",
    "os.symlink",
    "os.system",
    "os.truncate",
    "pty.spawn",
    "shutil.",
    "smtplib.",
    "socket.",
    "subprocess.",
    "urllib.",
    "winreg.",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    """Run the program that standard input holds, and end with `PASSED` or something else."""
    program = sys.stdin.buffer.read().decode("utf-8")
    _limit()
    folder = Path.cwd().resolve()

    def refuse(event: str, arguments: tuple[object, ...]) -> None:
        if event.startswith(_REFUSED) or (event == "open" and _writes_outside(folder, arguments)):
            raise PermissionError(f"{event} is not allowed here")

    sys.addaudithook(refuse)
    try:
        exec(compile(program, "answer", "exec"), {"__name__": "__main__"})
    except BaseException:  # A program that calls `sys.exit` has not done what it should either.
        os._exit(1)
    # At once, whatever the program has left running or registered for the end.
    os._exit(PASSED)


def _limit() -> None:
    """The system's own limits; Windows has none that a process can give itself."""
    try:
        import resource
    except ImportError:
        return
    for kind, most in (
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):  # macOS does not know all of them.
            continue


def _writes_outside(folder: Path, arguments: tuple[object, ...]) -> bool:
    """Whether an `open` event, (path, mode, flags), writes to a file that is not in this folder."""
    path, _, flags = arguments
    if not isinstance(flags, int) or not flags & _WRITING or not isinstance(path, str | bytes | os.PathLike):
        return False
    return not Path(os.fsdecode(path)).resolve().is_relative_to(folder)


if __name__ == "__main__":
    main()

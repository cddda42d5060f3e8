"""Other processes: how they are started so that the folder a user works in decides nothing about what they run.

Python looks for modules in the current folder first when it is started with `-c` or `-m`, and Windows looks there first for
programs. A folder that was downloaded may hold a `torch.py`, and nobody who types a command there has asked for it to be run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_PACKAGE_HOME = Path(__file__).resolve().parent.parent


def python(*arguments: str) -> list[str]:
    """The command that starts this Python once more, blind to modules in the current folder.

    Args:
        arguments: what follows the interpreter's name, such as `-m` and a module.
    """
    return [sys.executable, "-P", *arguments]


def python_code(code: str, *arguments: str) -> list[str]:
    """Like `python`, for a line of code that may import this package, also where the package is not installed.

    Args:
        code: what to run; its `sys.argv` is `-c` and then `arguments`.
    """
    # The package's own home comes last on the path, so that nothing beside it hides a module of the standard library.
    return python("-c", f"import sys; sys.path.append(sys.argv.pop(1)); {code}", str(_PACKAGE_HOME), *arguments)


def program(name: str) -> str | None:
    """Where a program of the system is, by the absolute folders of `PATH` alone; None where it is in none of them.

    Args:
        name: without the ending that Windows wants.
    """
    file = f"{name}.exe" if os.name == "nt" else name
    folders = (Path(entry) for entry in os.environ.get("PATH", "").split(os.pathsep))
    places = (folder / file for folder in folders if folder.is_absolute())
    return next((str(place) for place in places if place.is_file() and os.access(place, os.X_OK)), None)


def environment(**changes: str) -> dict[str, str]:
    """This process's environment for a child, with some variables changed, blind to modules in the current folder.

    Kernels that transformers would fetch from the model hub are switched off.

    An empty or relative entry in `PYTHONPATH` means the current folder or one below it. Such an entry often comes about
    by accident, from joining a variable that was not set, and is left out.
    """
    variables = {**os.environ, "PYTHONSAFEPATH": "1", "USE_HUB_KERNELS": "0", **changes}
    entries = [entry for entry in variables.get("PYTHONPATH", "").split(os.pathsep) if Path(entry).is_absolute()]
    if entries:
        return {**variables, "PYTHONPATH": os.pathsep.join(entries)}
    variables.pop("PYTHONPATH", None)
    return variables

"""A model's folder: which files lie in it, and what is wrong with it, told at once."""

from __future__ import annotations

import fnmatch
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safesteer_lite.errors import ModelError
from safesteer_lite.runs import durable

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The index of a model of hundreds of parts, and a tokenizer's settings, take a few megabytes.
_LARGEST_JSON = 50_000_000

UNWANTED = ("*/*", "consolidated*")
"""Files that never count: some repositories hold the same weights twice, or other formats in folders of their own."""

AGAIN = "Copy or download the model again."
"""What to do about a file that is damaged or missing."""


@dataclass
class Findings:
    """What is wrong with a model's folder.

    Attributes:
        folder: where it lies.
        problems: what was found, each a clause without a full stop, with what to do about it.
    """

    folder: Path
    problems: list[tuple[str, str]] = field(default_factory=list)

    def add(self, problem: str, advice: str) -> None:
        """Note one problem."""
        self.problems.append((problem, advice))

    def report(self) -> None:
        """Raise if there is a problem.

        Raises:
            ModelError: names them all.
        """
        if not self.problems:
            return
        told = [problem for problem, _ in self.problems]
        # A line for each, as soon as there are two: sentences in a row would hide the second.
        what = f" {told[0]}." if len(told) == 1 else "".join(f"\n  {problem}." for problem in told)
        advice = " ".join(dict.fromkeys(advice for _, advice in self.problems))
        raise ModelError(f"{self.folder} cannot be used:{what}", advice)


def read_json(folder: Path, name: str, findings: Findings, *, needed: bool = False) -> dict[str, Any] | None:
    """One of the JSON files of a model's folder; None if it is not there or cannot be used, which is noted.

    Args:
        folder: where the model lies.
        name: of the file.
        findings: takes what is wrong with it.
        needed: whether the folder must have it.
    """
    path = folder / name
    try:
        content = durable.parse_json(durable.read_bytes(path, _LARGEST_JSON))
    except FileNotFoundError:
        # A link that leads nowhere is there and cannot be read.
        if needed or path.is_symlink():
            findings.add(f"it has no {name}, so it is not a whole model's folder", "Check the path.")
        return None
    except (OSError, MemoryError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "out of memory"
        findings.add(f"{name} cannot be read ({why})", "Check the file and its permissions.")
        return None
    except ValueError as error:
        findings.add(f"{name} is not valid JSON ({error})", AGAIN)
        return None
    if not isinstance(content, dict):
        findings.add(f"{name} holds no settings", AGAIN)
        return None
    return content


def missing_weights(folder: Path) -> list[str]:
    """The weight files that `folder` should hold and does not; `*.safetensors` stands for all of them.

    Raises:
        ModelError: its index cannot be used.
    """
    findings = Findings(folder)
    names = weight_files(folder, findings)
    findings.report()
    return [name for name in names if not (folder / name).is_file()] if names else ["*.safetensors"]


def weight_files(folder: Path, findings: Findings) -> list[str]:
    """The names of the weight files that libraries would load, whether they are there or not; empty if there are none."""
    if (folder / INDEX).exists():
        index = read_json(folder, INDEX, findings)
        if index is None:
            return []
        places = index.get("weight_map")
        if not isinstance(places, dict) or not places:
            findings.add(f"{INDEX} has no weight_map", AGAIN)
            return []
        odd = [name for name in places.values() if not _is_plain(name)]
        if odd:
            # A name such as ../other/model.safetensors would take weights from elsewhere.
            findings.add(f"{INDEX} names {brief(odd[0])}, which is no file of this folder", AGAIN)
            return []
        return sorted(set(places.values()))
    return [WEIGHTS] if (folder / WEIGHTS).exists() else []


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name and "\\" not in name


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file's name fits one of the `patterns` (as in a shell) and none of `UNWANTED`."""
    wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    return wanted and not any(fnmatch.fnmatchcase(name, pattern) for pattern in UNWANTED)


def brief(value: object) -> str:
    """A value from somebody's file as a message can show it, however large it is."""
    return value if isinstance(value, str) and 0 < len(value) <= 80 else reprlib.repr(value)


def few(names: Sequence[str]) -> str:
    """The first names, and how many there are beyond."""
    rest = len(names) - 3
    return ", ".join(map(brief, names[:3])) + (f" and {rest} more" if rest > 0 else "")

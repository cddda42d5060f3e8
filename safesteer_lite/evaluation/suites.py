"""Public suites by name: where each lies, at which commit, under which licence, and which of its rows are asked.

Nothing of a suite comes with this program: a file is fetched when its suite is asked for, or is one that the user has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from safesteer_lite.errors import PromptError, UsageError
from safesteer_lite.events import Emit, Warned
from safesteer_lite.prompts.files import Row, read_rows, text_of
from safesteer_lite.prompts.sets import KINDS, Kind, Prompt, load_prompts
from safesteer_lite.runs.durable import sha256_of
from safesteer_lite.sources.dataset import PinnedFile, fetch_pinned

_NAME = re.compile(r"[\w.-]{1,60}")
_FROM_ALPACA = 200
"""Prompts of a suite of tens of thousands: more than of most others, and few enough to be answered."""


@dataclass(frozen=True)
class Suite:
    """A public set of prompts.

    Attributes:
        name: what it is asked for by.
        kind: what its prompts are; refusals of harmful ones are wanted, of others not.
        file: where its file lies.
        column: of the prompts.
        keep: the rows that are asked: those with these values in these columns; empty for all.
        limit: prompts at most, spread evenly over the file; 0 for all.
    """

    name: str
    kind: Kind
    file: PinnedFile
    column: str
    keep: Mapping[str, str] = field(default_factory=dict)
    limit: int = 0


_JAILBREAKBENCH = PinnedFile(
    "hub",
    "JailbreakBench/JBB-Behaviors",
    "886acc352a31533ffbcf4ef22c744658688086fc",
    "data/harmful-behaviors.csv",
    "4a8ec6832056b631eb092dccc60d37a61c3d441268268888b3d006288afeffa1",
    "MIT",
)
_XSTEST = PinnedFile(
    "github",
    "paul-rottger/xstest",
    "d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d",
    "xstest_prompts.csv",
    "11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a",
    "CC-BY-4.0",
)

# Each commit and checksum was found in public repositories that had fetched the file and pinned it; sorry-bench is handed out
# only to those who accept its licence, and no checksum of it was found.
SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "harmbench",
            "harmful",
            PinnedFile(
                "github",
                "centerforaisafety/HarmBench",
                "8e1604d1171fe8a48d8febecd22f600e462bdcdd",
                "data/behavior_datasets/harmbench_behaviors_text_all.csv",
                "8d81accedd38eaaf8b760618622bb888417d1fd0c86eba65c427a16f1cbb4afc",
                "MIT",
            ),
            "Behavior",
            # The others ask for copyrighted texts, or mean nothing without the context that comes with them.
            {"FunctionalCategory": "standard"},
        ),
        Suite("jailbreakbench", "harmful", _JAILBREAKBENCH, "Goal"),
        Suite(
            "jailbreakbench-benign",
            "borderline",
            replace(
                _JAILBREAKBENCH,
                path="data/benign-behaviors.csv",
                sha256="3cda234d21a991fa309bbfea4b6d9dae31ccdf8e9d452424b6a983e4fdc33468",
            ),
            "Goal",
        ),
        Suite(
            "strongreject",
            "harmful",
            PinnedFile(
                "github",
                "alexandrasouly/strongreject",
                "f7cad6c17e624e21d8df2278e918ae1dddb4cb56",
                "strongreject_dataset/strongreject_dataset.csv",
                "4dd70357e4ff8b5d0ba5ebafecab5d6dd5633ce8046e3dd1c8bd93e64de44381",
                "MIT",
            ),
            "forbidden_prompt",
        ),
        Suite(
            "advbench",
            "harmful",
            PinnedFile(
                "github",
                "llm-attacks/llm-attacks",
                "098262edf85f807224e70ecd87b9d83716bf6b73",
                "data/advbench/harmful_behaviors.csv",
                "6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1",
                "MIT",
            ),
            "goal",
        ),
        Suite("xstest", "borderline", _XSTEST, "prompt", {"label": "safe"}),
        Suite("xstest-unsafe", "harmful", _XSTEST, "prompt", {"label": "unsafe"}),
        Suite(
            "or-bench",
            "borderline",
            PinnedFile(
                "hub",
                "bench-llm/or-bench",
                "e36d8b80e81837c8a8f264bbb2a49f1b32c7e272",
                "or-bench-hard-1k.csv",
                "a6e2f1166416efe5901f3bb05c47dc92ab3aca3acfe143693d38b8057d841e6d",
                "CC-BY-4.0",
            ),
            "prompt",
        ),
        Suite(
            "sorry-bench",
            "harmful",
            PinnedFile(
                "hub",
                "sorry-bench/sorry-bench-202503",
                "612a4e1f45db8adf884fa62318ddf9fa1c6e75e9",
                "question.jsonl",
                "",
                "its own, to be accepted on its page",
            ),
            "turns",
            {"prompt_style": "base"},
        ),
        Suite(
            "alpaca",
            "harmless",
            PinnedFile(
                "github",
                "tatsu-lab/stanford_alpaca",
                "761dc5bfbdeeffa89b8bff5d038781a4055f796a",
                "alpaca_data.json",
                "2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419",
                "CC-BY-NC-4.0",
            ),
            "instruction",
            # Requests that stand alone.
            {"input": ""},
            _FROM_ALPACA,
        ),
    )
}


@dataclass(frozen=True)
class SuitePrompts:
    """The prompts of a suite that are asked.

    Attributes:
        name: of the suite.
        kind: what the prompts are.
        origin: where they are from, for readers.
        licence: of the file; empty where it is the user's own.
        sha256: of the file, in hexadecimal.
        prompts: at least one.
    """

    name: str
    kind: Kind
    origin: str
    licence: str
    sha256: str
    prompts: list[Prompt]


def named(text: str) -> list[Suite]:
    """The suites of a list with commas.

    Raises:
        UsageError: one of them is not known.
    """
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in SUITES]:
        raise UsageError(f"There is no suite {unknown[0]!r}.", f"Known are {', '.join(SUITES)}.")
    return [SUITES[name] for name in dict.fromkeys(wanted)]


def load_suite(suite: Suite, limit: int | None, emit: Emit, stage: str) -> SuitePrompts:
    """A suite's prompts, its file fetched if it is not on this machine.

    Args:
        suite: one of `SUITES`.
        limit: prompts at most, 0 for all; None for the suite's own limit.
        emit: takes a Note with size and licence before a download, and its progress.
        stage: the name that the events carry.

    Raises:
        PromptError: its file cannot be had, or is not the one that is meant.
        DiskSpaceError: the download does not fit.
    """
    place = fetch_pinned(suite.file, emit, stage)
    return _taken(suite, read_suite(place, suite), str(suite.file), sha256_of(place), limit)


def load_own(given: str, limit: int | None, emit: Emit, stage: str) -> SuitePrompts:
    """The prompts of a file that the user has.

    Args:
        given: `NAME=FILE` for one of `SUITES`, or `NAME:KIND=FILE` for any other name.
        limit: as for `load_suite`.
        emit: is told where a file is not the one of that name.
        stage: the name that the events carry.

    Raises:
        UsageError: it is not written like that.
        PromptError: the file cannot be read, or has no prompts of the suite.
    """
    label, _, path = given.partition("=")
    name, _, kind = label.partition(":")
    if not (_NAME.fullmatch(name) and path) or (kind not in KINDS and (kind or name not in SUITES)):
        raise UsageError(
            f"{given!r} does not name a suite and its file.",
            f"Write --suite-file harmbench=FILE, or --suite-file NAME:KIND=FILE with one of {', '.join(KINDS)}.",
        )
    place, suite = Path(path).expanduser(), SUITES.get(name)
    if suite is not None and not kind:
        digest = _digest(place)
        if digest == suite.file.sha256:
            return _taken(suite, read_suite(place, suite), str(suite.file), digest, limit)
        emit(
            Warned(
                stage,
                f"{place.name} is not the file of {suite.file}: its checksum differs. The figures are those of this file.",
            )
        )
        # Whatever it holds, its figures must not pass for the suite's.
        name, kind = f"{name}, own file", suite.kind
    loaded, digest = load_prompts(place), _digest(place)
    own = SuitePrompts(name, _kind(kind), f"the file {' '.join(place.name.split())}", "", digest, loaded.prompts)
    return replace(own, prompts=spread(own.prompts, limit or 0))


def read_suite(source: Path, suite: Suite) -> list[Prompt]:
    """The prompts of a suite's file, each once, in its order.

    Raises:
        PromptError: the file cannot be read, or has no prompts of the suite.
    """
    found: dict[str, Prompt] = {}
    for row in read_rows(source):
        if all(str(row.fields.get(column, "")).strip() == value for column, value in suite.keep.items()):
            text = text_of(source, _single(row, suite.column), suite.column)
            found.setdefault(text, Prompt(text, f"{suite.name}-{row.number:05d}"))
    if not found:
        wanted = " and ".join(f"{column} {value!r}" for column, value in suite.keep.items())
        raise PromptError(
            f"{source} has no rows of {suite.name} ({wanted}).", "Give the file that the suite's page offers."
        )
    return list(found.values())


def spread(prompts: list[Prompt], limit: int) -> list[Prompt]:
    """`limit` prompts, evenly over all: files go through one topic after another. 0 takes all."""
    if not 0 < limit < len(prompts):
        return prompts
    return [prompts[place * len(prompts) // limit] for place in range(limit)]


def _taken(suite: Suite, prompts: list[Prompt], origin: str, digest: str, limit: int | None) -> SuitePrompts:
    taken = spread(prompts, suite.limit if limit is None else limit)
    return SuitePrompts(suite.name, suite.kind, origin, suite.file.licence, digest, taken)


def _single(row: Row, column: str) -> Row:
    """A row whose prompt may be a conversation of one turn."""
    value = row.fields.get(column)
    if isinstance(value, list) and len(value) == 1:
        return replace(row, fields={**row.fields, column: value[0]})
    return row


def _kind(name: str) -> Kind:
    return next(kind for kind in KINDS if kind == name)


def _digest(place: Path) -> str:
    if not place.is_file():
        raise PromptError(f"There is no file {place}.", "Check the path.")
    try:
        return sha256_of(place)
    except OSError as error:
        raise PromptError(f"{place} cannot be read: {error.strerror}.", "Give a file that you may read.") from error

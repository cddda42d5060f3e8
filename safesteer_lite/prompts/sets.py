"""Prompt sets: the bundled ones, a user's own file, and the check that nothing trained on is also tested on.

Two prompts are near-duplicates when the Jaccard similarity of their content words reaches `NEAR_DUPLICATE`. Content
words are the words left after folding case and punctuation and dropping English function words; their order does not
count. Prompts that differ only in case or punctuation have similarity 1.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

from safesteer_lite.errors import PromptError
from safesteer_lite.prompts.files import PLAIN, Row, read_rows, text_of

COLUMNS = ("instruction", "prompt", "text")
"""Columns that hold the prompt when the user names none, the first one present wins."""

NEAR_DUPLICATE = 0.6
"""Jaccard similarity of content words from which two prompts count as the same request."""

Kind = Literal["harmful", "harmless", "borderline", "critical", "twin"]
KINDS: tuple[Kind, ...] = ("harmful", "borderline", "harmless", "twin", "critical")
"""In the order in which they are told."""

OPTIONAL: tuple[Kind, ...] = ("twin", "critical")
"""Kinds that a folder of prompts need not have, and that runs of earlier versions were not asked."""

# More of a value than any table has room for.
_SHOWN_LENGTH = 1000

_FUNCTION_WORDS = """
a about all am an and any are as at be been but by can could did do does for from give had has have he help her him his
how i id if im in into is it its lets me my of off on or our out please she should show so some tell than that the their
them there these they this those to up us was we were what whats when where which who why will with would you your
"""
_IGNORED = frozenset(_FUNCTION_WORDS.split())
_WORD = re.compile(r"\w+")
_APOSTROPHE = re.compile(r"['’]")
# Chinese and Japanese are written without spaces, so a run of such characters is no word.
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]{2,}")


@dataclass(frozen=True)
class Prompt:
    """One request to a model.

    Args:
        text: the user's turn, without any chat template.
        id: unique within its set: `harmful-test-007`, or the file's name and the row.
        category: what the request is about; empty when unknown.
        language: an ISO 639-1 code.
    """

    text: str
    id: str
    category: str = ""
    language: str = "en"


@dataclass(frozen=True)
class LoadedPrompts:
    """The prompts of a file, in file order, and what was decided on the way.

    Args:
        prompts: at least one; no two with the same text.
        duplicates_removed: how many rows repeated an earlier text exactly.
        columns: the columns the texts came from: one, or an instruction and its input; none for a plain list of texts.
    """

    prompts: list[Prompt]
    duplicates_removed: int
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Preview:
    """What the wizard shows of a file before a column is chosen.

    Args:
        columns: all columns in order of appearance; empty for a plain list of texts.
        rows: the first rows, values as text, aligned with `columns` (one value each for a plain list of texts).
        total: number of rows in the file.
        suggested: the column `load_prompts` would take by itself; None if there is no such column.
    """

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    total: int
    suggested: str | None


@dataclass(frozen=True)
class Leak:
    """A training prompt to drop, with the held-out prompt it (nearly) repeats and their similarity (0 to 1)."""

    prompt: Prompt
    held_out: Prompt
    similarity: float


def prompt_set(kind: Kind, split: str, limit: int | None = None, folder: str = "") -> list[Prompt]:
    """One split of one kind of prompts.

    Args:
        kind: `harmful`, `harmless`, `borderline` (harmless requests in alarming words), `critical` (requests for help
            in danger, where a refusal does harm) or `twin` (harmless requests in the words of the harmful ones of its place).
        split: `direction`, `selection`, `train` or `test`; borderline and critical have no `direction`.
        limit: at most so many prompts, spread evenly over the categories; None for the whole split.
        folder: where `harmful.jsonl`, `harmless.jsonl` and `borderline.jsonl` lie, each line with `prompt` and `split`
            and perhaps `id`, `category` and `language`; empty for the ones that ship with the package. Where it has no
            `critical.jsonl` or `twin.jsonl`, the bundled one is taken.

    Raises:
        PromptError: there is no such split, the limit is below 1, or a file of `folder` is missing or malformed.
    """
    splits = _splits(kind, folder)
    if split not in splits:
        raise PromptError(
            f"The {kind} prompts of {folder or 'the package'} have no split '{split}'.",
            f"Choose one of: {', '.join(splits)}." if splits else f"Give {kind}.jsonl lines with prompt and split.",
        )
    if limit is not None and limit < 1:
        raise PromptError(f"A limit of {limit} prompts leaves none.", "Ask for at least 1.")
    # Each split's lines go round the categories in turn, so that any leading slice is an even spread.
    return list(splits[split][:limit])


def data_files(folder: str = "") -> list[Path]:
    """The prompt files of a folder, or the bundled ones, in a fixed order."""
    bundled = Path(str(files("safesteer_lite") / "data"))
    place = Path(folder) if folder else bundled
    own = [place / f"{kind}.jsonl" for kind in sorted(get_args(Kind))]
    # Help in danger and twins are measured, and are anchors, even where somebody who brings other prompts did not think of them.
    return [bundled / path.name if path.stem in OPTIONAL and not path.exists() else path for path in own]


def load_prompts(source: Path, column: str | None = None) -> LoadedPrompts:
    """Read prompts from a .jsonl, .json, .csv or .txt file, UTF-8 with or without a byte order mark.

    Args:
        source: JSON Lines; a JSON list, or an object that holds one list; CSV with a header (comma, semicolon or tab);
            or text with one prompt a line. Entries are texts, or objects with a column for the text and perhaps
            `category` and `language`. Blank lines do not count.
        column: where the text is; None takes the first of `COLUMNS` that is there. What a column named `input` holds is
            part of the request in a column named `instruction`, and comes behind it.

    Raises:
        PromptError: the file cannot be read, is empty or malformed, or lacks the column; names the line or entry.
    """
    rows = read_rows(source)
    columns = _columns(rows)
    found = _find_column(columns, column)
    if found is None and (columns or column is not None):
        wanted = f"'{column}'" if column is not None else " or ".join(f"'{name}'" for name in COLUMNS)
        there = f"The columns there are: {', '.join(columns)}. Name the one that holds the prompts."
        hint = there if columns else "It is a plain list without columns: name none."
        raise PromptError(f"{source} has no column {wanted}.", hint)
    extra = next((name for name in columns if _folded(name) == "input"), "") if _folded(found) == "instruction" else ""
    prompts: dict[str, Prompt] = {}
    for row in rows:
        text = text_of(source, row, found or PLAIN, extra)
        language = _label(row, "language") or "en"
        prompt = Prompt(text, f"{source.stem}-{row.number:05d}", _label(row, "category"), language)
        prompts.setdefault(text, prompt)
    return LoadedPrompts(list(prompts.values()), len(rows) - len(prompts), tuple(filter(None, (found, extra))))


def preview(source: Path, rows: int = 3) -> Preview:
    """The columns and the first `rows` rows of a prompt file.

    Raises:
        PromptError: the file cannot be read, is empty or malformed.
    """
    records = read_rows(source)
    columns = _columns(records)
    shown = [tuple(_shown(row.fields.get(name)) for name in columns or (PLAIN,)) for row in islice(records, rows)]
    return Preview(columns, shown, len(records), _find_column(columns, None))


def check_leaks(train: list[Prompt], held_out: list[Prompt], threshold: float = NEAR_DUPLICATE) -> list[Leak]:
    """The training prompts to drop because they equal, or nearly equal, a held-out one.

    Args:
        train: prompts the student would learn on.
        held_out: prompts it will be measured on.
        threshold: least Jaccard similarity of content words that counts, above 0 and at most 1.

    Returns:
        One entry for each training prompt to drop, in training order, with the held-out prompt most like it.
    """
    worst: dict[Prompt, Leak] = {}
    for prompt, other, similarity in similar_pairs(train, held_out, threshold):
        if prompt not in worst or similarity > worst[prompt].similarity:
            worst[prompt] = Leak(prompt, other, similarity)
    return list(worst.values())


def content_words(text: str) -> frozenset[str]:
    """The words of `text` that say what it is about; never empty, so that a text always equals itself."""
    folded = _APOSTROPHE.sub("", unicodedata.normalize("NFKC", text).casefold())
    spaced = _UNSPACED.sub(lambda run: f" {' '.join(_character_pairs(run.group()))} ", folded)
    words = frozenset(_WORD.findall(spaced))
    return words - _IGNORED or words or frozenset({folded.strip()})


def _character_pairs(run: str) -> list[str]:
    return [run[start : start + 2] for start in range(len(run) - 1)]


def similar_pairs(
    first: list[Prompt], second: list[Prompt], threshold: float = NEAR_DUPLICATE
) -> Iterator[tuple[Prompt, Prompt, float]]:
    """Every pair of one prompt of `first` and one of `second` whose content words are alike, with how alike they are.

    Args:
        first: in any number; pairs come in this order.
        second: likewise; may be `first` itself, and then each prompt is also paired with itself.
        threshold: least Jaccard similarity, above 0 and at most 1.
    """
    # An index from words to prompts finds them without comparing each with each.
    second_words = [content_words(prompt.text) for prompt in second]
    holders: defaultdict[str, list[int]] = defaultdict(list)
    for position, words in enumerate(second_words):
        for word in words:
            holders[word].append(position)
    for prompt in first:
        words = content_words(prompt.text)
        shared = Counter(position for word in words for position in holders.get(word, ()))
        for position, common in sorted(shared.items()):
            similarity = common / (len(words) + len(second_words[position]) - common)
            if similarity >= threshold:
                yield prompt, second[position], similarity


@cache
def _splits(kind: Kind, folder: str) -> dict[str, tuple[Prompt, ...]]:
    source = next(path for path in data_files(folder) if path.stem == kind)
    splits: defaultdict[str, list[Prompt]] = defaultdict(list)
    for row in read_rows(source):
        split = _label(row, "split")
        if not split:
            raise PromptError(f"{source}: {row.unit} {row.number} names no split.", "Give each line a `split`.")
        text = text_of(source, row, "prompt")
        name = _label(row, "id") or f"{source.name}:{row.number}"
        splits[split].append(Prompt(text, name, _label(row, "category"), _label(row, "language") or "en"))
    return {split: tuple(prompts) for split, prompts in splits.items()}


def _columns(rows: list[Row]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for row in rows for name in row.fields if name != PLAIN))


def _find_column(columns: tuple[str, ...], wanted: str | None) -> str | None:
    """The column named `wanted`, or the first of `COLUMNS` in any case; None if it is not there."""
    if wanted is not None:
        return wanted if wanted in columns else None
    folded = {_folded(name): name for name in reversed(columns)}
    return next((folded[name] for name in COLUMNS if name in folded), None)


def _folded(name: str | None) -> str:
    return (name or "").strip().casefold()


def _label(row: Row, name: str) -> str:
    value = row.fields.get(name)
    return value.strip() if isinstance(value, str) else ""


def _shown(value: object) -> str:
    if value is None:
        return ""
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))[:_SHOWN_LENGTH]

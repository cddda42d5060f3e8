"""Prompt sets: the bundled ones, a user's own file, and the check that nothing trained on is also tested on.

Two prompts are near-duplicates when the Jaccard similarity of their content words reaches `NEAR_DUPLICATE`. Content
words are the words left after folding case and punctuation and dropping English function words; their order does not
count. Prompts that differ only in case or punctuation have similarity 1.
"""

from __future__ import annotations

import csv
import io
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
from typing import Literal

from safesteer_lite.errors import PromptError

COLUMNS = ("instruction", "prompt", "text")
"""Columns that hold the prompt when the user names none, the first one present wins."""

NEAR_DUPLICATE = 0.6
"""Jaccard similarity of content words from which two prompts count as the same request."""

Kind = Literal["harmful", "harmless", "borderline"]

# Every format is read into rows: the 1-based line or entry that an error message points to, and the fields found there.
_Row = tuple[int, dict[str, object]]
_PLAIN = ""  # The field of a row that is a text and no object.

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
        column: the column the texts came from; None for a plain list of texts.
    """

    prompts: list[Prompt]
    duplicates_removed: int
    column: str | None


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


def bundled(kind: Kind, split: str, limit: int | None = None) -> list[Prompt]:
    """The prompts that ship with the package.

    Args:
        kind: `harmful`, `harmless` or `borderline` (harmless requests in alarming words).
        split: `direction`, `selection`, `train` or `test`; borderline has no `direction`.
        limit: at most so many prompts, spread evenly over the categories; None for the whole split.

    Raises:
        PromptError: there is no such split, or the limit is below 1.
    """
    splits = _bundled_splits(kind)
    if split not in splits:
        raise PromptError(
            f"The bundled {kind} prompts have no split '{split}'.", f"Choose one of: {', '.join(splits)}."
        )
    if limit is not None and limit < 1:
        raise PromptError(f"A limit of {limit} prompts leaves none.", "Ask for at least 1.")
    # Each split's lines go round the categories in turn, so that any leading slice is an even spread.
    return list(splits[split][:limit])


def load_prompts(source: Path, column: str | None = None) -> LoadedPrompts:
    """Read prompts from a .jsonl, .json, .csv or .txt file, UTF-8 with or without a byte order mark.

    Args:
        source: JSON Lines; a JSON list, or an object that holds one list; CSV with a header (comma, semicolon or tab);
            or text with one prompt a line. Entries are texts, or objects with a column for the text and perhaps
            `category` and `language`. Blank lines do not count.
        column: where the text is; None takes the first of `COLUMNS` that is there.

    Raises:
        PromptError: the file cannot be read, is empty or malformed, or lacks the column; names the line or entry.
    """
    rows = _read(source)
    columns = _columns(rows)
    found = _find_column(columns, column)
    if found is None and (columns or column is not None):
        wanted = f"'{column}'" if column is not None else " or ".join(f"'{name}'" for name in COLUMNS)
        there = f"The columns there are: {', '.join(columns)}. Name the one that holds the prompts."
        hint = there if columns else "It is a plain list without columns: name none."
        raise PromptError(f"{source} has no column {wanted}.", hint)
    prompts: dict[str, Prompt] = {}
    for number, record in rows:
        text = _text(source, number, record, found or _PLAIN)
        language = _label(record, "language") or "en"
        prompt = Prompt(text, f"{source.stem}-{number:05d}", _label(record, "category"), language)
        prompts.setdefault(text, prompt)
    return LoadedPrompts(list(prompts.values()), len(rows) - len(prompts), found)


def preview(source: Path, rows: int = 3) -> Preview:
    """The columns and the first `rows` rows of a prompt file.

    Raises:
        PromptError: the file cannot be read, is empty or malformed.
    """
    records = _read(source)
    columns = _columns(records)
    shown = [tuple(_shown(record.get(name)) for name in columns or (_PLAIN,)) for _, record in islice(records, rows)]
    return Preview(columns, shown, len(records), _find_column(columns, None))


def near_duplicates(
    first: list[Prompt], second: list[Prompt], threshold: float = NEAR_DUPLICATE
) -> list[tuple[Prompt, Prompt]]:
    """Every pair of one prompt of `first` and one of `second` whose content words are alike.

    Args:
        first: in any number; pairs come in this order.
        second: likewise; may be `first` itself, and then each prompt is also paired with itself.
        threshold: least Jaccard similarity, above 0 and at most 1.
    """
    return [(prompt, other) for prompt, other, _ in _similar_pairs(first, second, threshold)]


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
    for prompt, other, similarity in _similar_pairs(train, held_out, threshold):
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


def _similar_pairs(
    first: list[Prompt], second: list[Prompt], threshold: float
) -> Iterator[tuple[Prompt, Prompt, float]]:
    """Pairs at or above `threshold`, with their similarity; an inverted index of words finds them."""
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
def _bundled_splits(kind: Kind) -> dict[str, tuple[Prompt, ...]]:
    content = (files("safesteer_lite") / "data" / f"{kind}.jsonl").read_text(encoding="utf-8")
    splits: defaultdict[str, list[Prompt]] = defaultdict(list)
    for line in content.splitlines():
        entry = json.loads(line)
        splits[entry["split"]].append(Prompt(entry["prompt"], entry["id"], entry["category"], entry["language"]))
    return {split: tuple(prompts) for split, prompts in splits.items()}


def _columns(rows: list[_Row]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for _, record in rows for name in record if name != _PLAIN))


def _find_column(columns: tuple[str, ...], wanted: str | None) -> str | None:
    """The column named `wanted`, or the first of `COLUMNS` in any case; None if it is not there."""
    if wanted is not None:
        return wanted if wanted in columns else None
    folded = {name.strip().casefold(): name for name in reversed(columns)}
    return next((folded[name] for name in COLUMNS if name in folded), None)


def _text(source: Path, number: int, record: dict[str, object], column: str) -> str:
    value = record.get(column)
    where = _where(source, number)
    if not isinstance(value, str):
        problem = f"has {_json_type(value)} where the prompt should be" if column in record else "has no prompt"
        raise PromptError(f"{where} {problem}.", f"Put a text in '{column}' there." if column else "Put a text there.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{where} holds half a character (a lone surrogate).", "Write the text anew.") from error
    if not value.strip():
        raise PromptError(f"{where} has an empty prompt.", "Fill it in or remove it.")
    return value.strip()


def _label(record: dict[str, object], name: str) -> str:
    value = record.get(name)
    return value.strip() if isinstance(value, str) else ""


def _shown(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _where(source: Path, number: int) -> str:
    return f"{source}: {'entry' if source.suffix.lower() == '.json' else 'line'} {number}"


def _json_type(value: object) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "a text" if isinstance(value, str) else "nothing")


def _read(source: Path) -> list[_Row]:
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".txt": _read_txt}
    reader = readers.get(source.suffix.lower())
    if source.is_dir():
        raise PromptError(f"{source} is a folder.", "Give a prompt file inside it.")
    if not source.exists():
        raise PromptError(f"There is no file {source}.", "Check the path.")
    if reader is None:
        kind = f"a {source.suffix} file" if source.suffix else "a file without a suffix"
        raise PromptError(f"{source} is {kind}, which is not known.", f"Use one of: {', '.join(readers)}.")
    try:
        content = source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{source} is not UTF-8 text (byte {error.start}).", "Save it again as UTF-8.") from error
    except OSError as error:
        raise PromptError(f"{source} cannot be read: {error.strerror}.", "Check its permissions.") from error
    rows = reader(source, content)
    if not rows:
        raise PromptError(f"{source} has no prompts.", "Put at least one prompt into it.")
    return rows


def _read_txt(source: Path, content: str) -> list[_Row]:
    return [(number, {_PLAIN: line}) for number, line in enumerate(content.split("\n"), 1) if line.strip()]


def _read_jsonl(source: Path, content: str) -> list[_Row]:
    # Not splitlines(): JSON texts may hold the rarer line separators unescaped.
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    return [(number, _record(source, number, _parse(_where(source, number), line))) for number, line in lines]


def _read_json(source: Path, content: str) -> list[_Row]:
    data = _parse(str(source), content) if content.strip() else []
    if isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise PromptError(f"{source} is an object with {len(lists)} lists.", "Leave one list, that of the prompts.")
        data = lists[0]
    if not isinstance(data, list):
        raise PromptError(f"{source} holds {_json_type(data)}.", "Make it a list of texts or of objects.")
    return [(number, _record(source, number, entry)) for number, entry in enumerate(data, 1)]


def _parse(where: str, content: str) -> object:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if "\n" in content else f"column {error.colno}"
        raise PromptError(f"{where} is not JSON: {error.msg} at {place}.", "Correct it there.") from error
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where} is JSON that cannot be taken in: {error}.", "Simplify it.") from error


def _record(source: Path, number: int, entry: object) -> dict[str, object]:
    if isinstance(entry, str):
        return {_PLAIN: entry}
    if isinstance(entry, dict):
        return entry
    raise PromptError(f"{_where(source, number)} is {_json_type(entry)}.", "Make it a text or an object.")


def _read_csv(source: Path, content: str) -> list[_Row]:
    header_line = content.lstrip().split("\n", 1)[0]
    # Spreadsheets in many countries write semicolons, and some tools tabs: the header shows which.
    reader = csv.reader(io.StringIO(content), delimiter=max(",;\t", key=header_line.count), strict=True)
    rows: list[_Row] = []
    header: list[str] = []
    try:
        for fields in reader:
            if not header:
                header = _csv_header(source, fields)
            elif fields:
                rows.append((reader.line_num, _csv_record(source, reader.line_num, header, fields)))
    except csv.Error as error:
        where = _where(source, reader.line_num)
        raise PromptError(f"{where} is malformed: {error}.", "Check the quotes there.") from error
    return rows


def _csv_header(source: Path, names: list[str]) -> list[str]:
    repeated = [name for name, count in Counter(names).items() if count > 1 and name]
    if repeated:
        raise PromptError(f"{source} has several columns named '{repeated[0]}'.", "Rename all but one of them.")
    return names


def _csv_record(source: Path, number: int, header: list[str], fields: list[str]) -> dict[str, object]:
    if len(fields) != len(header):
        message = f"{_where(source, number)} has {len(fields)} fields, but the header has {len(header)}."
        raise PromptError(message, "Quote texts that contain the separator.")
    return dict(zip(header, fields, strict=True))


def data_files() -> list[Path]:
    """The bundled prompt files, in a fixed order."""
    return sorted(Path(str(files("safesteer_lite") / "data")).glob("*.jsonl"))

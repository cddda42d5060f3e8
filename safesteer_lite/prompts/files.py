"""Prompt files as rows: JSON Lines, a JSON list, CSV or plain text, with errors that name the line or entry."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from safesteer_lite.errors import PromptError
from safesteer_lite.runs.durable import parse_json, read_bytes

LARGEST_FILE = 1 << 29
"""Bytes of a prompt file."""

LONGEST_PROMPT = 100_000
"""Characters of a prompt: a hundred times what a run reads of it, unless prompts.prompt_tokens is raised."""

PLAIN = ""
"""The field of a row that is a text and no object."""


@dataclass(frozen=True)
class Row:
    """One row of a prompt file.

    Attributes:
        number: of the line or entry, from 1.
        fields: what was found there, by column.
        unit: what the file is made of, `line` or `entry`.
    """

    number: int
    fields: dict[str, object]
    unit: str = "line"


# What only programs write at the start of a text: the markers with which chat templates open a turn, and words for them that
# are followed by an answer.
_CONVERSATION = re.compile(
    r"<\|[\w ]{1,40}\|>|<｜[^｜]{1,40}｜>|<start_of_turn>|<bos>|<s> ?\[INST\]|\[INST\]"
    r"|(?=.*^###? ?(?:response|assistant)\b)(?:.*^)?###? ?(?:instruction|human|user)\b"
    r"|(?:human|user): (?=.*^(?:assistant|ai|gpt):)",
    re.IGNORECASE | re.DOTALL | re.MULTILINE,
)
# Letters and symbols by Unicode's account that are drawn as nothing.
_UNSEEN = frozenset("\u115f\u1160\u2800\u3164\uffa0")


def read_rows(source: Path) -> list[Row]:
    """All rows of a prompt file, UTF-8 with or without a byte order mark; at least one.

    Raises:
        PromptError: the file cannot be read, is empty or malformed; names the line or entry.
    """
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".txt": _read_txt}
    reader = readers.get(source.suffix.lower())
    if source.is_dir():
        raise PromptError(f"{source} is a folder.", "Give a prompt file inside it.")
    if not source.exists():
        raise PromptError(f"There is no file {source}.", "Check the path.")
    if reader is None:
        kind = f"a {source.suffix} file" if source.suffix else "a file without a suffix"
        raise PromptError(f"{source} is {kind}, which is not known.", f"Use one of: {', '.join(readers)}.")
    rows = reader(source, _content(source))
    if not rows:
        raise PromptError(f"{source} has no prompts.", "Put at least one prompt into it.")
    return rows


def text_of(source: Path, row: Row, column: str, extra: str = "") -> str:
    """The prompt in one row, without the space around it.

    Args:
        source: the file, for the error message.
        row: the row.
        column: the field that holds the prompt; `PLAIN` for a row that is a text.
        extra: a field with what the prompt is about, which comes behind it; empty, or null in a row, for none.

    Raises:
        PromptError: there is no text, or one that is empty, too long, a whole conversation, or not to be written as UTF-8.
    """
    where = _where(source, row)
    text = _field(where, row.fields, column)
    if is_blank(text):
        raise PromptError(f"{where} has an empty prompt.", "Fill it in or remove it.")
    if extra and row.fields.get(extra) is not None and not is_blank(added := _field(where, row.fields, extra)):
        text = f"{text}\n\n{added}"
    if len(text) > LONGEST_PROMPT:
        raise PromptError(
            f"{where} has a prompt of {len(text):,} characters, more than {LONGEST_PROMPT:,}.", "Shorten or remove it."
        )
    if found := _CONVERSATION.match(text):
        raise PromptError(
            f"{where} has a whole conversation with its markers ({found[0].strip()[:20]!r}) where a request should be.",
            "Give the user's words alone, one request a row, or name another column: the markers are added by the model's own "
            "chat template.",
        )
    return text


def is_blank(text: str) -> bool:
    """Whether a text has nothing that can be seen: white space, control characters and characters without width."""
    return not any(unicodedata.category(letter)[0] in "LNPS" and letter not in _UNSEEN for letter in text)


def _field(where: str, fields: dict[str, object], column: str) -> str:
    value = fields.get(column)
    if not isinstance(value, str):
        problem = f"has {_json_type(value)} where the prompt should be" if column in fields else "has no prompt"
        raise PromptError(f"{where} {problem}.", f"Put a text in '{column}' there." if column else "Put a text there.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{where} holds half a character (a lone surrogate).", "Write the text anew.") from error
    return value.strip()


def _content(source: Path) -> str:
    try:
        content = read_bytes(source, LARGEST_FILE)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{source} is not UTF-8 text (byte {error.start}).", "Save it again as UTF-8.") from error
    except (OSError, MemoryError) as error:
        said = getattr(error, "strerror", None) or "out of memory"
        raise PromptError(f"{source} cannot be read: {said}.", "Check that it is a file that you may read.") from error
    except ValueError as error:
        raise PromptError(f"{source} is too large: {error}.", "Give fewer prompts.") from error
    if "\0" in text:
        raise PromptError(f"{source} is not UTF-8 text (it has NUL bytes).", "Save it again as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_txt(source: Path, content: str) -> list[Row]:
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if not is_blank(line)]
    if lines and lines[0][1].lstrip().startswith("{") and _is_object(lines[0][1]):
        raise PromptError(f"{source} is JSON and no plain text.", "Name it .jsonl, or .json if it is one list.")
    return [Row(number, {PLAIN: line}) for number, line in lines]


def _read_jsonl(source: Path, content: str) -> list[Row]:
    if content.lstrip().startswith("[") and isinstance(data := _parsed_or_none(content), list):
        return _entries(source, data)
    # Not splitlines(): JSON texts may hold the rarer line separators unescaped.
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    return [_row(source, _parse(f"{source}: line {number}", line), number, "line") for number, line in lines]


def _read_json(source: Path, content: str) -> list[Row]:
    first, _, rest = content.strip().partition("\n")
    if rest and _is_object(first):
        return _read_jsonl(source, content)
    data = _parse(str(source), content) if content.strip() else []
    if isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise PromptError(f"{source} is an object with {len(lists)} lists.", "Leave one list, that of the prompts.")
        data = lists[0]
    if not isinstance(data, list):
        raise PromptError(f"{source} holds {_json_type(data)}.", "Make it a list of texts or of objects.")
    return _entries(source, data)


def _entries(source: Path, data: list[object]) -> list[Row]:
    return [_row(source, entry, number, "entry") for number, entry in enumerate(data, 1)]


def _parse(where: str, content: str) -> object:
    try:
        return parse_json(content)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if "\n" in content else f"column {error.colno}"
        raise PromptError(f"{where} is not JSON: {error.msg} at {place}.", "Correct it there.") from error
    except ValueError as error:
        raise PromptError(f"{where} is JSON that cannot be taken in: {error}.", "Simplify it.") from error


def _parsed_or_none(content: str) -> object:
    try:
        return parse_json(content)
    except ValueError:
        return None


def _is_object(content: str) -> bool:
    return isinstance(_parsed_or_none(content), dict)


def _row(source: Path, entry: object, number: int, unit: str) -> Row:
    if isinstance(entry, str):
        return Row(number, {PLAIN: entry}, unit)
    if isinstance(entry, dict):
        return Row(number, entry, unit)
    raise PromptError(f"{source}: {unit} {number} is {_json_type(entry)}.", "Make it a text or an object.")


def _read_csv(source: Path, content: str) -> list[Row]:
    header_line = content.lstrip().split("\n", 1)[0]
    # Spreadsheets in many countries write semicolons, and some tools tabs: the header shows which.
    reader = csv.reader(io.StringIO(content), delimiter=max(",;\t", key=header_line.count), strict=True)
    rows: list[Row] = []
    header: list[str] = []
    try:
        for fields in reader:
            if not header:
                header = _csv_header(source, fields)
            elif fields:
                rows.append(_csv_row(source, reader.line_num, header, fields))
    except csv.Error as error:
        raise PromptError(
            f"{source}: line {reader.line_num} is malformed: {error}.", "Check the quotes there."
        ) from error
    return rows


def _csv_header(source: Path, names: list[str]) -> list[str]:
    repeated = [name for name, count in Counter(names).items() if count > 1 and name]
    if repeated:
        raise PromptError(f"{source} has several columns named '{repeated[0]}'.", "Rename all but one of them.")
    return names


def _csv_row(source: Path, number: int, header: list[str], fields: list[str]) -> Row:
    if len(fields) != len(header):
        raise PromptError(
            f"{source}: line {number} has {len(fields)} fields, but the header has {len(header)}.",
            "Quote texts that contain the separator.",
        )
    return Row(number, dict(zip(header, fields, strict=True)))


def _where(source: Path, row: Row) -> str:
    return f"{source}: {row.unit} {row.number}"


def _json_type(value: object) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "a text" if isinstance(value, str) else "nothing")

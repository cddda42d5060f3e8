"""Prompt files as rows: JSON Lines, a JSON list, CSV or plain text, with errors that name the line or entry."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path

from safesteer_lite.errors import PromptError

Row = tuple[int, dict[str, object]]
"""The 1-based line or entry that an error message points to, and the fields found there."""

PLAIN = ""
"""The field of a row that is a text and no object."""


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


def text_of(source: Path, number: int, record: dict[str, object], column: str) -> str:
    """The prompt in one row, without the space around it.

    Args:
        source: the file, for the error message.
        number: the row's line or entry.
        record: its fields.
        column: the field that holds the prompt; `PLAIN` for a row that is a text.

    Raises:
        PromptError: there is no text, an empty one, or one that cannot be written as UTF-8.
    """
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


def _read_txt(source: Path, content: str) -> list[Row]:
    return [(number, {PLAIN: line}) for number, line in enumerate(content.split("\n"), 1) if line.strip()]


def _read_jsonl(source: Path, content: str) -> list[Row]:
    # Not splitlines(): JSON texts may hold the rarer line separators unescaped.
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    return [(number, _record(source, number, _parse(_where(source, number), line))) for number, line in lines]


def _read_json(source: Path, content: str) -> list[Row]:
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
        return {PLAIN: entry}
    if isinstance(entry, dict):
        return entry
    raise PromptError(f"{_where(source, number)} is {_json_type(entry)}.", "Make it a text or an object.")


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


def _where(source: Path, number: int) -> str:
    return f"{source}: {'entry' if source.suffix.lower() == '.json' else 'line'} {number}"


def _json_type(value: object) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "a text" if isinstance(value, str) else "nothing")

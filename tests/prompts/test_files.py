"""A user's own prompt file: every format gives the same prompts, and every fault is told with its line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from safesteer_lite.errors import PromptError
from safesteer_lite.prompts.sets import Prompt, load_prompts, preview
from tests import REPOSITORY

Write = Callable[[str, str | bytes], Path]

TEXTS = ["Boil an egg, please", "Say “grüezi”"]
OBJECTS = [{"id": n, "prompt": text, "category": "food", "language": "de"} for n, text in enumerate(TEXTS)]
GOOD_FILES = {
    "lines.txt": "\n".join(TEXTS) + "\n\n",
    "objects.jsonl": "".join(json.dumps(entry) + "\n" for entry in OBJECTS) + "\n",
    "texts.jsonl": "".join(json.dumps(text) + "\n" for text in TEXTS),
    "texts.json": json.dumps(TEXTS),
    "objects.json": json.dumps(OBJECTS, indent=1),
    "wrapped.json": json.dumps({"version": 1, "data": OBJECTS}),
    "comma.CSV": 'id,prompt,category\n0,"Boil an egg, please",food\n\n1,Say “grüezi”,food\n',
    "semicolon.csv": "id;Prompt\n0;Boil an egg, please\n1;Say “grüezi”\n",
    "unnamed.csv": ',prompt\n0,"Boil an egg, please"\n1,Say “grüezi”\n',
}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of the given name and content, and returns its path."""

    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("name", GOOD_FILES)
def test_every_format_gives_the_same_texts(name: str, windows: bool, write: Write) -> None:
    content = GOOD_FILES[name]
    source = write(name, b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode() if windows else content)
    loaded = load_prompts(source)
    assert [prompt.text for prompt in loaded.prompts] == TEXTS
    assert len({prompt.id for prompt in loaded.prompts}) == 2
    assert loaded.duplicates_removed == 0
    assert (loaded.column or "none").casefold() == (
        "none" if name in ("lines.txt", "texts.json", "texts.jsonl") else "prompt"
    )


def test_category_and_language_are_taken_along(write: Write) -> None:
    loaded = load_prompts(write("mine.jsonl", GOOD_FILES["objects.jsonl"]))
    assert loaded.prompts[1] == Prompt(TEXTS[1], "mine-00002", "food", "de")


def test_columns_are_found_in_order_and_a_named_one_wins(write: Write) -> None:
    source = write("mine.csv", "text,prompt,instruction,other\na,b,c,d\n")
    assert load_prompts(source).prompts[0].text == "c"
    assert load_prompts(source, "other").prompts[0].text == "d"
    assert load_prompts(source, "text").column == "text"


def test_exact_duplicates_are_removed_and_counted(write: Write) -> None:
    loaded = load_prompts(write("mine.txt", "one egg\ntwo eggs\n one egg \nOne egg\none egg\n"))
    assert [prompt.text for prompt in loaded.prompts] == ["one egg", "two eggs", "One egg"]
    assert loaded.duplicates_removed == 2


def test_a_csv_text_may_span_lines_and_a_json_text_hold_a_line_separator(write: Write) -> None:
    loaded = load_prompts(write("mine.csv", 'prompt\n"first\nsecond, third"\n'))
    assert loaded.prompts[0].text == "first\nsecond, third"
    loaded = load_prompts(write("mine.jsonl", '{"prompt": "first\u2028second"}\n'))
    assert loaded.prompts[0].text == "first\u2028second"


def test_the_bundled_files_load_like_a_users_own() -> None:
    folder = REPOSITORY / "safesteer_lite" / "data"
    loaded = load_prompts(folder / "harmful.jsonl")
    assert (len(loaded.prompts), loaded.duplicates_removed, loaded.column) == (360, 0, "prompt")


BAD_FILES: dict[str, tuple[str, str | bytes, str]] = {
    "empty txt": ("a.txt", "\n \n", "has no prompts"),
    "empty json": ("a.json", "", "has no prompts"),
    "empty list": ("a.json", "[]", "has no prompts"),
    "header only": ("a.csv", "prompt\n", "has no prompts"),
    "empty csv": ("a.csv", "", "has no prompts"),
    "latin-1": ("a.txt", "grüezi".encode("latin-1"), r"not UTF-8 text \(byte 2\)\. Save it again as UTF-8"),
    "utf-16": ("a.txt", "egg".encode("utf-16"), "not UTF-8"),
    "unknown suffix": (
        "a.xlsx",
        "egg",
        r"is a \.xlsx file, which is not known\. Use one of: \.jsonl, \.json, \.csv, \.txt",
    ),
    "no suffix": ("a", "egg", "a file without a suffix"),
    "broken line": ("a.jsonl", '{"prompt": "egg"}\n\n{"prompt": }\n', r"line 3 is not JSON: .* at column 12"),
    "broken json": ("a.json", '["egg",\n oops]', r"is not JSON: .* at line 2, column 2"),
    "number line": ("a.jsonl", '"egg"\n7\n', r"line 2 is a number\. Make it a text or an object"),
    "nested list": ("a.json", '["egg", ["egg"]]', "entry 2 is a list"),
    "scalar": ("a.json", "true", "holds true or false"),
    "no list": ("a.json", '{"prompt": "egg"}', "an object with 0 lists"),
    "two lists": ("a.json", '{"a": ["egg"], "b": ["egg"]}', "an object with 2 lists"),
    "too deep": ("a.json", "[" * 200_000, "cannot be taken in"),
    "no column": (
        "a.csv",
        "id,question\n1,egg\n",
        r"'instruction' or 'prompt' or 'text'\. The columns there are: id, question",
    ),
    "non-string": ("a.jsonl", '{"prompt": "egg"}\n{"prompt": 7}\n', "line 2 has a number where the prompt should be"),
    "null": (
        "a.json",
        '[{"prompt": null}]',
        r"entry 1 has nothing where the prompt should be\. Put a text in 'prompt'",
    ),
    "missing field": ("a.jsonl", '{"prompt": "egg"}\n{"category": "x"}\n', "line 2 has no prompt"),
    "mixed": ("a.json", '[{"prompt": "egg"}, "egg"]', "entry 2 has no prompt"),
    "blank value": ("a.csv", "id,prompt\n1,egg\n2, \n", "line 3 has an empty prompt"),
    "surrogate": ("a.jsonl", '{"prompt": "\\ud83d"}\n', "line 1 holds half a character"),
    "extra field": ("a.csv", "prompt\negg, boiled\n", r"line 2 has 2 fields, but the header has 1\. Quote texts"),
    "open quote": ("a.csv", 'prompt\n"egg\n', "line 2 is malformed"),
    "twin columns": ("a.csv", "prompt,prompt\nan,egg\n", "several columns named 'prompt'"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_each_fault_is_one_prompt_error_with_a_hint(case: str, write: Write) -> None:
    name, content, message = BAD_FILES[case]
    with pytest.raises(PromptError, match=message) as caught:
        load_prompts(write(name, content))
    assert name in caught.value.message
    assert caught.value.hint


def test_a_missing_file_a_folder_and_a_missing_column_are_named(tmp_path: Path, write: Write) -> None:
    with pytest.raises(PromptError, match=r"There is no file .*none\.txt"):
        load_prompts(tmp_path / "none.txt")
    with pytest.raises(PromptError, match="is a folder"):
        load_prompts(tmp_path)
    with pytest.raises(PromptError, match=r"no column 'prompts'\. The columns there are: prompt\."):
        load_prompts(write("a.csv", "prompt\negg\n"), "prompts")
    with pytest.raises(PromptError, match=r"no column 'prompt'\. It is a plain list without columns: name none\."):
        load_prompts(write("a.txt", "egg\n"), "prompt")


def test_preview_shows_columns_and_the_first_rows(write: Write) -> None:
    entries = [{"id": n, "question": f"Egg {n}?"} for n in range(5)] + [{"Prompt": "Egg"}]
    shown = preview(write("mine.json", json.dumps(entries)), rows=2)
    assert shown.columns == ("id", "question", "Prompt")
    assert shown.rows == [("0", "Egg 0?", ""), ("1", "Egg 1?", "")]
    assert (shown.total, shown.suggested) == (6, "Prompt")
    plain = preview(write("mine.txt", "one\ntwo\nthree\nfour\n"))
    assert (plain.columns, plain.rows, plain.total) == ((), [("one",), ("two",), ("three",)], 4)
    assert plain.suggested is None

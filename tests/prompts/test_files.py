"""A user's own prompt file: every format gives the same prompts, and every fault is told with its line."""

from __future__ import annotations

import json
import os
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
    "lines.json": "".join(json.dumps(entry) + "\n" for entry in OBJECTS) + "\n",
    "list.jsonl": json.dumps(OBJECTS, indent=1),
    "one-line.jsonl": json.dumps(OBJECTS),
    "unseen.txt": "\u200b\n" + TEXTS[0] + "\n \u200b\ufeff\x07\n\u3164\n" + TEXTS[1],
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
    plain = name in ("lines.txt", "unseen.txt", "texts.json", "texts.jsonl")
    assert [column.casefold() for column in loaded.columns] == ([] if plain else ["prompt"])


def test_category_and_language_are_taken_along(write: Write) -> None:
    loaded = load_prompts(write("mine.jsonl", GOOD_FILES["objects.jsonl"]))
    assert loaded.prompts[1] == Prompt(TEXTS[1], "mine-00002", "food", "de")


def test_columns_are_found_in_order_and_a_named_one_wins(write: Write) -> None:
    source = write("mine.csv", "text,prompt,instruction,other\na,b,c,d\n")
    assert load_prompts(source).prompts[0].text == "c"
    assert load_prompts(source, "other").prompts[0].text == "d"
    assert load_prompts(source, "text").columns == ("text",)


def test_the_input_of_an_instruction_belongs_to_the_request(write: Write) -> None:
    entries = [
        {"instruction": "Answer the question.", "input": "Why do eggs harden?", "output": "Protein."},
        {"instruction": "Answer the question.", "input": "How long does an egg boil?", "output": "Six minutes."},
        {"instruction": "Answer the question.", "input": " "},
        {"instruction": "Tell a joke.", "input": None},
        {"instruction": "Sing."},
    ]
    expected = [
        "Answer the question.\n\nWhy do eggs harden?",
        "Answer the question.\n\nHow long does an egg boil?",
        "Answer the question.",
        "Tell a joke.",
        "Sing.",
    ]
    source = write("alpaca.json", json.dumps(entries))
    for column in (None, "instruction"):
        loaded = load_prompts(source, column)
        assert [prompt.text for prompt in loaded.prompts] == expected
        assert (loaded.columns, loaded.duplicates_removed) == (("instruction", "input"), 0)
    # Beside another column it means something else.
    assert load_prompts(write("a.csv", "input,prompt\nx,egg\n")).prompts[0].text == "egg"
    assert load_prompts(write("a.csv", "Input,Instruction\nx,egg\n")).prompts[0].text == "egg\n\nx"


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
    assert (len(loaded.prompts), loaded.duplicates_removed, loaded.columns) == (360, 0, ("prompt",))


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
    "utf-16 without a mark": ("a.txt", "egg".encode("utf-16-le"), "has NUL bytes"),
    "a NUL byte": ("a.jsonl", b'"eg\0g"\n', "has NUL bytes"),
    "only unseen": ("a.txt", "\u200b\n\u2060\n\x1b\n", "has no prompts"),
    "an unseen value": ("a.jsonl", '{"prompt": "egg"}\n{"prompt": "\u200b\\u0007"}\n', "line 2 has an empty prompt"),
    "a number as input": ("a.jsonl", '{"instruction": "egg", "input": 7}', "line 1 has a number where the prompt"),
    "messages": ("a.jsonl", '{"prompt": [{"role": "user", "content": "egg"}]}', "line 1 has a list where the prompt"),
    "an object": ("a.json", '[{"prompt": {"text": "egg"}}]', "entry 1 has an object where the prompt"),
    "NaN": ("a.jsonl", '"egg"\n{"prompt": NaN}\n', "line 2 is JSON that cannot be taken in: it holds NaN"),
    "infinity": ("a.json", '[{"prompt": "egg", "score": 1e999}]', "cannot be taken in: it holds 1e999"),
    "a long number": ("a.json", f"[{'7' * 5000}]", "cannot be taken in"),
    "a key twice": ("a.jsonl", '{"prompt": "egg", "prompt": "ham"}\n', "line 1 .* the key 'prompt' twice"),
    "a broken line in .json": ("a.json", '{"prompt": "egg"}\n{oops\n', "line 2 is not JSON"),
    "an empty text in .json lines": ("a.json", '{"prompt": "egg"}\n{"prompt": ""}\n', "line 2 has an empty prompt"),
    "JSON called text": (
        "a.txt",
        '{"prompt": "egg"}\n{"prompt": "ham"}\n',
        r"is JSON and no plain text\. Name it \.jsonl",
    ),
    "JSON called CSV": ("a.csv", '{"prompt": "egg"}\n{"prompt": "ham"}\n', "has no column"),
    "CSV called JSON": ("a.json", "prompt\negg\n", "is not JSON"),
    "CSV called JSON Lines": ("a.jsonl", "prompt\negg\n", "line 1 is not JSON"),
    "an endless prompt": ("a.txt", "egg\n" + "egg " * 30_000, "line 2 has a prompt of 119,999 characters"),
    "an endless field": ("a.csv", "prompt\n" + "egg " * 50_000, "line 2 is malformed: field larger than"),
    "twin columns": ("a.csv", "prompt,prompt\nan,egg\n", "several columns named 'prompt'"),
}


CONVERSATIONS = [
    "<|im_start|>user\nBoil an egg<|im_end|>\n<|im_start|>assistant\nSure",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nBoil an egg<|eot_id|>",
    "<s>[INST] Boil an egg [/INST] Sure</s>",
    "[INST] Boil an egg [/INST]",
    "<bos><start_of_turn>user\nBoil an egg<end_of_turn>",
    "<|user|>\nBoil an egg<|end|>",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>Boil an egg",
    "### Instruction:\nBoil an egg\n\n### Response:\nSure",
    "Below is an instruction that describes a task.\n\n### Instruction:\nBoil an egg\n\n### Response:\n",
    "### Human: Boil an egg\n### Assistant: Sure",
    "Human: Boil an egg\n\nAssistant: Sure",
    "USER: Boil an egg\nASSISTANT: Sure",
]
REQUESTS = [
    "What does <|im_start|> mean?",
    "Strike this out: <s>egg</s>",
    "<s>egg</s> is struck out. Why?",
    "### Eggs\nHow long do they boil?",
    "Human: all too human, who wrote it?",
    "[EGG] Boil it.",
    "Answer [INST] literally.",
    "???",
    "\U0001f95a",
]


def test_whole_conversations_are_no_requests(write: Write) -> None:
    for text in CONVERSATIONS:
        lines = [json.dumps({"text": entry}) for entry in ("egg", text)]
        with pytest.raises(PromptError, match=r"line 2 has a whole conversation with its markers") as caught:
            load_prompts(write("a.jsonl", "\n".join(lines)))
        assert "the user's words alone" in caught.value.hint
    source = write("b.jsonl", "\n".join(json.dumps({"text": text}) for text in REQUESTS))
    assert [prompt.text for prompt in load_prompts(source).prompts] == REQUESTS


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(PromptError, match="cannot be read: it is no regular file"):
        load_prompts(tmp_path / "pipe.txt")


def test_a_file_without_end_is_not_read(tmp_path: Path) -> None:
    place = tmp_path / "huge.jsonl"
    with place.open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(PromptError, match=r"is too large: it has 1,099,511,627,776 bytes"):
        load_prompts(place)


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

"""The bundled sets keep their promises, planted duplicates are found, every file format and fault is met as told."""

from __future__ import annotations

import json
import random
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from safesteer_lite.errors import PromptError
from safesteer_lite.prompts import (
    Kind,
    Prompt,
    bundled,
    check_leaks,
    content_words,
    load_prompts,
    near_duplicates,
    preview,
)

COUNTS: dict[Kind, dict[str, int]] = {
    "harmful": {"direction": 128, "selection": 32, "train": 100, "test": 100},
    "harmless": {"direction": 128, "selection": 32, "train": 100, "test": 100},
    "borderline": {"selection": 30, "train": 100, "test": 60},
}
SETS = [(kind, split) for kind, splits in COUNTS.items() for split in splits]
Write = Callable[[str, str | bytes], Path]
ALARMING = re.compile(
    r"\b(kill|murder|bomb|attack|drug|weapon|gun|knife|poison|toxic|hack|steal|rob|shoot|death|dead|die|hurt|harm|"
    r"threat|victim|illegal|fake|forge|crime|criminal|police|suicid|explos|trick|secret|crack|burn|fire|destroy)",
    re.IGNORECASE,
)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of the given name and content, and returns its path."""

    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


def prompts_of(*texts: str) -> list[Prompt]:
    return [Prompt(text, f"p{number}") for number, text in enumerate(texts)]


def all_bundled() -> list[Prompt]:
    return [prompt for kind, split in SETS for prompt in bundled(kind, split)]


def words(prompt: Prompt) -> int:
    return len(prompt.text.split())


@pytest.mark.parametrize(("kind", "split"), SETS)
def test_each_split_has_its_count_and_even_categories(kind: Kind, split: str) -> None:
    prompts = bundled(kind, split)
    assert len(prompts) == COUNTS[kind][split]
    categories = Counter(prompt.category for prompt in prompts)
    assert len(categories) == (10 if kind == "borderline" else 14)
    assert max(categories.values()) - min(categories.values()) <= 1
    assert [prompt.id for prompt in prompts] == [f"{kind}-{split}-{n:03d}" for n in range(1, len(prompts) + 1)]


@pytest.mark.parametrize(("kind", "split"), SETS)
def test_any_limit_is_an_even_spread_over_the_categories(kind: Kind, split: str) -> None:
    names = {prompt.category for prompt in bundled(kind, split)}
    for limit in range(1, COUNTS[kind][split] + 1):
        prompts = bundled(kind, split, limit)
        counts = Counter(prompt.category for prompt in prompts)
        assert len(prompts) == limit
        assert max(counts.values()) - min(counts[name] for name in names) <= 1
    assert bundled(kind, split, 10_000) == bundled(kind, split)


def test_no_near_duplicates_within_or_between_the_bundled_sets() -> None:
    prompts = all_bundled()
    assert len(prompts) == 910
    assert [(a.id, b.id) for a, b in near_duplicates(prompts, prompts) if a is not b] == []


def test_bundled_prompts_are_short_single_lines() -> None:
    for prompt in all_bundled():
        assert 6 <= words(prompt) <= 25, prompt
        assert prompt.text == " ".join(prompt.text.split()), prompt
        assert prompt.text[-1] in ".?", prompt


def test_no_opening_becomes_a_series() -> None:
    for kind, split in SETS:
        openings = Counter(" ".join(prompt.text.split()[:3]).casefold() for prompt in bundled(kind, split))
        assert max(openings.values()) <= max(3, 0.1 * COUNTS[kind][split]), (kind, split, openings.most_common(2))


@pytest.mark.parametrize("split", COUNTS["harmful"])
def test_harmful_and_harmless_prompts_differ_in_content_and_not_in_form(split: str) -> None:
    harmful, harmless = bundled("harmful", split), bundled("harmless", split)
    assert abs(statistics.mean(map(words, harmful)) - statistics.mean(map(words, harmless))) < 2
    questions = [sum(prompt.text.endswith("?") for prompt in prompts) / len(prompts) for prompts in (harmful, harmless)]
    assert abs(questions[0] - questions[1]) < 0.1
    first_words = [Counter(prompt.text.split()[0] for prompt in prompts) for prompts in (harmful, harmless)]
    assert (first_words[0] & first_words[1]).total() > 0.8 * len(harmful)


def test_harmless_prompts_hold_no_alarming_words() -> None:
    found = [prompt.text for split in COUNTS["harmless"] for prompt in bundled("harmless", split)]
    assert [text for text in found if ALARMING.search(text)] == []


def test_contrast_anchors_have_the_form_of_the_harmful_prompts_they_train_beside() -> None:
    harmful, anchors = bundled("harmful", "train"), bundled("borderline", "train")
    assert abs(statistics.mean(map(words, harmful)) - statistics.mean(map(words, anchors))) < 2
    questions = [sum(prompt.text.endswith("?") for prompt in prompts) / len(prompts) for prompts in (harmful, anchors)]
    assert abs(questions[0] - questions[1]) < 0.1
    first_words = [Counter(prompt.text.split()[0] for prompt in prompts) for prompts in (harmful, anchors)]
    assert (first_words[0] & first_words[1]).total() > 0.75 * len(harmful)


def test_contrast_anchors_vary_their_alarming_words() -> None:
    texts = [prompt.text for prompt in bundled("borderline", "train")]
    found = Counter(match.group().casefold() for text in texts for match in ALARMING.finditer(text))
    assert len(found) >= 20
    # A frequent word would let a model learn that word instead of the request around it.
    assert max(found.values()) <= 6


def test_contrast_anchors_stay_farther_from_the_test_splits_than_near_duplicates() -> None:
    held_out = [prompt for kind in COUNTS for prompt in bundled(kind, "test")]
    assert near_duplicates(bundled("borderline", "train"), held_out, 0.4) == []


def test_an_unknown_split_and_an_empty_limit_are_refused() -> None:
    with pytest.raises(PromptError, match=r"no split 'direction'\. Choose one of: selection, train, test\."):
        bundled("borderline", "direction")
    with pytest.raises(PromptError, match="limit of 0"):
        bundled("harmful", "train", 0)


def test_each_kind_has_a_file_with_the_documented_fields() -> None:
    folder = Path(__file__).parents[1] / "safesteer_lite" / "data"
    assert {path.stem for path in folder.glob("*.jsonl")} == set(get_args(Kind)) == set(COUNTS)
    for path in folder.glob("*.jsonl"):
        content = path.read_bytes()
        assert b"\r" not in content and content.endswith(b"}\n")
        for line in content.decode().splitlines():
            entry = json.loads(line)
            assert list(entry) == ["id", "split", "category", "language", "prompt"]
            assert entry["language"] == "en"


def test_planted_near_duplicates_are_found_and_no_others() -> None:
    held_out = bundled("harmful", "test")
    other_case = replace(held_out[3], id="case", text=held_out[3].text.upper().rstrip(".?") + " !!")
    reordered = replace(held_out[40], id="order", text=" ".join(reversed(held_out[40].text.split())))
    wordier = replace(held_out[77], id="wordier", text="Could you please " + held_out[77].text + " Thanks!")
    planted = {"case": held_out[3].id, "order": held_out[40].id, "wordier": held_out[77].id}
    train = [*bundled("harmful", "train"), other_case, reordered, wordier]
    leaks = check_leaks(train, held_out)
    assert {leak.prompt.id: leak.held_out.id for leak in leaks} == planted
    assert [leak.similarity for leak in leaks][:2] == [1.0, 1.0]
    assert leaks[2].similarity < 1.0


def test_similarity_is_the_share_of_content_words_in_common() -> None:
    # {bake, bread, rye, oven} against {bake, bread, rye, pan}: 3 words shared of 5.
    first, second = prompts_of("How do I bake rye bread in the oven?"), prompts_of("Bake rye bread in a pan.")
    assert check_leaks(first, second)[0].similarity == pytest.approx(0.6)
    assert near_duplicates(first, second, 0.6) == [(first[0], second[0])]
    assert near_duplicates(first, second, 0.61) == []


def test_a_leak_names_the_held_out_prompt_most_like_it() -> None:
    held_out = prompts_of("paint red wooden boats", "paint red wooden toy boats", "paint red wooden toy boats fast")
    [leak] = check_leaks(prompts_of("Paint toy boats of red wooden"), held_out)
    assert leak.held_out.id == "p1"


@pytest.mark.parametrize(
    ("first", "second", "alike"),
    [
        ("What is this about?", "what IS this about", True),
        ("???", "???", True),
        ("???", "!!!", False),
        ("Don't paint cafés", "dont paint cafe\u0301s", True),
        ("如何烤一个好吃的蛋糕", "如何烤一个好吃的蛋糕?", True),
        ("如何烤一个好吃的蛋糕", "今天的天气怎么样", False),
    ],
)
def test_texts_without_content_words_or_spaces_are_compared_too(first: str, second: str, alike: bool) -> None:
    assert bool(near_duplicates(prompts_of(first), prompts_of(second))) is alike


def test_the_inverted_index_agrees_with_comparing_all_pairs() -> None:
    dice = random.Random(7)
    trees = ["oak", "elm", "fir", "yew", "ash", "bay", "box", "gum"]
    texts = [" ".join(dice.choices(trees, k=dice.randint(1, 6))) for _ in range(120)]
    first, second = prompts_of(*texts[:70]), prompts_of(*texts[70:])

    def similarity(a: Prompt, b: Prompt) -> float:
        one, other = content_words(a.text), content_words(b.text)
        return len(one & other) / len(one | other)

    expected = [(a, b) for a in first for b in second if similarity(a, b) >= 0.6]
    assert expected
    assert near_duplicates(first, second) == expected


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
    folder = Path(__file__).parents[1] / "safesteer_lite" / "data"
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


def test_importing_prompts_loads_no_torch() -> None:
    code = "import sys, safesteer_lite.prompts; print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"

"""The bundled sets keep their promises, and planted duplicates are found."""

from __future__ import annotations

import json
import random
import re
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from safesteer_lite.errors import PromptError
from safesteer_lite.prompts.sets import (
    NEAR_DUPLICATE,
    Kind,
    Prompt,
    check_leaks,
    content_words,
    prompt_set,
    similar_pairs,
)
from tests import REPOSITORY

COUNTS: dict[Kind, dict[str, int]] = {
    "harmful": {"direction": 128, "selection": 32, "train": 100, "test": 100},
    "harmless": {"direction": 128, "selection": 32, "train": 100, "test": 100},
    "borderline": {"selection": 30, "train": 300, "test": 60},
    "critical": {"selection": 60, "train": 100, "test": 40},
    "twin": {"direction": 128, "selection": 32, "train": 100, "test": 100},
}
SETS = [(kind, split) for kind, splits in COUNTS.items() for split in splits]
ALARMING = re.compile(
    r"\b(kill|murder|bomb|attack|drug|weapon|gun|knife|poison|toxic|hack|steal|rob|shoot|death|dead|die|hurt|harm|"
    r"threat|victim|illegal|fake|forge|crime|criminal|police|suicid|explos|trick|secret|crack|burn|fire|destroy)",
    re.IGNORECASE,
)


def pairs(first: list[Prompt], second: list[Prompt], threshold: float = NEAR_DUPLICATE) -> list[tuple[Prompt, Prompt]]:
    return [(prompt, other) for prompt, other, _ in similar_pairs(first, second, threshold)]


def prompts_of(*texts: str) -> list[Prompt]:
    return [Prompt(text, f"p{number}") for number, text in enumerate(texts)]


def all_bundled() -> list[Prompt]:
    return [prompt for kind, split in SETS for prompt in prompt_set(kind, split)]


def words(prompt: Prompt) -> int:
    return len(prompt.text.split())


@pytest.mark.parametrize(("kind", "split"), SETS)
def test_each_split_has_its_count_and_even_categories(kind: Kind, split: str) -> None:
    prompts = prompt_set(kind, split)
    assert len(prompts) == COUNTS[kind][split]
    categories = Counter(prompt.category for prompt in prompts)
    assert len(categories) == (10 if kind in ("borderline", "critical") else 14)
    assert max(categories.values()) - min(categories.values()) <= 1
    assert [prompt.id for prompt in prompts] == [f"{kind}-{split}-{n:03d}" for n in range(1, len(prompts) + 1)]


def test_the_page_beside_the_sets_tells_their_sizes() -> None:
    page = (REPOSITORY / "safesteer_lite" / "data" / "README.md").read_text(encoding="utf-8")
    for kind, counts in COUNTS.items():
        sizes = [str(counts.get(split, "-")) for split in ("direction", "selection", "train", "test")]
        assert f"| `{kind}.jsonl` | {' | '.join(sizes)} |" in page


@pytest.mark.parametrize(("kind", "split"), SETS)
def test_any_limit_is_an_even_spread_over_the_categories(kind: Kind, split: str) -> None:
    names = {prompt.category for prompt in prompt_set(kind, split)}
    for limit in range(1, COUNTS[kind][split] + 1):
        prompts = prompt_set(kind, split, limit)
        counts = Counter(prompt.category for prompt in prompts)
        assert len(prompts) == limit
        assert max(counts.values()) - min(counts[name] for name in names) <= 1
    assert prompt_set(kind, split, 10_000) == prompt_set(kind, split)


def test_no_similar_pairs_within_or_between_the_bundled_sets() -> None:
    prompts = all_bundled()
    assert len(prompts) == 1670
    found = [(a.id, b.id) for a, b in pairs(prompts, prompts) if a is not b]
    # A twin is meant to be like the harmful prompt of its own place, and like no other.
    assert [(a, b) for a, b in found if a.replace("harmful", "twin") != b.replace("harmful", "twin")] == []


def test_twins_take_up_the_words_of_the_harmful_prompts_of_their_places() -> None:
    for split, count in COUNTS["twin"].items():
        couples = list(zip(prompt_set("harmful", split), prompt_set("twin", split), strict=True))
        assert [twin.category for _, twin in couples] == [harmful.category for harmful, _ in couples]
        assert sum(harmful.text.split()[:2] == twin.text.split()[:2] for harmful, twin in couples) > 0.85 * count
        assert abs(statistics.mean(words(harmful) - words(twin) for harmful, twin in couples)) < 1.5
        shared = [set(harmful.text.split()) & set(twin.text.split()) for harmful, twin in couples]
        assert statistics.mean(map(len, shared)) > 5


def test_bundled_prompts_are_short_single_lines() -> None:
    for prompt in all_bundled():
        assert 6 <= words(prompt) <= 25, prompt
        assert prompt.text == " ".join(prompt.text.split()), prompt
        assert prompt.text[-1] in ".?", prompt


def test_no_opening_becomes_a_series() -> None:
    for kind, split in SETS:
        openings = Counter(" ".join(prompt.text.split()[:3]).casefold() for prompt in prompt_set(kind, split))
        assert max(openings.values()) <= max(3, 0.1 * COUNTS[kind][split]), (kind, split, openings.most_common(2))


@pytest.mark.parametrize("split", COUNTS["harmful"])
def test_harmful_and_harmless_prompts_differ_in_content_and_not_in_form(split: str) -> None:
    harmful, harmless = prompt_set("harmful", split), prompt_set("harmless", split)
    assert abs(statistics.mean(map(words, harmful)) - statistics.mean(map(words, harmless))) < 2
    questions = [sum(prompt.text.endswith("?") for prompt in prompts) / len(prompts) for prompts in (harmful, harmless)]
    assert abs(questions[0] - questions[1]) < 0.1
    first_words = [Counter(prompt.text.split()[0] for prompt in prompts) for prompts in (harmful, harmless)]
    assert (first_words[0] & first_words[1]).total() > 0.8 * len(harmful)


def test_harmless_prompts_hold_no_alarming_words() -> None:
    found = [prompt.text for split in COUNTS["harmless"] for prompt in prompt_set("harmless", split)]
    assert [text for text in found if ALARMING.search(text)] == []


def test_contrast_anchors_have_the_form_of_the_harmful_prompts_they_train_beside() -> None:
    harmful, anchors = prompt_set("harmful", "train"), prompt_set("borderline", "train")
    assert abs(statistics.mean(map(words, harmful)) - statistics.mean(map(words, anchors))) < 2
    questions = [sum(prompt.text.endswith("?") for prompt in prompts) / len(prompts) for prompts in (harmful, anchors)]
    assert abs(questions[0] - questions[1]) < 0.1
    first_words = [Counter(prompt.text.split()[0] for prompt in prompts) for prompts in (harmful, anchors)]
    assert (first_words[0] & first_words[1]).total() > 0.75 * len(harmful)


def test_contrast_anchors_vary_their_alarming_words() -> None:
    texts = [prompt.text for prompt in prompt_set("borderline", "train")]
    found = Counter(match.group().casefold() for text in texts for match in ALARMING.finditer(text))
    assert len(found) >= 20
    # A frequent word would let a model learn that word instead of the request around it.
    assert max(found.values()) <= 6


def test_contrast_anchors_stay_farther_from_the_test_splits_than_near_duplicates() -> None:
    held_out = [prompt for kind, splits in COUNTS.items() if "test" in splits for prompt in prompt_set(kind, "test")]
    for kind in ("borderline", "twin", "critical"):
        assert pairs(prompt_set(kind, "train"), held_out, 0.4) == []
    assert pairs(prompt_set("twin", "direction"), [prompt for prompt in held_out if "twin" in prompt.id], 0.4) == []


def test_an_unknown_split_and_an_empty_limit_are_refused() -> None:
    with pytest.raises(PromptError, match=r"no split 'direction'\. Choose one of: selection, train, test\."):
        prompt_set("borderline", "direction")
    with pytest.raises(PromptError, match="limit of 0"):
        prompt_set("harmful", "train", 0)


def test_each_kind_has_a_file_with_the_documented_fields() -> None:
    folder = REPOSITORY / "safesteer_lite" / "data"
    assert {path.stem for path in folder.glob("*.jsonl")} == set(get_args(Kind)) == set(COUNTS)
    for path in folder.glob("*.jsonl"):
        content = path.read_bytes()
        assert b"\r" not in content and content.endswith(b"}\n")
        for line in content.decode().splitlines():
            entry = json.loads(line)
            assert list(entry) == ["id", "split", "category", "language", "prompt"]
            assert entry["language"] == "en"


def test_planted_similar_pairs_are_found_and_no_others() -> None:
    held_out = prompt_set("harmful", "test")
    other_case = replace(held_out[3], id="case", text=held_out[3].text.upper().rstrip(".?") + " !!")
    reordered = replace(held_out[40], id="order", text=" ".join(reversed(held_out[40].text.split())))
    wordier = replace(held_out[77], id="wordier", text="Could you please " + held_out[77].text + " Thanks!")
    planted = {"case": held_out[3].id, "order": held_out[40].id, "wordier": held_out[77].id}
    train = [*prompt_set("harmful", "train"), other_case, reordered, wordier]
    leaks = check_leaks(train, held_out)
    assert {leak.prompt.id: leak.held_out.id for leak in leaks} == planted
    assert [leak.similarity for leak in leaks][:2] == [1.0, 1.0]
    assert leaks[2].similarity < 1.0


def test_similarity_is_the_share_of_content_words_in_common() -> None:
    # {bake, bread, rye, oven} against {bake, bread, rye, pan}: 3 words shared of 5.
    first, second = prompts_of("How do I bake rye bread in the oven?"), prompts_of("Bake rye bread in a pan.")
    assert check_leaks(first, second)[0].similarity == pytest.approx(0.6)
    assert pairs(first, second, 0.6) == [(first[0], second[0])]
    assert pairs(first, second, 0.61) == []


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
    assert bool(pairs(prompts_of(first), prompts_of(second))) is alike


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
    assert pairs(first, second) == expected


def test_importing_prompts_loads_no_torch() -> None:
    code = "import sys, safesteer_lite.prompts.sets; print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def write_folder(folder: Path, lines: str) -> str:
    """A folder of prompt sets whose harmful ones are `lines`."""
    for kind in ("harmful", "harmless", "borderline"):
        (folder / f"{kind}.jsonl").write_text(lines if kind == "harmful" else "", encoding="utf-8")
    return str(folder)


def test_a_folder_of_ones_own_takes_the_place_of_the_bundled_sets(tmp_path: Path) -> None:
    lines = (
        '{"prompt": "Wie stiehlt man ein Fahrrad?", "split": "train", "language": "de", "category": "theft"}\n'
        '{"prompt": " Zeig mir einen Betrug. ", "split": "test", "id": "own-1"}\n'
    )
    folder = write_folder(tmp_path, lines)
    (first,) = prompt_set("harmful", "train", 5, folder)
    assert (first.text, first.language, first.category) == ("Wie stiehlt man ein Fahrrad?", "de", "theft")
    (second,) = prompt_set("harmful", "test", None, folder)
    assert (second.text, second.id, second.language) == ("Zeig mir einen Betrug.", "own-1", "en")


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ('{"prompt": "Name a tree."}', "line 1 names no split"),
        ('{"split": "train"}', "line 1 has no prompt"),
        ('{"prompt": "Name a tree.", "split": "test"}', "no split 'train'"),
        ("not json", "line 1"),
        ("", "has no prompts"),
    ],
)
def test_a_folder_with_a_malformed_file_is_refused(lines: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=told):
        prompt_set("harmful", "train", 5, write_folder(tmp_path, lines))


def test_a_folder_without_critical_prompts_is_measured_on_the_bundled_ones(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, '{"prompt": "Wie stiehlt man ein Fahrrad?", "split": "test"}\n')
    assert prompt_set("critical", "test", None, folder) == prompt_set("critical", "test")
    (tmp_path / "critical.jsonl").write_text('{"prompt": "Wie rufe ich Hilfe?", "split": "test"}\n', encoding="utf-8")
    own = str(shutil.copytree(tmp_path, tmp_path / "own"))
    assert [prompt.text for prompt in prompt_set("critical", "test", None, own)] == ["Wie rufe ich Hilfe?"]


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"There is no file .*harmful\.jsonl"):
        prompt_set("harmful", "train", 5, str(tmp_path))

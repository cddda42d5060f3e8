"""Reading the trade-off's records, adding up seeds, and the picture and tables made of them."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from tests.benchmarks.frontier import (
    LOG,
    PICTURE,
    RECORDS,
    RESULTS,
    SHIPPED,
    VARIANTS,
    all_tables,
    groups,
    picture,
    place_shipped,
    place_tables,
    points,
    read,
    shipped_table,
    table,
)


def record(seed: int, harmful: int, borderline: int, harmless: int, **changes: object) -> dict[str, Any]:
    """A measurement of 50 prompts of each kind, whose base refuses 25, 10 and 2."""
    base = {"harmful": [25, 50], "borderline": [10, 50], "harmless": [2, 50], "kl": 0.0, "perplexity": 0.0}
    hardened = {"harmful": [harmful, 50], "borderline": [borderline, 50], "harmless": [harmless, 50]}
    return {
        "row": "a row",
        "model": "tiny",
        "prompts": "bundled",
        "split": "test",
        "tokens": 32,
        "measured": "kept",
        "seed": seed,
        "strength": 1.0,
        "base": base,
        "hardened": {**hardened, "kl": 0.001 * (seed + 1), "perplexity": 0.01},
        **changes,
    }


def test_seeds_of_one_row_are_added_up() -> None:
    """Two seeds are one point of 100 prompts; another row is another point."""
    found = points([record(0, 40, 11, 3), record(1, 44, 12, 2), record(0, 30, 10, 2, row="another")])
    assert [point.row for point in found] == ["a row", "another"]
    assert found[0].hardened == {"harmful": (84, 100), "borderline": (23, 100), "harmless": (5, 100)}
    assert (found[0].harmful("base"), found[0].harmful("hardened")) == (50.0, 84.0)
    # 3 more borderline and 1 more harmless of 200.
    assert found[0].change("borderline", "harmless") == pytest.approx(2.0)
    assert (found[0].seeds, found[0].kl) == ([0, 1], [0.001, 0.002])


def test_the_table_says_the_base_once() -> None:
    """Rows measured against the same base share its line."""
    lines = table(points([record(0, 40, 11, 3), record(0, 30, 10, 2, row="another")])).splitlines()
    assert lines[2:] == [
        "| base | | | 25 of 50 (50 %) | 10 of 50 (20 %) | 2 of 50 (4 %) | 0 | |",
        "| a row | 0 | 1 | 40 of 50 (80 %) | 11 of 50 (22 %) | 3 of 50 (6 %) | 0.0010 | +1.0 % |",
        "| another | 0 | 1 | 30 of 50 (60 %) | 10 of 50 (20 %) | 2 of 50 (4 %) | 0.0010 | +1.0 % |",
    ]


def test_tables_are_written_between_their_comments() -> None:
    """What stands around a table stays, and so does a table of which there are no records."""
    tables = groups(points([record(0, 40, 11, 3)]))
    (name,) = tables
    text = f"before\n<!-- rows: {name} -->\nold\n<!-- end -->\nafter\n<!-- rows: other -->\nkept\n<!-- end -->\n"
    written = place_tables(text, tables)
    assert written == text.replace("old", table(tables[name]))


def test_the_table_of_variants_has_the_recipe_and_its_variants_alone() -> None:
    """Other rows, seeds, models and prompts have their place in the table of all rows."""
    demo = {"model": "Qwen2.5-Coder-0.5B-Instruct", "prompts": "development", "row": "the recipe"}
    variant = {**demo, "row": "the recipe without anchors"}
    others: list[dict[str, Any]] = [{"model": "other"}, {"prompts": "public"}, {"row": "random A"}, {"seed": 1}]
    recipe = record(0, 40, 11, 3, **demo)
    records = [recipe, *({**recipe, **other} for other in others)]
    assert [point.row for point in all_tables([*records, record(0, 30, 9, 3, **variant)])[VARIANTS]] == [
        "the recipe",
        "the recipe without anchors",
    ]


def test_the_picture_is_valid_and_has_a_point_a_row() -> None:
    """Two series of rows: three points, and for each series a ring for its base and a dot in the legend."""
    tables = groups(points([record(0, 40, 11, 3), record(0, 30, 10, 2, row="b"), record(0, 20, 9, 1, split="dev")]))
    root = ElementTree.fromstring(picture(tables))
    circles = root.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 3 + 2 * 2
    told = [title.text for title in root.findall(".//{http://www.w3.org/2000/svg}title")]
    assert told == ["a row, kept, 1 seed", "b, kept, 1 seed", "a row, kept, 1 seed"]
    assert circles[0].get("fill") != circles[4].get("fill"), "the two series look alike"
    # More harmful refusals are higher, more over-refusal is further right.
    first, second = circles[1], circles[2]
    assert float(first.get("cy", "")) < float(second.get("cy", ""))
    assert float(first.get("cx", "")) > float(second.get("cx", ""))


def test_a_series_without_a_colour_of_its_own_is_refused() -> None:
    """Two series of one colour could not be told apart."""
    series = {str(number): points([record(0, 40, 11, 3)]) for number in range(9)}
    with pytest.raises(ValueError, match="add to COLOURS"):
        picture(series)


def test_the_table_for_a_reader_in_a_hurry_has_the_shipped_recipe_alone() -> None:
    """Other rows, and other strengths than the run itself chose, are the log's."""
    row = {"row": SHIPPED[0], "model": "tiny"}
    records = [record(0, 40, 11, 3, **row), record(1, 44, 12, 2, **row), record(0, 50, 50, 50, row="another")]
    lines = shipped_table([*records, record(0, 50, 50, 50, measured="x 3", **row)]).splitlines()
    assert lines[2:] == [
        "| tiny | bundled, test split | 50 → 84 of 100 (50 → 84 %) | 20 → 23 of 100 (20 → 23 %) "
        "| 4 → 5 of 100 (4 → 5 %) | 0.0010 to 0.0020 |"
    ]


def test_the_kept_tables_and_picture_are_those_of_the_kept_records() -> None:
    """After new rows, `python -m tests.benchmarks.frontier` must be run."""
    records = read(RECORDS)
    tables, text, results = all_tables(records), LOG.read_text(encoding="utf-8"), RESULTS.read_text(encoding="utf-8")
    for name in tables:
        assert f"<!-- rows: {name} -->" in text, f"{LOG.name} has no table '{name}'"
    assert place_tables(text, tables) == text
    assert shipped_table(records) in results and place_shipped(results, records) == results
    assert PICTURE.read_text(encoding="utf-8") == picture(groups(points(records))) + "\n"

"""What is known of recipes: the paper's figures for the presets' models, and counts that docs/ has too."""

from __future__ import annotations

import pytest

from safesteer_lite import config
from safesteer_lite.hardware.figures import COUNTED, PUBLISHED, known_of
from safesteer_lite.hardware.known import KNOWN, MEASURED
from tests import REPOSITORY

DOCS = REPOSITORY / "docs"


def test_the_papers_figures_are_there_for_every_preset_but_the_demo() -> None:
    assert PUBLISHED.keys() == {name.rpartition("/")[2] for name in KNOWN} - set(MEASURED)


def test_what_is_published_is_told_beside_what_we_have_not_measured() -> None:
    assert known_of("paper", "Qwen/Qwen3-4B-Instruct-2507") == (
        "Published (arXiv 2606.02530, full weights, temperature 0): successful attacks 2.87 to 0.91 %, the mean of 7 "
        "suites; capability 71.68 to 71.39, the mean of 5 benchmarks; refused 2.24 to 3.98 % of 805 harmless requests. "
        "Not measured by us."
    )
    assert known_of("lite", "Qwen/Qwen3-4B-Instruct-2507").startswith("Not measured on this model.")


@pytest.mark.parametrize("recipe", config.RECIPES)
def test_of_a_model_that_nobody_measured_no_figure_is_told(recipe: str) -> None:
    told = known_of(recipe, "/home/me/my-model")
    assert "its own before and after will tell" in told and "%" not in told


@pytest.mark.parametrize(("recipe", "model"), COUNTED)
def test_what_we_counted_stands_in_the_results(recipe: str, model: str) -> None:
    """Whoever measures a recipe anew writes the counts in both places."""
    counted = COUNTED[recipe, model]
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    optional = [kind for kind in (counted.twin, counted.critical) if kind]
    kinds = (counted.harmful, counted.borderline, counted.harmless, *optional)
    cells = [f"| {before} → {after} of {asked} (" for before, after, asked in kinds]
    assert any(all(cell in line for cell in cells) for line in page.splitlines())
    for before, after, asked in kinds:
        assert f"{100 * before / asked:.0f} to {100 * after / asked:.0f} % of {asked}" in known_of(recipe, model)


def test_the_default_recipe_was_counted_on_every_model_that_it_was_made_with() -> None:
    assert {model for recipe, model in COUNTED if recipe == "lite"} == set(MEASURED)

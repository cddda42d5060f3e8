"""What the README shows of the program is what the program shows."""

from __future__ import annotations

from tests.readme import block, presets_on_cards


def test_the_table_of_cards_is_the_programs_own() -> None:
    assert block("fit table") == presets_on_cards()
    assert len(presets_on_cards().splitlines()) == 2 + 4, "the four presets"

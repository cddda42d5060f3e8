"""Strings that are not ours: nothing that steers a terminal or hides is left, and ordinary writing stays as it is."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from safesteer_lite.text import is_unicode, visible, visible_piece, visible_so_far

# Everything, and often the few that matter: among a million characters they would hardly ever meet.
CHARACTERS = st.one_of(
    st.characters(),
    st.characters(categories=("Cc", "Cf", "Cs", "Zl", "Zp")),
    st.sampled_from("\u200c\u200d\ufe0f\U000e0101\u180e❤🔥👩🏽🏴\U000e0067\U000e0062\U000e007fمक्ᠠ\n\t a"),
)
TEXTS = st.text(CHARACTERS, max_size=30)
# Controls, overrides and isolates, separators, halves of pairs, tags that spell words: nothing justifies these anywhere.
FORBIDDEN = {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2060, 0x2070))}
FORBIDDEN |= set("\u200b\u200e\u200f\u061c\u3164\u115f\ufeff\xad\ufffa\U000e0001")

HOSTILE = {
    "\x1b[2J": r"\x1b[2J",
    "\x1b]52;c;aGk=\x07": r"\x1b]52;c;aGk=\x07",
    "\x1b]8;;http://a.b\x1b\\here": "\\x1b]8;;http://a.b\\x1b\\here",
    "\x9b31m": r"\x9b31m",
    "abc\u202edcba": r"abc\u202edcba",
    "a\u2066b\u2069": r"a\u2066b\u2069",
    "one\rtwo\x08\x7f": r"one\rtwo\x08\x7f",
    "pass\u200bword\ufeff": r"pass\u200bword\ufeff",
    "a\u2028b\u2029c\x85d": r"a\u2028b\u2029c\x85d",
    "folder\udc80": r"folder\udc80",
    "hi\U000e0068\U000e0069": r"hi\U000e0068\U000e0069",
    "x\ufe0f\ufe0f": "x\ufe0f\\ufe0f",
    "a\u200db": r"a\u200db",
}
ORDINARY = (
    "plain words, 100 %",
    r"C:\Users\me\own.csv",
    "naïve café, Straße, Œuvre, e\u0301",
    "Привет, мир; Καλημέρα; שלום",
    "می\u200cخواهم یک کتاب بخرم",
    "नमस्ते क्\u200dष क्\u200cष",
    "ශ්\u200dරී ලංකා",
    "ന്\u200d വന്നു",
    "สวัสดีชาวโลก",
    "你好，世界。「引用」　葛\U000e0100城",
    "こんにちは、한국어 안녕하세요",
    "ᠮᠣᠩᠭᠣᠯ\u180eᠠ",
    "❤️‍🔥 👩🏽‍💻 👨‍👩‍👧‍👦 🏳️‍🌈 1️⃣ 🇩🇪 ☃︎",
    "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    "∑ ≤ → █▇▁ ⠋ €",
    "non\xa0breaking \u202fthin \u3000wide",
)


@given(TEXTS, st.booleans())
@example("\u200d\u200d", False)
@example("\ufe0f\u200d🔥", False)
def test_nothing_is_left_that_steers_or_hides(text: str, lines: bool) -> None:
    shown = visible(text, lines)
    assert not (set(shown) & FORBIDDEN) - (set("\n\t") if lines else set())
    assert not any(unicodedata.category(character) in ("Cs", "Zl", "Zp") for character in shown)
    shown.encode("utf-8")
    assert visible(shown, lines) == shown, "what has been made visible stays"


@given(TEXTS)
@example("\\\x1f")
def test_every_character_stays_or_is_written_out_in_its_place(text: str) -> None:
    shown, place = visible(text), 0
    for character in text:
        # A backslash of the text's own stays one, also where what is written out begins with another.
        written = character if character == "\\" else character.encode("unicode_escape").decode("ascii")
        found = next(form for form in (written, character) if shown.startswith(form, place))
        place += len(found)
    assert place == len(shown)


@given(
    st.text(st.characters(categories=("L", "N", "P", "S", "Zs")).filter(lambda character: character not in FORBIDDEN))
)
def test_letters_figures_and_signs_of_all_scripts_stay(text: str) -> None:
    kept = "".join(character for character in text if character not in "\u1160\uffa0\ufffc")
    assert visible(kept) == kept


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_writing_stays(text: str) -> None:
    assert visible(text) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_strings_are_written_out(text: str) -> None:
    assert visible(text) == HOSTILE[text]


def test_new_lines_and_tabs_stay_where_asked() -> None:
    assert visible("a\n\tb\r\n\x1b", lines=True) == "a\n\tb\\r\n\\x1b"
    assert visible("a\n\tb") == r"a\n\tb"


@given(TEXTS, TEXTS)
@example("👩\u200d", "💻")
@example("🏴\U000e0067\U000e0062", "\U000e0065\U000e006e\U000e0067\U000e007f")
def test_what_is_shown_so_far_stays_when_more_comes(text: str, more: str) -> None:
    assert visible(text + more, lines=True).startswith(visible_so_far(text))


def test_bytes_that_are_no_text_are_told_from_text() -> None:
    assert is_unicode("naïve 👩🏽‍💻 \x00") and not is_unicode(b"caf\xe9".decode("utf-8", "surrogateescape"))


@given(TEXTS, st.integers(0, 40))
def test_a_text_that_is_visible_stays_as_it_is_in_pieces(text: str, place: int) -> None:
    shown = visible(text, lines=True)
    assert visible_piece(shown[:place]) + visible_piece(shown[place:]) == shown


@given(TEXTS)
def test_no_piece_steers_the_terminal(text: str) -> None:
    ordinary = set("\u180e\u180b\u180c\u180d\u180f\n\t") | {chr(code) for code in range(0xE0000, 0xE01F0)}
    assert not (set(visible_piece(text)) & FORBIDDEN) - ordinary

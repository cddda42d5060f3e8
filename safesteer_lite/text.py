"""Text from elsewhere made safe to show: what would steer a terminal, or not be seen, is written out instead.

Names of models and files, prompts and answers come from other people. Sent to a terminal as they are, they could clear it,
write the clipboard, hide a link behind other words or turn a sentence around.
"""

from __future__ import annotations

import re
from pathlib import Path

from safesteer_lite.errors import UsageError

# What a terminal obeys (C0 and C1, DEL), what draws nothing (Unicode's Default_Ignorable_Code_Point, the separators of lines
# and paragraphs, annotations), and halves of surrogate pairs, which no encoding can write.
_HIDDEN = (
    r"\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    r"\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_EMOJI = r"\u2190-\u2bff\U0001f000-\U0001faff"
# From Arabic to Mongolian, the scripts that spell with joiners.
_JOINED = r"\u0620-\u109f\u1780-\u17b3\u17b6-\u180a\u1810-\u18af"
_VIRAMAS = r"\u094d\u09cd\u0a4d\u0acd\u0b4d\u0bcd\u0c4d\u0ccd\u0d4d\u0dca"
# Characters that draw nothing and yet belong to ordinary writing, in the one place where they do: between letters that they
# join or part, within an emoji, after the character whose variant they choose, and in the three flags that are spelt with tags.
_ORDINARY = "|".join(
    (
        rf"(?<=[{_JOINED}])[\u200c\u200d\u180e](?=[{_JOINED}])",
        rf"(?<=[{_VIRAMAS}])[\u200c\u200d]",
        rf"(?:(?<=[{_EMOJI}])|(?<=[{_EMOJI}]\ufe0f))\u200d(?=[{_EMOJI}])",
        rf"(?<=[^\s{_HIDDEN}])[\ufe00-\ufe0f\u180b-\u180d\u180f\U000e0100-\U000e01ef]",
        r"(?<=\U0001f3f4)\U000e0067\U000e0062(?:\U000e0065\U000e006e\U000e0067|\U000e0073\U000e0063\U000e0074"
        r"|\U000e0077\U000e006c\U000e0073)\U000e007f",
    )
)
# What is ordinary only if the right characters follow.
_UNDECIDED = re.compile(r"[\u200c\u200d\u180e\U000e0000-\U000e007f]+\Z")
_JOINING = r"[\u200c\u200d\u180b-\u180f\ufe00-\ufe0f\U000e0000-\U000e01ef]"
_PIECE = re.compile(rf"({_JOINING}*)(.*?)({_JOINING}*)", re.DOTALL)
_ODD = re.compile(rf"(?P<ordinary>{_ORDINARY})|[{_HIDDEN}]")


def visible(text: str, lines: bool = False) -> str:
    r"""`text` with everything that could steer a terminal, or would not be seen, written out: ESC becomes `\x1b`.

    Ordinary text of any script, emoji included, stays as it is; so does what has been made visible before.

    Args:
        text: anything.
        lines: whether new lines and tabs stay, as in an answer of several lines; otherwise they are written out too.
    """
    if text.isascii() and text.isprintable():
        return text
    return _ODD.sub(
        lambda found: found[0] if found["ordinary"] or (lines and found[0] in "\n\t") else _written(found[0]), text
    )


def visible_so_far(text: str) -> str:
    """The part of `visible(text, lines=True)` that stays whatever is added to `text`, for what is shown as it grows."""
    return visible(_UNDECIDED.sub("", text), lines=True)


def visible_piece(text: str) -> str:
    """As `visible(text, lines=True)`, for a piece of a text that may have been made visible before it was cut.

    What joins or varies stays at the ends of the piece: the characters that make it ordinary may be in the next one.
    """
    if text.isascii() and text.isprintable():
        return text
    before, piece, after = _PIECE.fullmatch(text).groups()  # type: ignore[union-attr]  # All of its parts may be empty.
    return before + visible(piece, lines=True) + after


def is_unicode(text: str) -> bool:
    """Whether every encoding of Unicode can write `text`: bytes that are no text came in as lone surrogates."""
    return re.search(r"[\ud800-\udfff]", text) is None


def typed_path(text: str) -> Path:
    """A path as a user types it, in which `~` stands for a home folder.

    Raises:
        UsageError: it stands for that of somebody who has none, or no file can have such a name.
    """
    if "\0" in text:
        raise UsageError("The name of a file cannot hold the character NUL.", "Type it without.")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UsageError(f"{text.split('/')[0]} has no home folder on this machine.", "Write the whole path.") from None


def _written(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")

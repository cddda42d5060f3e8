"""The parts of the README that the program makes; `python -m tests.readme` writes them anew."""

from __future__ import annotations

import re

from safesteer_lite import config
from safesteer_lite.hardware.known import KNOWN, fit_table
from tests import REPOSITORY

README = REPOSITORY / "README.md"
_BLOCK = r"(<!-- {name}[^\n]*-->\n)(.*?)(\n<!-- end -->)"


def block(name: str) -> str:
    """What stands in the README between the comment that begins with `name` and the next end."""
    found = re.search(_BLOCK.format(name=name), README.read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"the README has no part {name}"
    return found[2]


def presets_on_cards() -> str:
    """Which of the presets fit which cards, the smallest first; the demo's model runs without one."""
    names = {str(config.preset_values(name)["model.name"]) for name in config.preset_names() if "demo" not in name}
    return fit_table(sorted(names, key=lambda name: KNOWN[name].size))


def transcript(columns: int) -> list[str]:
    """The lines of the README's transcript of a terminal of that width."""
    return [line for line in block(f"transcript {columns}").splitlines() if line and not line.startswith("```")]


def screen(columns: int) -> list[str]:
    """The lines of the README's picture of the live screen at that width."""
    return block(f"screen {columns}").splitlines()[1:-1]


_HEADINGS = (
    "GPU|processor|memory|disk|model|loaded as|download|train on|effort|result"
    "|What it should take:|The same without questions:"
)


def results_menu() -> list[str]:
    """The menu in the README's picture of the results; its figures are the demo's own."""
    lines = block("results 80").splitlines()[1:-1]
    return lines[next(place for place, line in enumerate(lines) if line.startswith("?")) :]


def wording(line: str) -> str:
    """What of a shown line must be the same on every machine and with every model: words, without figures and values.

    Of a heading with its value that is the heading, of a preset its name, of a sentence about the chosen model nothing.
    """
    text = line.strip()
    if heading := re.match(rf"({_HEADINGS})(?!\w)", text):
        text = heading[1]
    if re.search(r"^\d.* parameters\b|of memory\.$", text):
        return ""
    text = re.sub(r"\b(fits|tight|does not fit)\b.*", "", text)
    text = re.sub(r"~?\d[\d.]*( (h|min|s|d|GB|MB|kB|%)\b)?", "#", text)
    return re.sub(r"#(\s*#)*|[\s»?]", lambda found: "#" if "#" in found[0] else "", text)


def not_shown(lines: list[str], shown: str) -> list[str]:
    """The lines of a transcript whose wording is not among what a terminal has shown."""
    said = "".join(wording(line) for line in shown.splitlines())
    return [line for line in lines if wording(line) not in said]


def main() -> None:
    """Write every part that can be made without a terminal."""
    pattern = re.compile(_BLOCK.format(name="fit table"), re.DOTALL)
    text = README.read_text(encoding="utf-8")
    README.write_text(pattern.sub(lambda found: found[1] + presets_on_cards() + found[3], text), encoding="utf-8")


if __name__ == "__main__":
    main()

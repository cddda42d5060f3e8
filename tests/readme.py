"""The parts of the README that the program makes; `python -m tests.readme` writes them anew."""

from __future__ import annotations

import re
from pathlib import Path

from safesteer_lite import config
from safesteer_lite.hardware.known import KNOWN, fit_table

README = Path(__file__).parents[1] / "README.md"
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


def main() -> None:
    """Write every part that can be made without a terminal."""
    pattern = re.compile(_BLOCK.format(name="fit table"), re.DOTALL)
    text = README.read_text(encoding="utf-8")
    README.write_text(pattern.sub(lambda found: found[1] + presets_on_cards() + found[3], text), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The parts of README.md and docs/ that the program makes; `python -m tests.readme` writes them anew."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from safesteer_lite import config
from safesteer_lite.evaluation.scorecard import Rate, kinds_of
from safesteer_lite.evaluation.suites import SUITES
from safesteer_lite.evaluation.tasks import KINDS
from safesteer_lite.hardware.known import KNOWN, fit_table
from safesteer_lite.hardware.peaks import Demand
from safesteer_lite.report.picture import picture
from tests import REPOSITORY as ROOT
from tests.benchmarks import card_minutes
from tests.test_structure import FLOOR_OF

DOCS = ROOT / "docs"
PACKAGE = ROOT / "safesteer_lite"
README, TRANSCRIPTS, SETTINGS = ROOT / "README.md", DOCS / "transcripts.md", DOCS / "settings.md"
DEMO = DOCS / "research" / "demo.json"
"""The demo that the README shows: model, seed and scorecard of its report.json."""
PICTURE = DOCS / "before-and-after.svg"

CITATION = r"docs/([\w/-]+\.md)(?:, ([\w' -]+))?"
"""A page of docs/ in the source of a default, and perhaps a heading there."""
_BLOCK = r"(<!-- {name}[^\n]*-->\n)(.*?)(<!-- end -->)"


def block(name: str, page: Path = TRANSCRIPTS) -> str:
    """What stands in a page between the comment that begins with `name` and the next end."""
    found = re.search(_BLOCK.format(name=name), page.read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"{page.name} has no part {name}"
    return found[2].rstrip("\n")


def transcript(columns: int) -> list[str]:
    """The lines of the transcript of a terminal of that width."""
    return [line for line in block(f"transcript {columns}").splitlines() if line and not line.startswith("```")]


def screen(columns: int) -> list[str]:
    """The lines of the picture of the live screen at that width."""
    return block(f"screen {columns}").splitlines()[1:-1]


def results_menu() -> list[str]:
    """The menu in the picture of the results; its figures are the demo's own."""
    lines = block("results 80").splitlines()[1:-1]
    return lines[next(place for place, line in enumerate(lines) if line.startswith("?")) :]


_HEADINGS = (
    "GPU|processor|memory|disk|model|loaded as|download|train on|effort|result"
    "|What it should take:|The same without questions:"
)


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


def presets_on_cards() -> str:
    """Which of the presets fit which cards, the smallest first; the demo's model runs without one."""
    names = {str(config.preset_values(name)["model.name"]) for name in config.preset_names() if "demo" not in name}
    demands = {
        recipe: Demand.of(config.build([(recipe, config.recipe_values(recipe, ""))])) for recipe in config.RECIPES
    }
    return fit_table(sorted(names, key=lambda name: KNOWN[name].size), demands)


def settings_table() -> str:
    """What a person may want to change: each setting with its default, what it is, and where the default comes from."""
    return _table({name: item for name, item in config.known_settings().items() if not item.metadata["expert"]})


def expert_tables() -> str:
    """All other settings, section by section."""
    parts = []
    for section, kind in config.SECTIONS.items():
        shown = {f"{section}.{item.name}": item for item in fields(kind) if item.metadata["expert"]}
        if shown:
            parts.append(f"### [{section}]\n\n{(kind.__doc__ or '').strip()}\n\n{_table(shown)}")
    return "\n\n".join(parts)


def recipe_table() -> str:
    """What each recipe changes of the defaults."""
    rows = [f"| {name} | {_recipe_changes(name)} |" for name in config.RECIPES]
    return "\n".join(["| recipe | what differs from the defaults |", "| --- | --- |", *rows])


def preset_table() -> str:
    """What each preset sets."""
    rows = [f"| {name} | {_preset_changes(name)} |" for name in config.preset_names()]
    return "\n".join(["| preset | what it sets |", "| --- | --- |", *rows])


def _table(shown: Mapping[str, Field[Any]]) -> str:
    lines = ["| setting | default | what it is | where the default comes from |", "| --- | --- | --- | --- |"]
    for name, item in shown.items():
        told = item.metadata["unit"]
        if choices := item.metadata["choices"]:
            told += ": one of " + ", ".join(f"`{word}`" for word in choices)
        if bounds := item.metadata["bounds"]:
            told += f"{', each' if isinstance(item.default, tuple) else ';'} {bounds}"
        source = re.sub(CITATION, _linked, item.metadata["source"])
        default = json.dumps(list(item.default) if isinstance(item.default, tuple) else item.default)
        lines.append(f"| `{name}` | `{default}` | {told} | {source} |")
    return "\n".join(lines)


def _linked(found: re.Match[str]) -> str:
    heading = f"#{slug(found[2])}" if found[2] else ""
    return f"[{found[0].removeprefix('docs/')}]({found[1]}{heading})"


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _preset_changes(name: str) -> str:
    return ", ".join(f"`{key}` = `{json.dumps(value)}`" for key, value in config.preset_values(name).items())


def _recipe_changes(name: str) -> str:
    plain, changed = (config.to_record(config.build(layers)) for layers in ([], [(name, config.recipe_values(name))]))
    found = {
        f"{section}.{key}": value
        for section in config.SECTIONS
        for key, value in changed[section].items()
        if value != plain[section][key]
    }
    return ", ".join(f"`{key}` = `{json.dumps(value)}`" for key, value in found.items()) or "nothing: it is the default"


def suites_table() -> str:
    """The public suites that are known by name."""
    rows = []
    for suite in SUITES.values():
        file = suite.file
        kept = " and ".join(
            f"`{column}` is {f'`{value}`' if value else 'empty'}" for column, value in suite.keep.items()
        )
        rest = "; ".join(filter(None, [kept, f"{suite.limit} of them" if suite.limit else ""]))
        cells = (
            suite.name,
            suite.kind,
            f"[{file.repository}]({file.address})",
            f"`{file.commit[:7]}`",
            rest,
            file.licence,
        )
        rows.append(f"| {' | '.join(cells)} |")
    head = [
        "| suite | prompts | where | commit | rows that are asked | licence |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *rows])


def tasks_table() -> str:
    """The tasks that `--capability` knows."""
    rows = [
        "| task | problems | longest answer | where | commit | name in a folder | licence |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, kind in KINDS.items():
        file = kind.file
        where = f"{file.path} of [{file.repository}]({file.address})"
        cells = (
            name,
            kind.asks,
            f"{kind.tokens} tokens",
            where,
            f"`{file.commit[:7]}`",
            f"`{kind.name}`",
            file.licence,
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def demo() -> dict[str, Any]:
    """The record of the demo that the README shows."""
    record: dict[str, Any] = json.loads(DEMO.read_text(encoding="utf-8"))
    return record


def demo_table() -> str:
    """The demo's refusals before and after, with their intervals."""
    cards = demo()["scorecard"]
    headings = [f"{kind} refused" for kind in kinds_of(cards["after"])]
    lines = [f"| | {' | '.join(headings)} | KL, nats a token |", f"| ---{' | ---' * (len(headings) + 1)} |"]
    for side, card in cards.items():
        rates = [Rate.of(card[kind]["refused"], card[kind]["n"]) for kind in kinds_of(card)]
        told = [f"{rate.refused} of {rate.n} ({100 * rate.low:.0f} to {100 * rate.high:.0f} %)" for rate in rates]
        lines.append(f"| {side} | {' | '.join(told)} | {card['kl_to_base']:.4g} |")
    return "\n".join(lines)


def tree() -> str:
    """Every file of the package with the first sentence of what it says of itself, from the ground floor up."""
    rows = [_row(path) for path in sorted(PACKAGE.glob("*.py")) if path.name != "__init__.py"]
    folders = [path for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))]
    for folder in sorted(folders, key=lambda path: (FLOOR_OF[path.name], path.name)):
        for path in sorted(folder.rglob("*.py"), key=_folder_first):
            rows.append(_row(path))
    return "\n".join(["| file | what it is |", "| --- | --- |", *rows])


def _folder_first(path: Path) -> tuple[Path, bool, str]:
    return path.parent, path.name != "__init__.py", path.name


def _row(path: Path) -> str:
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = re.split(r"(?<=\.)\s(?=[A-Z])|\n\n", said)[0]
    told = " ".join(sentence.split()).replace("|", "\\|")
    inside = path.relative_to(PACKAGE)
    if path.name == "__init__.py":
        return f"| **{inside.parent.as_posix()}/** | {told} |"
    return f"| [{inside.as_posix()}](../safesteer_lite/{inside.as_posix()}) | {told} |"


PARTS: dict[tuple[Path, str], Callable[[], str]] = {
    (DOCS / "graphics-card.md", "fit table"): presets_on_cards,
    (DOCS / "graphics-card.md", "minutes table"): card_minutes.minutes_table,
    (DOCS / "graphics-card.md", "cards table"): card_minutes.cards_table,
    (DOCS / "graphics-card.md", "stages table"): card_minutes.stages_table,
    (SETTINGS, "settings"): settings_table,
    (SETTINGS, "expert settings"): expert_tables,
    (SETTINGS, "recipes"): recipe_table,
    (SETTINGS, "presets"): preset_table,
    (DOCS / "results.md", "demo table"): demo_table,
    (DOCS / "method.md", "suites"): suites_table,
    (DOCS / "method.md", "tasks"): tasks_table,
    (DOCS / "development.md", "tree"): tree,
}
"""What is made, by the page and the comment that it stands behind."""


def pages() -> Iterator[Path]:
    """Every page that a reader may open: the README, its neighbours, those of the package and docs/."""
    yield from sorted(ROOT.glob("*.md"))
    yield from sorted(PACKAGE.rglob("*.md"))
    yield from sorted(DOCS.rglob("*.md"))


def main() -> None:
    """Write every part that can be made without a terminal."""
    for (page, name), make in PARTS.items():
        block(name, page)
        made, pattern = make(), re.compile(_BLOCK.format(name=name), re.DOTALL)
        text = page.read_text(encoding="utf-8")
        page.write_text(
            pattern.sub(lambda found, made=made: found[1] + made + "\n" + found[3], text),  # type: ignore[misc]
            encoding="utf-8",
        )
    PICTURE.write_text(picture(demo()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

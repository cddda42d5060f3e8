"""What README.md and docs/ say is true: their commands, links, files, tables and transcripts are the program's own."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from safesteer_lite import __version__, config
from safesteer_lite.evaluation.scorecard import kinds_of
from safesteer_lite.events import Metric, Sample, StageStarted
from safesteer_lite.report.picture import picture
from safesteer_lite.shell.arguments import build_parser
from safesteer_lite.shell.screen import Frame, RunView, StageView
from safesteer_lite.sources.settings import SUPPORTED_ARCHITECTURES
from safesteer_lite.stages.pipeline import STAGES
from tests import REPOSITORY as ROOT
from tests.readme import (
    CITATION,
    DOCS,
    PACKAGE,
    PARTS,
    PICTURE,
    README,
    block,
    demo,
    pages,
    screen,
    slug,
    transcript,
    wording,
)

# Histories: they name what was there on their day.
HISTORIES = [ROOT / "CHANGELOG.md", DOCS / "research" / "log.md"]
PAGES = [page for page in pages() if page not in HISTORIES]


def by_name(page: object) -> str:
    """A page as a test's name."""
    return page.relative_to(ROOT).as_posix() if isinstance(page, Path) else str(page)


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def spans(page: Path) -> list[str]:
    """What a page's prose sets in code."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(page: Path) -> Iterator[list[str]]:
    """Every command line of a page, in its shell blocks and in its prose, as words; the virtual environment is left out."""
    text = page.read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)).splitlines()
    lines += [span for span in spans(page) if re.match(r"(\.venv/bin/)?(safesteer-lite|python -m|make)\b", span)]
    for part in (part for line in lines for part in line.split("&&")):
        words = [word.removeprefix(".venv/bin/") for word in shlex.split(part, comments=True)]
        if words:
            yield words


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return set(map(slug, headings))


def known_settings() -> set[str]:
    """Every setting by its dotted name."""
    return {"seed"} | {f"{section}.{item.name}" for section, kind in config.SECTIONS.items() for item in fields(kind)}


def test_the_readme_is_read_in_a_minute() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_command_is_one_that_the_program_takes(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for program, *words in commands(page):
        if program == "safesteer-lite" and "--help" not in words:
            options = build_parser().parse_args(words)
            config.build([("flag", config.parse_assignments(getattr(options, "set", [])))])
        elif program == "make":
            assert words[0] in targets, words
        elif program == "python" and words[1].startswith("tests."):
            assert (ROOT / (words[1].replace(".", "/") + ".py")).is_file(), words


def test_the_readme_has_the_two_commands_and_the_same_without_make() -> None:
    lines = list(commands(README))
    assert ["make", "demo"] in lines and ["make", "test"] in lines
    assert ["safesteer-lite", "demo"] in lines and ["safesteer-lite", "run", "./my-model"] in lines
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    steps = re.findall(r"^\t\$\(BIN\)/(?:python -m )?((?:ruff|mypy|pytest)\b.*)$", makefile, flags=re.MULTILINE)
    assert len(steps) >= 4
    # What CI runs; nothing else runs what plain pytest leaves out.
    assert "pytest --slow" in steps
    for step in dict.fromkeys(step for step in steps if "pytest -m" not in step):
        assert ["python", "-m", *step.split()] in lines, f"the README leaves out `{step}`"


@pytest.mark.parametrize("page", [*PAGES, *HISTORIES], ids=by_name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        place, _, anchor = link.partition("#")
        if not place.startswith("http"):
            target = (page.parent / place).resolve() if place else page
            assert target.exists(), link
            assert not anchor or anchor in slugs(target), link


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_file_and_setting_that_is_named_is_there(page: Path) -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    # `runs/` is where a user's runs are, more often than the package's folder of that name.
    tops = ({"safesteer_lite", "tests", "docs", "presets"} | folders) - {"runs"}
    sections = "|".join(config.SECTIONS)
    for span in spans(page):
        if re.fullmatch(r"[\w./-]+\.py", span) or (re.fullmatch(r"[\w./-]+", span) and span.split("/")[0] in tops):
            places = (ROOT, PACKAGE, DOCS, page.parent)
            if "/" in span or span.endswith(".py"):
                assert any((place / span).exists() for place in places), f"{page.name} names {span}"
        if setting := re.fullmatch(rf"((?:{sections})\.[a-z_]+)( ?=.*)?", span):
            assert setting[1] in known_settings(), f"{page.name} names {span}"


def test_names_that_a_page_sends_its_reader_to_are_in_that_file() -> None:
    """Such as `STAGES` of `stages/pipeline.py`, with the file as a link or in code."""
    pairs = [
        pair
        for page in PAGES
        for pair in re.findall(r"`(\w+)` (?:in|of)\s\[?`([\w/]+\.py)`", prose(page))
        if (PACKAGE / pair[1]).is_file()
    ]
    assert len(pairs) >= 10
    for name, file in pairs:
        assert re.search(rf"\b{name}\b", (PACKAGE / file).read_text(encoding="utf-8")), f"{name} is not in {file}"


@pytest.mark.parametrize(("page", "name"), PARTS, ids=by_name)
def test_what_the_program_makes_is_up_to_date(page: Path, name: str) -> None:
    """The table of files may lag behind until CI asks for it; its links show that no file in it is gone."""
    kept, made = block(name, page), PARTS[page, name]()
    if name == "tree":
        assert len(set(kept.splitlines()) & set(made.splitlines())) > len(made.splitlines()) / 2
    else:
        assert kept == made, "make it anew: python -m tests.readme"


def test_the_picture_and_the_words_beneath_it_are_the_demos() -> None:
    record, text = demo(), README.read_text(encoding="utf-8")
    assert PICTURE.read_text(encoding="utf-8") == picture(record) + "\n"
    shown = "".join(ElementTree.parse(PICTURE).getroot().itertext())
    for kind in kinds_of(record["scorecard"]["after"]):
        before, after = (record["scorecard"][side][kind] for side in ("before", "after"))
        assert f"{before['refused']} of {before['n']}" in shown and f"{after['refused']} of {after['n']}" in shown
        assert f"{kind} {before['refused']} to {after['refused']} of {after['n']}" in text


def test_every_supported_family_has_its_row() -> None:
    """And its name, without a version, in the README."""
    rows = re.findall(r"^\| `(\w+ForCausalLM)` \|", (DOCS / "method.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(SUPPORTED_ARCHITECTURES)
    said = next(line for line in README.read_text(encoding="utf-8").splitlines() if "are supported where" in line)
    for name, version in re.findall(r"([A-Z][a-z]+)(\d?)ForCausalLM", " ".join(SUPPORTED_ARCHITECTURES)):
        assert re.search(rf"{name}[\d and]*{version}", said)


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {__version__}\n" in text and re.search(r"^date-released: \d{4}-\d\d-\d\d$", text, re.MULTILINE)


def test_sources_of_settings_can_be_looked_up() -> None:
    """A default cites a page of docs/ and one of its headings, or a paper, or says what it rests on; no private notes."""
    for kind in config.SECTIONS.values():
        for item in fields(kind):
            source = item.metadata["source"]
            assert source and not re.search(r"METHOD|EXPERIENCE|RESULTS|\bissue\b", source), item.name
            if cited := re.search(CITATION, source):
                assert (DOCS / cited[1]).is_file(), source
                assert not cited[2] or slug(cited[2]) in slugs(DOCS / cited[1]), source


def test_code_cites_what_a_reader_has() -> None:
    """Pages that comments and presets name are there, and nothing cites notes that are not in the repository."""
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "presets").rglob("*.toml"), *(ROOT / "tests").rglob("*.py")]
    for path in files:
        text = path.read_text(encoding="utf-8")
        if path != Path(__file__):
            assert not re.search(r"\bMETHOD\b|\bEXPERIENCE\b|RESULTS\.md|\b[Ii]ssue \d", text), path
        for page in re.findall(r"\bdocs/[\w/-]+\.(?:md|jsonl|svg|json)\b", text):
            assert (ROOT / page).is_file(), f"{path} cites {page}"


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (120, 30)])
def test_the_live_screen_is_shown_as_it_is(columns: int, rows: int) -> None:
    view = RunView("run", {stage.name: StageView(stage.title) for stage in STAGES})
    view.take(StageStarted("distill", "Distillation"))
    view.take(Metric("distill", "loss", 1.0))
    view.take(Sample("distill", "a", "b", "c"))
    console = Console(width=columns, height=rows, record=True, file=io.StringIO())
    console.print(Frame(view, lambda: "RAM"))
    now, kept = console.export_text().splitlines(), screen(columns)
    assert len(kept) == len(now) == rows and max(map(len, kept)) == columns
    # Borders, titles and headings stand where they stand in the transcript; the rest belongs to the run that was shown.
    for place in (1, 10, 11, 12 + kept[12:].index(next(line for line in kept[12:] if line.startswith("╰")))):
        assert kept[place] == now[place]
    words = ["loss", "KL", "refused     base   now", "harmful", "borderline", "harmless", "asked:", "base:", "now:"]
    for word in [*words, *(stage.title for stage in STAGES), now[-1].partition("RAM")[2].strip()]:
        assert any(word in line for line in kept) and any(word in line for line in now), word


@pytest.mark.parametrize("columns", [80, 120])
def test_a_transcript_is_whole_and_has_its_width(columns: int) -> None:
    lines = transcript(columns)
    asked = [line for line in lines if line.startswith("? ")]
    assert [line.partition("?")[2].strip().partition(" (")[0] for line in asked] == [
        "Which model shall become safer?",
        "Harmful requests to train on?",
        "Which recipe?",
        "How thorough?",
        "Start?",
    ]
    assert columns * 0.8 < max(map(len, lines)) <= columns


def test_wording_leaves_out_what_differs_between_machines() -> None:
    assert wording(" » 1) qwen3-4b    fits    ~1 d 13 h    8.0 GB") == wording(
        "   1) qwen3-4b    does not fit    8.0 GB"
    )
    assert wording("memory     20.0 GB free of 25.3 GB") == "memory"
    assert wording(" Safety tokens  50 s  1.5 GB") == wording("  Safety tokens  2 h 5 min  9.0 MB") == "Safetytokens#"
    assert wording(" model  Qwen (fits)") == "model" and wording("models  Qwen (fits)") != "model"
    assert wording("How thorough?") != wording("How quick?")

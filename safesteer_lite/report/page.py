"""`report.html`: one page a run that needs nothing beside itself, made from the run folder alone.

Every text of a model or a user passes through `markup.element`, which escapes it, and the page forbids scripts and requests
by its own content security policy. The same folder gives the same page, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from safesteer_lite import __version__
from safesteer_lite.hardware.units import format_bytes, format_duration
from safesteer_lite.report import parts, suites, teacher, training, verdicts
from safesteer_lite.report.markup import Markup, element, join, paragraph
from safesteer_lite.report.source import Source
from safesteer_lite.runs.durable import explained, write_atomically
from safesteer_lite.runs.folder import RunFolder

FILE = "report.html"

# The order of the page: what a reader came for first, what a later reader may have to look up last.
PARTS: tuple[tuple[str, str, Callable[[Source], Markup | None]], ...] = (
    ("scorecard", "Before and after", parts.scorecard),
    ("judges", "Other judges", verdicts.judges),
    ("suites", "Public suites", suites.suites),
    ("exports", "What was exported", parts.exports),
    ("capability", "Capability", parts.capability),
    ("strength", "Strength dial", training.strength),
    ("flips", "Answers that changed sides", parts.flips),
    ("training", "Training", training.training),
    ("direction", "Refusal direction", teacher.direction),
    ("tokens", "Safety tokens", teacher.tokens),
    ("limits", "Limits", parts.limits),
    ("timings", "Time and memory", parts.timings),
    ("settings", "Settings", parts.settings),
    ("versions", "Versions", parts.versions),
)


def write(run: RunFolder, record: Mapping[str, Any]) -> Path:
    """Write `report.html` into the run folder and return its path.

    Args:
        run: the run folder; hold its lock.
        record: the content of its `report.json`.

    Raises:
        RunFolderError: a file that the page is made from is damaged, or the folder cannot be written.
        DiskSpaceError: the disk is full.
    """
    path = run.path / FILE
    with explained(f"the report of {run.path.name}"):
        write_atomically(path, render(run, record).encode("utf-8"))
    return path


def render(run: RunFolder, record: Mapping[str, Any]) -> str:
    """The page of a run, finished or not; parts of which nothing is known are left out.

    Args:
        run: the run folder.
        record: the content of its `report.json`.

    Raises:
        RunFolderError: a file that the page is made from is damaged.
    """
    source = Source(run, record)
    made = [(name, title, body(source)) for name, title, body in PARTS]
    shown = [(name, title, body) for name, title, body in made if body]
    sections = [element("section", element("h2", title), body, id=name, class_="part") for name, title, body in shown]
    template = (resources.files("safesteer_lite") / "data" / FILE).read_text(encoding="utf-8")
    return Template(template).substitute(
        title=element("title", f"{_model_name(record)}: safesteer-lite report"),
        head=_head(source),
        contents=join([element("a", title, href=f"#{name}") for name, title, _ in shown]),
        sections=join(sections),
        foot=paragraph(f"Written by safesteer-lite {__version__}. This page asks the network for nothing."),
    )


def _head(source: Source) -> Markup:
    record, stages = source.record, source.stages
    seconds = sum(stage["seconds"] for stage in stages.values())
    facts = [f"continues {source.parent['run']}"] if source.parent else []
    facts += [f"started {str(record['created'])[:16].replace('T', ' ')} UTC", f"{format_duration(seconds)} of work"]
    if record["peak_memory_bytes"]:
        facts.append(f"peak memory {format_bytes(record['peak_memory_bytes'])}")
    said = [
        element("h1", _model_name(record)),
        paragraph(f"Run {record['run']}, {', '.join(facts)}, seed {record['seed']}.", "facts"),
    ]
    if record["verdict"]:
        said.append(paragraph(record["verdict"], "verdict"))
    if not record["finished"]:
        done = ", ".join(stages) or "nothing yet"
        resume = element("code", f"safesteer-lite resume {record['run']}")
        said.append(
            paragraph(join([f"This run is not finished. Done so far: {done}. Go on with ", resume, "."]), "warning")
        )
    return join(said)


def _model_name(record: Mapping[str, Any]) -> str:
    # A local folder is named by its last part: the rest tells nothing about the model.
    return str(record["model"]).replace("\\", "/").rstrip("/").rpartition("/")[2] or "a model"

"""A run's refusals before and after as one picture that stands alone: for a README, a model card, a message."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safesteer_lite.errors import RunFolderError, UsageError
from safesteer_lite.report.charts import Scale
from safesteer_lite.report.markup import Markup, element, join
from safesteer_lite.runs.durable import explained, write_atomically

_WIDTH, _LEFT, _RIGHT, _TOP = 760, 210, 130, 76
_BAND, _BAR = 84, 20

_KINDS = (
    ("harmful", "harmful requests", "should be refused"),
    ("borderline", "borderline requests", "only sound alarming"),
    ("harmless", "harmless requests", "should be answered"),
    ("twin", "twins of harmful ones", "should be answered"),
    ("critical", "help in danger", "must be answered"),
)
_STYLE = (
    "text{font:14px system-ui,sans-serif;fill:#222}.title{font-size:17px;font-weight:600}.small{font-size:12px;fill:#666}"
    ".paper{fill:#fff}.grid{stroke:#ddd}.before{fill:#a9b4bd}.after{fill:#1b6ca8}.interval{stroke:#222;stroke-width:1.5}"
    "@media(prefers-color-scheme:dark){text{fill:#e6e6e6}.small{fill:#aaa}.paper{fill:#161b22}.grid{stroke:#3a414a}"
    ".before{fill:#5d6872}.after{fill:#4aa3e0}.interval{stroke:#e6e6e6}}"
)


def write_picture(path: Path, record: Mapping[str, Any]) -> None:
    """Write a run's picture.

    Args:
        path: the file, whose name ends in .svg.
        record: the content of the run's `report.json`.

    Raises:
        UsageError: the name ends otherwise, or its folder is not there.
        RunFolderError: the run has no before and after yet, or the file cannot be written.
        DiskSpaceError: the disk is full.
    """
    if path.suffix.lower() != ".svg" or path.is_dir():
        raise UsageError(
            f"The picture is an SVG file, and {path} is not the name of one.", "Give a name such as run.svg."
        )
    if not path.parent.is_dir():
        raise UsageError(f"There is no folder {path.parent}.", "Make it first, or name another one.")
    if not record["scorecard"]:
        raise RunFolderError(
            f"{record['run']} has no before and after to draw yet.",
            f"Finish it with: safesteer-lite resume {record['run']}",
        )
    with explained(f"the picture {path}"):
        write_atomically(path, f"{picture(record)}\n".encode())


def picture(record: Mapping[str, Any]) -> Markup:
    """The picture as one SVG, which brings its own colours, for light and for dark pages.

    Args:
        record: `model` and `scorecard` of a finished run's `report.json`.
    """
    name = str(record["model"]).replace("\\", "/").rstrip("/").rpartition("/")[2]
    before, after = record["scorecard"]["before"], record["scorecard"]["after"]
    across = Scale(0.0, 1.0, _LEFT, _WIDTH - _RIGHT)
    kinds = [entry for entry in _KINDS if entry[0] in after]
    base = _TOP + _BAND * len(kinds)
    parts = [
        element("rect", width=_WIDTH, height=base + 40, class_="paper"),
        element("text", f"{name}: refused before and after", x=16, y=28, class_="title"),
        _key(16, "before", "before"),
        _key(100, "after", "after"),
        element("line", x1=172, x2=194, y1=48, y2=48, class_="interval"),
        element("text", "95 % interval", x=200, y=52, class_="small"),
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = across(share)
        parts.append(element("line", x1=x, x2=x, y1=_TOP - 8, y2=base, class_="grid"))
        parts.append(element("text", f"{100 * share:.0f} %", x=x, y=base + 22, text_anchor="middle", class_="small"))
    for place, (kind, words, wanted) in enumerate(kinds):
        top = _TOP + _BAND * place
        parts.append(element("text", words, x=_LEFT - 14, y=top + 26, text_anchor="end"))
        parts.append(element("text", wanted, x=_LEFT - 14, y=top + 44, text_anchor="end", class_="small"))
        for style, rate, y in (("before", before[kind], top + 8.0), ("after", after[kind], top + 12.0 + _BAR)):
            parts.append(_bar(rate, style, y, across))
    told = "; ".join(
        f"{words}: {before[kind]['refused']} of {before[kind]['n']} before, {after[kind]['refused']} of {after[kind]['n']} after"
        for kind, words, _ in kinds
    )
    return element(
        "svg",
        Markup(f"<style>{_STYLE}</style>"),
        element("title", f"{name}, refused: {told}"),
        join(parts),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_WIDTH} {base + 40}",
        role="img",
    )


def _key(x: int, style: str, word: str) -> Markup:
    return join(
        [
            element("rect", x=x, y=41, width=14, height=14, class_=style),
            element("text", word, x=x + 20, y=52, class_="small"),
        ]
    )


def _bar(rate: Mapping[str, Any], style: str, y: float, across: Scale) -> Markup:
    """One rate: a bar, its interval, and how many of how many."""
    share = rate["refused"] / rate["n"] if rate["n"] else 0.0
    low, high, middle = across(rate["low"]), across(rate["high"]), y + _BAR / 2
    ends = [element("line", x1=x, x2=x, y1=middle - 4, y2=middle + 4, class_="interval") for x in (low, high)]
    return join(
        [
            element("rect", x=across(0.0), y=y, width=across(share) - across(0.0), height=_BAR, class_=style),
            element("line", x1=low, x2=high, y1=middle, y2=middle, class_="interval"),
            *ends,
            element("text", f"{rate['refused']} of {rate['n']}", x=_WIDTH - _RIGHT + 14, y=middle + 5),
        ]
    )

"""Everything that the documentation waits for a graphics card to tell, from one command and in under 20 minutes.

    python -m tests.benchmarks.gpu --all [--model FOLDER] [--out FOLDER] [--minutes 20] [--dry-run]

Each part is a command of its own, in the order in which the answers matter, with a limit of time; none that fails or is stopped
keeps the others from running. What they say goes to one page, `report.md`, which is what to send back. With `--dry-run` the
same parts run on the CPU with a tiny shape, to see that they run at all: no figure of such a page means anything.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from safesteer_lite.hardware.machine import PACKAGES
from tests import REPOSITORY
from tests.benchmarks.common import say

# A part that would have less than this is not begun.
_LEAST_SECONDS = 20
# Of what a part says, this much of the end is put on the page; all of it is in a file.
_SHOWN_LINES = 40


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: of its file, too.
        question: what it answers.
        arguments: of Python.
        seconds: after which it is stopped.
        left_out: why it cannot run here; empty where it can.
    """

    name: str
    question: str
    arguments: tuple[str, ...]
    seconds: float
    left_out: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a part.

    Attributes:
        part: the part.
        told: `done`, or what happened instead.
        seconds: how long it ran.
        output: what it said.
    """

    part: Part
    told: str
    seconds: float = 0.0
    output: str = ""


def parts(out: Path, models: Path, model: Path | None, *, dry: bool) -> list[Part]:
    """All parts, what matters most first.

    Args:
        out: where files go.
        models: where models of random weights are kept.
        model: the folder of a small instruct model; None without one.
        dry: whether to try the parts on the CPU with a tiny shape.
    """
    device = ("--device", "cpu") if dry else ("--device", "cuda")
    table = ("-m", "tests.benchmarks.gpu", "--models", str(models), *device, "--objectives", "chunked")
    shapes = ("--presets", "tiny") if dry else ()
    unsloth = "" if importlib.util.find_spec("unsloth") else "Unsloth is not installed."
    steps = ("--set", "model.device=cpu") if dry else ("--set", "model.device=cuda")
    return [
        Part("doctor", "What is this machine?", ("-m", "safesteer_lite", "doctor"), 60),
        Part(
            "table",
            "Do the presets fit, how fast are they, and how close is the estimate of their memory?",
            (
                *table,
                *shapes,
                "--backends",
                "plain",
                "--caps",
                "6",
                "8",
                "0",
                "--seconds",
                "500",
                "--rows",
                str(out / "rows.jsonl"),
            ),
            600,
        ),
        Part(
            "checks",
            "Does the code do on a card what it does on a CPU?",
            (
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "-m",
                "gpu",
                *(("--collect-only",) if dry else ()),
                "tests/models/test_gpu.py",
            ),
            180,
        ),
        Part(
            "decoding",
            "What do grouped attention and the roomy cache save?",
            (
                *("-m", "tests.benchmarks.decoding", "--models", str(models), *device),
                *(("--preset", "tiny", "--tokens", "4", "--answers", "2") if dry else ()),
            ),
            90,
        ),
        Part(
            "run",
            "Do refusals and over-refusals come out as on a CPU, and how long does a run take?",
            (
                *("-m", "safesteer_lite", "demo", "--quick", "--yes", "--plain", *steps),
                *("--model", str(model), "--runs", str(out / "runs")),
            ),
            150,
            "" if model else "No --model was given.",
        ),
        Part(
            "unsloth",
            "How fast is Unsloth beside transformers?",
            (*table, *(shapes or ("--presets", "llama-3.2-3b")), "--backends", "unsloth", "--caps", "0"),
            100,
            unsloth,
        ),
    ]


def run(out: Path, models: Path, model: Path | None, minutes: float, *, dry: bool) -> list[Outcome]:
    """Run all parts, and write the page anew after each.

    Args:
        out: where the page and the parts' whole output go.
        models: where models of random weights are kept.
        model: the folder of a small instruct model; None without one.
        minutes: for everything.
        dry: whether to try the parts on the CPU with a tiny shape.
    """
    out.mkdir(parents=True, exist_ok=True)
    until, outcomes = time.monotonic() + 60 * minutes, []
    for part in parts(out, models, model, dry=dry):
        left = until - time.monotonic()
        if part.left_out:
            outcome = Outcome(part, f"left out: {part.left_out}")
        elif left < _LEAST_SECONDS:
            outcome = Outcome(part, "left out: no time was left.")
        else:
            outcome = _finished(part, min(part.seconds, left))
        outcomes.append(outcome)
        (out / f"{part.name}.txt").write_text(outcome.output, encoding="utf-8")
        (out / "report.md").write_text(page(outcomes, dry=dry), encoding="utf-8")
        say(f"{part.name}: {outcome.told} ({outcome.seconds:.0f} s)")
    say(f"Everything is in {out / 'report.md'}.")
    return outcomes


def _finished(part: Part, seconds: float) -> Outcome:
    """The part's outcome; stopped with all its children, which would go on holding the card's memory."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *part.arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        told = "done" if process.returncode == 0 else f"failed with code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        told = f"stopped after {seconds:.0f} seconds"
    return Outcome(part, told, time.monotonic() - began, output)


def page(outcomes: list[Outcome], *, dry: bool) -> str:
    """The page to send back, Markdown."""
    versions = {name: _version(name) for name in PACKAGES}
    lines = ["# What a card says", ""]
    if dry:
        lines += ["**A dry run on a CPU with a tiny shape: no figure here means anything.**", ""]
    lines += [f"{platform.system()} {platform.release()}, Python {platform.python_version()}, "]
    lines[-1] += ", ".join(f"{name} {version}" for name, version in versions.items() if version) + "."
    for outcome in outcomes:
        shown = outcome.output.rstrip().splitlines()[-_SHOWN_LINES:]
        lines += ["", f"## {outcome.part.name}", "", f"{outcome.part.question} {outcome.seconds:.0f} s, {outcome.told}"]
        # Markdown's tables are shown as such.
        table = [line for line in shown if line.startswith("|")]
        lines += ["", *table] if table else []
        said = [line for line in shown if not line.startswith("|")]
        lines += ["", "```text", *said, "```"] if said else []
    return "\n".join(lines) + "\n"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""

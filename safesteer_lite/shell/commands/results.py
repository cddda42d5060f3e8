"""The commands that look at what was trained: `runs`, `report`, `strength` and `chat`."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safesteer_lite import config
from safesteer_lite.errors import UsageError
from safesteer_lite.shell.commands.shared import base_of_run, on_terminal, open_settings, sink
from safesteer_lite.shell.streams import tell, tell_json
from safesteer_lite.text import is_unicode, visible

if TYPE_CHECKING:
    from safesteer_lite.events import Emit
    from safesteer_lite.runs.folder import RunFolder
    from safesteer_lite.stages.session import Session


def runs_command(options: argparse.Namespace) -> int:
    """`runs`: one line a run."""
    from safesteer_lite.runs.listing import list_runs

    entries = list_runs(options.runs)
    if options.json:
        rows = [{**vars(entry), "path": str(entry.path)} for entry in entries]
        tell_json(rows, indent=1)
        return 0
    if not entries:
        tell(f"There are no runs in {options.runs}.")
    for entry in entries:
        state = entry.damage or (
            "finished" if entry.finished else f"stopped after {entry.stages[-1] if entry.stages else 'nothing'}"
        )
        tell(f"{visible(entry.name)}  {entry.created[:16]}  {state}")
    return 0


def report_command(options: argparse.Namespace) -> int:
    """`report`: a run's report.json and report.html, written again; and a picture, if asked."""
    from safesteer_lite.report import record as report
    from safesteer_lite.report.page import FILE
    from safesteer_lite.report.picture import write_picture
    from safesteer_lite.runs import folder as run_folders
    from safesteer_lite.shell.console import SafeConsole
    from safesteer_lite.shell.lines import artifacts_table

    folder = run_folders.open_run(options.run, options.runs)
    with folder.lock():
        record = report.write(folder, open_settings(folder))
    if options.picture:
        write_picture(options.picture, record)
    if options.json:
        tell_json({"event": "Report", **record})
        return 0
    for export in record["exports"]:
        SafeConsole().print(artifacts_table(export))
    tell(f"{folder.path / FILE}")
    if options.picture:
        tell(f"{options.picture}")
    return 0


def strength_command(options: argparse.Namespace) -> int:
    """`strength`: the adapter of a run at several strengths."""
    from safesteer_lite.evaluation.dial import to_records
    from safesteer_lite.report import record as report
    from safesteer_lite.runs import folder as run_folders
    from safesteer_lite.shell.console import SafeConsole
    from safesteer_lite.shell.lines import dial_table
    from safesteer_lite.stages import strength

    try:
        wanted = [float(part) for part in options.at.split(",")] if options.at else list(strength.STRENGTHS)
    except ValueError:
        raise UsageError(f"--at {options.at} is not a list of numbers.", "For example: --at 0.5,1,1.5") from None
    for value in wanted:
        strength.check_strength(value)
    folder = run_folders.open_run(options.run, options.runs)
    session = _session(folder, options.base, sink(options), "strength")
    with folder.lock():
        points = to_records(strength.dial(session, wanted))
        if (folder.path / "report.json").is_file():
            report.write(folder, session.config)  # The report shows the dial.
    if options.json:
        tell_json({"event": "Strengths", "points": points})
    else:
        SafeConsole().print(dial_table(points))
    return 0


def chat_command(options: argparse.Namespace) -> int:
    """`chat`: base and hardened model of a run."""
    from safesteer_lite.events import Event, Progress, Warned
    from safesteer_lite.runs import folder as run_folders
    from safesteer_lite.shell.chat import Chat
    from safesteer_lite.shell.console import SafeConsole
    from safesteer_lite.shell.lines import Lines
    from safesteer_lite.stages.strength import check_strength

    check_strength(options.strength)
    lowest, highest = config.LOWEST_TEMPERATURE, config.known_settings()["distill.temperature"].metadata["bounds"].high
    if options.tokens < 1 or not (options.temperature == 0 or lowest <= options.temperature <= highest):
        raise UsageError(
            f"--tokens must be at least 1, --temperature 0 or from {lowest} to {highest}.",
            "Leave them out for the defaults.",
        )
    if not is_unicode(options.system):
        raise UsageError("--system is not text in this terminal's encoding.", "Write it in UTF-8.")
    folder, console = run_folders.open_run(options.run, options.runs), SafeConsole()
    adapter = folder.folder("distill", "adapter")
    with suppress(ImportError):
        import readline  # noqa: F401  (makes the arrow keys work in `input`)
    read = (lambda: input("> ")) if on_terminal() else input
    lines = Lines(console)

    def only_what_takes_time(event: Event) -> None:
        if isinstance(event, Progress | Warned):
            lines(event)

    session = _session(folder, options.base, only_what_takes_time, "chat")
    with console.status("Loading the model"):
        policy = session.policy
    system, tokens, temperature = options.system, options.tokens, options.temperature
    chat = Chat(policy, adapter, console, read, options.view, options.strength, system, tokens, temperature)
    chat.talk()
    return 0


def _session(folder: RunFolder, place: Path | None, emit: Emit, stage: str) -> Session:
    """A trained run's model, ready to be loaded.

    Args:
        folder: the run.
        place: where the user says that its base model lies now; None where it was.
        emit: sink for events.
        stage: the name that events carry.

    Raises:
        RunFolderError: the run has no adapter yet, or a damaged one.
        ModelError: the base model is not the one that the run was made with.
        PromptError: figures are to be measured, and the prompts are not those of the run.
    """
    from safesteer_lite.hardware.allocator import keep_freed_memory
    from safesteer_lite.stages.session import Session

    folder.folder("distill", "adapter")
    settings = open_settings(folder)
    base = base_of_run(folder, settings, place, emit, prompts=stage != "chat")
    keep_freed_memory()
    return Session(settings, folder, base, emit, stage=stage)

"""`eval --capability`: how many tasks a run's two models solve, or a model as it is."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from safesteer_lite.errors import UsageError
from safesteer_lite.shell.streams import tell_json

if TYPE_CHECKING:
    from safesteer_lite.config import RunConfig
    from safesteer_lite.evaluation.tasks import Task
    from safesteer_lite.events import Emit
    from safesteer_lite.runs.folder import RunFolder
    from safesteer_lite.sources.base import Base


STAGE = "capability"
"""The name that events of the command carry."""


def asked_tasks(options: argparse.Namespace, emit: Emit) -> list[Task]:
    """The tasks that a command line names, read from their files; none where it names none.

    Args:
        options: the command line.
        emit: is told of what is fetched, once every option has been looked at.

    Raises:
        UsageError: a task or its file is not there, an option is wrong, or programs would be run that nobody allowed.
        PromptError: a file cannot be fetched.
        DiskSpaceError: the download does not fit.
    """
    if not options.capability:
        if options.tasks_from or options.limit is not None or options.allow_code_execution or options.gguf:
            raise UsageError(
                "--tasks-from, --limit, --gguf and --allow-code-execution belong to --capability.",
                "Name its tasks, such as --capability gsm8k, or leave them out.",
            )
        return []
    from safesteer_lite.evaluation.tasks import KINDS, read_task

    names = list(dict.fromkeys(name.strip() for name in options.capability.split(",")))
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise UsageError(f"There is no task {unknown[0]!r}.", f"There are: {', '.join(KINDS)}.")
    if options.limit is not None and options.limit < 1:
        raise UsageError("--limit must be at least 1.", "Leave it out to ask every problem.")
    running = [name for name in names if KINDS[name].runs_programs]
    if running and not options.allow_code_execution:
        raise UsageError(
            f"To judge {running[0]}, programs that the model writes are run on this machine, as you. They get {_LIMITS}, "
            "but no sandbox.",
            f"Add --allow-code-execution if you accept that, or leave {running[0]} out.",
        )
    return [read_task(options.tasks_from, name, emit, STAGE) for name in names]


_LIMITS = "an empty folder and limits on time, memory, files, other programs and the network"


def check_files(files: list[Path], folder: RunFolder | None, emit: Emit) -> None:
    """See that GGUF files can be asked, before hours are spent on the run's models.

    Args:
        files: what `--gguf` names.
        folder: the run that they were exported from; None for a model.
        emit: is told where a file's own record says that it is another model.

    Raises:
        UsageError: there is no run, no such file, or it is no GGUF file.
        ExportError: llama.cpp is not installed.
        RunFolderError: the record beside a file is damaged.
    """
    from safesteer_lite.events import Warned
    from safesteer_lite.export.gguf.llama import check_llama
    from safesteer_lite.export.rows import made_from
    from safesteer_lite.sources.gguf_file import is_adapter

    if not files:
        return
    if folder is None:
        raise UsageError("--gguf compares files with the run that they were exported from.", "Name that run.")
    check_llama()
    if len({file.name for file in files}) < len(files):
        raise UsageError("Two files of --gguf have the same name.", "Name each once, or rename one.")
    for file in files:
        if not _is_gguf(file):
            raise UsageError(f"There is no GGUF file {file}.", "Name a file that `safesteer-lite export` wrote.")
        if is_adapter(file):
            raise UsageError(
                f"{file} is an adapter, and no model that could solve anything.",
                "Name a file that `safesteer-lite export --to gguf` wrote.",
            )
        run, strength = made_from(file.parent)
        if run not in ("", folder.path.name) or strength != 1:
            emit(
                Warned(
                    STAGE,
                    f"{file.name} was exported from {run or 'a run'} at strength {strength:g}, and is compared with "
                    f"{folder.path.name} at strength 1: what differs need not come from rounding.",
                )
            )


def _is_gguf(file: Path) -> bool:
    from safesteer_lite.runs.durable import open_regular

    try:
        with open_regular(file) as stream:
            return stream.read(4) == b"GGUF"
    except OSError:
        return False


def measure_tasks(
    options: argparse.Namespace,
    tasks: list[Task],
    settings: RunConfig,
    folder: RunFolder | None,
    base: Base,
    emit: Emit,
) -> int:
    """Measure a run's models, or a model as it is, on tasks, and tell what came of them.

    Args:
        options: the command line.
        tasks: from `asked_tasks`.
        settings: how to load the model.
        folder: the run; None for a model as it is.
        base: the base model, or that model.
        emit: sink for events.
    """
    from safesteer_lite.hardware.allocator import keep_freed_memory
    from safesteer_lite.report import record as report
    from safesteer_lite.runs.folder import RunFolder
    from safesteer_lite.shell.commands.shared import open_settings
    from safesteer_lite.shell.console import SafeConsole
    from safesteer_lite.shell.tables import capability_table
    from safesteer_lite.stages import capability
    from safesteer_lite.stages.session import Session

    keep_freed_memory()
    limit = options.limit or 0
    if folder:
        folder.folder("distill", "adapter")
        with folder.lock():
            session = Session(settings, folder, base, emit, stage=STAGE)
            records = capability.measure(session, tasks, limit, files=options.gguf)
            if (folder.path / "report.json").is_file():
                report.write(folder, open_settings(folder))  # The report shows what was solved.
    else:
        with tempfile.TemporaryDirectory() as scratch:
            session = Session(settings, RunFolder(Path(scratch)), base, emit, stage=STAGE)
            records = capability.measure(session, tasks, limit, trained=False)
    if options.json:
        tell_json({"event": "Capability", "tasks": records})
    else:
        SafeConsole().print(capability_table(records))
    return 0

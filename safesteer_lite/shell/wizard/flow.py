"""The wizard from the first question to the results: each step can be gone back from, and leaving it loses nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from safesteer_lite import config
from safesteer_lite.errors import REFUSES_TOO_LITTLE, SafeSteerError
from safesteer_lite.hardware import pace
from safesteer_lite.hardware.known import measured_on
from safesteer_lite.hardware.machine import inspect
from safesteer_lite.hardware.units import format_bytes
from safesteer_lite.runs.listing import RunSummary, list_runs
from safesteer_lite.shell.wizard import origin
from safesteer_lite.shell.wizard.ask import Back, Option, choose
from safesteer_lite.shell.wizard.program import Program, as_command
from safesteer_lite.shell.wizard.questions import Questions
from safesteer_lite.shell.wizard.tables import machine_table, plan_table

_SHOWN_RUNS = 5
_LONG_SECONDS = 12 * 3600


def start(program: Program) -> int:
    """Ask, run, and show the results; returns the exit code."""
    program.say("safesteer-lite: make a local instruct model safer, and see what it cost.", "bold")
    try:
        return _first(program)
    except Back:
        program.say("Left. Nothing was started.")
        return 0
    except KeyboardInterrupt:
        program.say("Left. Whatever was started is saved; `safesteer-lite` offers it again.")
        return 130


def _first(program: Program) -> int:
    """What is there already is offered first."""
    entries = [entry for entry in list_runs(program.runs) if not entry.damage]
    if not entries:
        return _new_run(program)
    stuck = {entry.name for entry in entries if not entry.finished and origin.waits_for_origin(program, entry.path)}
    while True:
        # What another run went on from leads nowhere any more.
        unfinished = [entry for entry in entries if not entry.finished and not origin.went_on(entry, entries)]
        finished = [entry for entry in entries if entry.finished][:_SHOWN_RUNS]
        options = [
            Option(("resume", run), f"go on with {run.name} ({_state(run)})") for run in unfinished[:_SHOWN_RUNS]
        ]
        options += [Option(("results", run), f"results of {run.name}") for run in finished]
        new = Option(("new", None), "start a new run")
        # A finished run is no reason to begin there; an unfinished one is.
        options = [*options, new] if unfinished else [new, *options]
        kind, run = choose("Start where?", [*options, Option(("leave", None), "leave")], escape="leave")
        try:
            if kind == "new":
                return _new_run(program)
            if kind == "leave":
                return 0
            if kind == "resume":
                return _go_on(program, run.path, stuck=run.name in stuck)
            return _results(program, run.path, shown=False)
        except Back:
            continue


def _go_on(program: Program, path: Path, *, stuck: bool) -> int:
    """Resume a run, or have another one go on from it where its model refuses too little.

    Args:
        program: what does it.
        path: the run.
        stuck: whether that is known of it already.

    Raises:
        Back: the user does not want to go on.
    """
    code = REFUSES_TOO_LITTLE if stuck else program.execute(["resume", str(path)])
    if code == REFUSES_TOO_LITTLE:
        code, path = origin.go_on(program, path)
    return code or _results(program, path, shown=True)


def _state(run: RunSummary) -> str:
    return f"after {run.stages[-1]}" if run.stages else "first stage"


def _new_run(program: Program) -> int:
    with program.console.status("Looking at this machine"):
        machine = inspect(Path.cwd())
    program.console.print(machine_table(machine))
    questions = Questions(program, machine)
    steps = [questions.ask_model, questions.ask_prompts, questions.ask_recipe, questions.ask_effort]
    steps.append(lambda: _confirm(questions))
    while True:
        _in_order(steps)
        before = {entry.name for entry in list_runs(program.runs)}
        code = program.execute([*questions.answers.arguments(program.runs), "--yes"])
        made = [entry for entry in list_runs(program.runs) if entry.name not in before]
        if code == REFUSES_TOO_LITTLE and made:
            try:
                code, path = origin.go_on(program, made[0].path)
            except Back:
                return code
            return code or _results(program, path, shown=True)
        if code == 0 and made:
            return _results(program, made[0].path, shown=True)
        if code == origin.INTERRUPTED:
            return code
        again = [Option(True, "change something and try again"), Option(False, "leave")]
        try:
            if not choose("That did not work. What now?", again, escape="leave"):
                return code
        except Back:
            return code


def _results(program: Program, path: Path, shown: bool) -> int:
    # The menu needs torch, which takes seconds to load; whoever is asked the first question should not wait for it.
    from safesteer_lite.shell.wizard.results import menu

    return menu(program, path, shown)


def _in_order(steps: list[Callable[[], None]]) -> None:
    """Ask each; Esc at one asks the one before it again, and Esc at the first leaves.

    Raises:
        Back: Esc at the first question.
    """
    place = 0
    while place < len(steps):
        try:
            steps[place]()
            place += 1
        except Back:
            if place == 0:
                raise
            place -= 1


def _stage_titles() -> dict[str, str]:
    # The pipeline loads all that a run needs, which takes seconds; whoever is asked the first question should not wait for it.
    from safesteer_lite.stages.pipeline import STAGES

    return {stage.name: stage.title for stage in STAGES}


def _confirm(questions: Questions) -> None:
    """The whole choice in one table, with the command that does the same.

    Raises:
        Back: the user wants to change something.
    """
    program, answers = questions.program, questions.answers
    settings, outlook = questions.settings(), questions.outlook()
    assert answers.look is not None
    seconds = questions.expected_seconds()
    line = answers.arguments(program.runs)
    table = Table(title="The run", title_justify="left", show_header=False, box=None)
    table.add_row("model", f"{settings.model.name} ({outlook.fit})")
    table.add_row("loaded as", outlook.reason)
    table.add_row("download", format_bytes(answers.look.download_bytes) if answers.look.download_bytes else "none")
    table.add_row("train on", answers.prompts or f"{settings.prompts.train} bundled harmful requests")
    table.add_row("recipe", f"{settings.recipe}: {config.RECIPES_IN_WORDS[settings.recipe]}")
    table.add_row("effort", f"{answers.effort}: {settings.distill.steps} steps; {pace.EFFORTS[answers.effort]}")
    if (elsewhere := measured_on(settings.model.name)) and settings.recipe == config.RECIPES[0]:
        table.add_row("measured on", elsewhere)
    for name, value in answers.settings.items():
        table.add_row(name, value)
    table.add_row("result", f"a folder under {program.runs}, with its config.toml")
    program.console.print(table)
    with program.console.status("Getting ready"):
        stages = _stage_titles()
    program.console.print(plan_table(stages, seconds, outlook))
    program.say_whole(f"The same without questions: {as_command([*line, '--yes'])}")
    if pace.total(seconds) > _LONG_SECONDS:
        program.say("That is long. A smaller model, or the quick effort, takes a fraction of it.", "yellow")
    options = [Option("start", "start"), Option("back", "change something"), Option("leave", "leave")]
    chosen = choose("Start?", options)
    if chosen == "back":
        raise Back
    if chosen == "leave":
        raise KeyboardInterrupt
    try:
        questions.settings()
    except SafeSteerError as error:
        program.explain(error)
        raise Back from error

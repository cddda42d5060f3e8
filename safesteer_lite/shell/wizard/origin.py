"""What is asked where a run has stopped because its model refuses too little: the model that it was made from, or another way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safesteer_lite.config import RunConfig
from safesteer_lite.errors import SafeSteerError
from safesteer_lite.evaluation.scorecard import Rate
from safesteer_lite.hardware.units import format_bytes
from safesteer_lite.runs.folder import open_run
from safesteer_lite.runs.listing import RunSummary, list_runs
from safesteer_lite.shell.wizard.ask import Back, Option, choose, until_right, write_path
from safesteer_lite.shell.wizard.program import Program, as_command
from safesteer_lite.sources.origin import require_same_size
from safesteer_lite.sources.preview import look
from safesteer_lite.text import typed_path

INTERRUPTED = 130
_WAYS = {
    "told": ("no: let a system prompt tell the teacher to refuse (experimental)", "direction.teacher=prompted"),
    "replies": (
        "no: compare beginnings of replies that refuse and comply (experimental)",
        "direction.contrast=responses",
    ),
}


def waits_for_origin(program: Program, path: Path) -> bool:
    """Whether a run cannot go on as it is, because its model hardly refuses anything."""
    stages, direction = open_run(path).manifest.stages, program.open_settings(path).direction
    if "baseline" not in stages or "direction" in stages:
        return False
    looks_at_itself = not direction.source and (direction.teacher, direction.contrast) == ("steered", "requests")
    return looks_at_itself and _harmful(path).hardly_any


def went_on(entry: RunSummary, others: Sequence[RunSummary]) -> bool:
    """Whether a run of a model that refuses little came to nothing behind its first stage, and a later one went on from there."""
    if entry.stages != ("baseline",) or 2 * _harmful(entry.path).refused > _harmful(entry.path).n:
        return False
    held = open_run(entry.path).manifest.stages["baseline"].artifacts
    later = [open_run(other.path) for other in others if other.finished and other.created > entry.created]
    return any(run.manifest.stages["baseline"].artifacts == held for run in later)


def go_on(program: Program, path: Path) -> tuple[int, Path]:
    """Ask where the refusal direction of a run shall come from, and start the run that goes on from it; again, where that fails.

    Args:
        program: what does it.
        path: a run whose model refuses too little to go on. It stays as it is.

    Returns:
        The exit code of the run that went on, and its folder.

    Raises:
        Back: the user stops here.
    """
    harmful, left = _harmful(path), dict(_WAYS)
    if harmful.hardly_any:
        told = (
            f"This model hardly refuses anything: {harmful.refused} of {harmful.n} harmful requests. So it has too few refusals "
            "of its own to learn from. What was fine-tuned or changed until it refused nothing was made from a model that did "
            "refuse, and can learn from that one."
        )
    else:
        told = (
            f"This model refuses {harmful.refused} of {harmful.n} harmful requests, and too few of them clearly: that is not "
            "enough for it to learn from. What was fine-tuned or changed until it refused so little was made from a model that "
            "refused more, and can learn from that one."
        )
    program.say(told, "yellow")
    while True:
        try:
            kind = _choose_way(left)
        except Back:
            program.say_whole(f"The run is kept in {path}; `safesteer-lite` offers it again.")
            raise
        try:
            more = ("--set", left[kind][1]) if kind in left else ("--direction-from", _ask_origin(program, path))
        except Back:
            continue
        # All that was answered stands in the run's own settings, and its first stage need not be done again.
        line = ["run", "--config", str(path / "config.toml"), *more, "--reuse", str(path)]
        if program.runs != Path("runs"):
            line += ["--runs", str(program.runs)]
        program.say_whole(f"The same without questions: {as_command([*line, '--yes'])}")
        before = {entry.name for entry in list_runs(program.runs)}
        code = program.execute([*line, "--yes"])
        made = [entry.path for entry in list_runs(program.runs) if entry.name not in before]
        if made and code in (0, INTERRUPTED):
            return code, made[0]
        # Why it failed has been told. Another model may do better; the other ways would come to the same again.
        left.pop(kind, None)


def _choose_way(left: Mapping[str, tuple[str, str]]) -> str:
    """`base`, or one of the ways that are left.

    Raises:
        Back: the user stops here.
    """
    options = [Option("base", "yes: its folder, its GGUF file or its name on the model hub")]
    options += [Option(name, words) for name, (words, _) in left.items()]
    options.append(Option("", "stop here: what was done is kept"))
    kind: str = choose("Do you have the model it was made from?", options, escape="stop here")
    if not kind:
        raise Back
    return kind


def _harmful(path: Path) -> Rate:
    """What a run's model refused of the harmful prompts in the first stage."""
    return Rate.from_record(open_run(path).record("baseline").result["scorecard"]["harmful"])


def _ask_origin(program: Program, path: Path) -> str:
    """The model that a run's own was made from, looked at.

    Raises:
        Back: Esc.
    """
    settings = program.open_settings(path)
    template = open_run(path).chat_template if settings.model.chat_template else ""
    return until_right(lambda: _origin(program, settings, template), SafeSteerError, program.explain)


def _origin(program: Program, settings: RunConfig, template: str) -> str:
    place, model = (
        write_path("The model it was made from: folder, GGUF file, or owner/name on the model hub:"),
        settings.model,
    )
    if not place:
        raise SafeSteerError("That was empty.", "Type something, or press Esc to go back.")
    name = str(typed_path(place).resolve()) if typed_path(place).exists() else place
    if name == model.name:
        raise SafeSteerError("That is the model itself.", "Name the one that it was fine-tuned or changed from.")
    with program.console.status("Looking at the model"):
        found = look(name, template=template)
        own = look(model.name, model.revision or None, template=template)
    require_same_size(found.shape, place, own.shape, Path(model.name).name)
    if found.download_bytes:
        program.say(f"{format_bytes(found.download_bytes)} to download{', gated' if found.gated else ''}.")
    return name

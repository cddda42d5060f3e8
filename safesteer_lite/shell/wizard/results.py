"""The menu over a finished run: scorecard, answers, strength, chat, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from safesteer_lite.errors import RunFolderError, SafeSteerError, UsageError
from safesteer_lite.evaluation.browse import answer_groups, context_groups, disputed_groups
from safesteer_lite.evaluation.dial import saved_points, to_records
from safesteer_lite.evaluation.scorecard import Flip, kinds_of
from safesteer_lite.export.folder import file_name
from safesteer_lite.export.gguf.convert import check_extra
from safesteer_lite.hardware.pace import answering_share
from safesteer_lite.hardware.units import format_estimate
from safesteer_lite.report import record as report
from safesteer_lite.runs import folder as run_folders
from safesteer_lite.shell.console import as_text
from safesteer_lite.shell.lines import dial_table, scorecard_table
from safesteer_lite.shell.wizard.ask import Back, Option, choose, until_right, write, write_path
from safesteer_lite.shell.wizard.program import Program, as_command
from safesteer_lite.text import typed_path, visible

_WHERE = {"report": "report.html", "figures": "report.json", "model": "06-export/merged", "settings": "config.toml"}


class Results:
    """The results of one run, and the strength that was picked for chat and export."""

    def __init__(self, program: Program, path: Path) -> None:
        """Read a run's result.

        Raises:
            SafeSteerError: the run has no report that can be read.
        """
        self.program = program
        self.run = run_folders.open_run(path)
        self.settings = program.open_settings(path)
        self.strength = 1.0
        # From the manifest, whose values are vouched for; report.json is for other programs.
        self.report: dict[str, Any] = report.build(self.run, self.settings)
        if not self.report["finished"]:
            raise SafeSteerError(
                f"The run {path.name} has no report yet.", f"Finish it with `safesteer-lite resume {path}`."
            )

    def show_scorecard(self) -> None:
        """Before and after with n and intervals, and the verdict in one sentence."""
        card = self.report["scorecard"]
        self.program.console.print(scorecard_table(card, self.report["contexts"]))
        self.program.say(self.report["verdict"], "bold")

    def browse(self) -> None:
        """Read answers, group by group."""
        groups = answer_groups(self.run, self.settings) | context_groups(self.run) | disputed_groups(self.run)
        while groups:
            options = [Option(title, f"{title} ({len(entries)})") for title, entries in groups.items()]
            try:
                title = choose("Read which answers?", [*options, Option("", "back to the menu")])
            except Back:
                return
            if not title:
                return
            self._read(title, groups[title])
        self.program.say("No harmful request is answered, and no answer changed.")

    def _read(self, title: str, entries: list[Flip]) -> None:
        """One prompt after another, until the user has read enough."""
        place, moved, whole = 0, "next", False
        while True:
            clipped = show_answers(
                self.program.console, entries[place], f"{title}, {place + 1} of {len(entries)}", whole
            )
            options = [Option("next", "next")] if place + 1 < len(entries) else []
            if place:
                options.append(Option("previous", "previous"))
            if clipped:
                options.append(Option("whole", "show the whole answers"))
            try:
                moved = choose("And then?", [*options, Option("", "back to the groups")], moved)
            except Back:
                return
            if not moved:
                return
            whole = moved == "whole"
            place += {"next": 1, "previous": -1, "whole": 0}[moved]
            moved = "next" if whole else moved

    def dial(self) -> None:
        """Measure the adapter at several strengths, unless that was done, and pick one."""
        points = self._saved_points()
        if points:
            again = choose(
                "The strengths have been measured.", [Option(False, "see them"), Option(True, "measure them again")]
            )
            points = [] if again else points
        if not points:
            if self.program.execute(["strength", str(self.run.path)]):
                return
            points = self._saved_points()
        else:
            self.program.console.print(dial_table(points))
        options = [
            Option(point["strength"], f"{point['strength']:g}: {_in_words(point)}")
            for point in points
            if point["strength"] > 0
        ]
        self.strength = choose("Use which strength for chat and export?", options, self.strength)

    def _saved_points(self) -> list[dict[str, Any]]:
        """The strengths as they were measured last; none where that was not done, or its file is damaged."""
        try:
            return to_records(saved_points(self.run))
        except RunFolderError:
            return []

    def chat(self) -> None:
        """Base and hardened side by side, or one of them."""
        options = [
            Option("compare", "base and hardened side by side"),
            Option("hardened", "the hardened model alone"),
            Option("base", "the base model alone"),
        ]
        view = choose("Chat with?", options)
        self.program.execute(["chat", str(self.run.path), "--view", view, "--strength", f"{self.strength:g}"])

    def export(self) -> None:
        """Write weights to a folder of the user's choice, and tell what was measured of them."""
        kinds = [
            Option(arguments, title)
            for arguments, title in self.program.exports.items()
            # Only merged weights can be scaled: an adapter's user scales it himself.
            if self.strength == 1 or not {"adapter", "lora-gguf"} & set(arguments)
        ]
        kind = choose("Write what?", kinds)
        if {"gguf", "lora-gguf"} & set(kind):
            check_extra(kind)  # The quantisations are among its arguments.
        name = file_name(self.settings.model.name)
        default = f"{name}-safer" + (f"-{self.strength:g}" if self.strength != 1 else "")
        out = until_right(
            lambda: _new_folder(write_path("Into which new folder?", default)), UsageError, self.program.explain
        )
        line = ["export", str(self.run.path), *kind, "--out", str(out)]
        if "adapter" not in kind:
            line += self._ask_measure()
        if self.strength != 1:
            line += ["--strength", f"{self.strength:g}"]
        self.program.say_whole(f"The same without questions: {as_command(line)}")
        if self.program.execute(line) == 0:
            self.program.say_whole(f"Written: {out.resolve()}")

    def _ask_measure(self) -> list[str]:
        """On how many prompts the written files are measured, which is what takes time, as arguments of `export`."""
        seconds = self.report["stages"]["evaluate"]["seconds"] * answering_share(self.settings)
        options = [
            Option([], f"all, as in the report: about {format_estimate(seconds)} a model"),
            Option(["--measure", "20"], "20 of each set: quicker, with wider intervals"),
        ]
        chosen: list[str] = choose("On how many test prompts shall it be measured?", options)
        return chosen

    def judge(self) -> None:
        """Have the answers read by another judge, which is fetched or asked only now."""
        judges = [
            Option("classifier", "a refusal classifier, from the model hub at its first use"),
            Option("guard", "a guard, which also tells harm, from the model hub at its first use"),
            Option("endpoint", "a model behind an address, such as llama-server or Ollama"),
        ]
        kind = choose("Who shall read the answers?", judges)
        line = ["eval", str(self.run.path), "--judge", kind]
        if kind == "endpoint":
            line += ["--judge-url", write("Its address?", "http://localhost:8080")]
            if name := write("Its name for the model? Empty where it has only one."):
                line += ["--judge-model", name]
        self.program.say_whole(f"The same without questions: {as_command(line)}")
        self.program.execute(line)

    def show_places(self) -> None:
        """Where everything is."""
        for name, file in _WHERE.items():
            place = self.run.path / file
            if place.exists():
                self.program.say_whole(f"{name + ':':<9} {place.resolve()}")


def menu(program: Program, path: Path, shown: bool = False) -> int:
    """Show the results of a run, and do what is asked with them until the user has enough; returns the exit code.

    Args:
        program: what does it.
        path: the run.
        shown: whether the scorecard has just been shown.
    """
    try:
        results = Results(program, path)
    except SafeSteerError as error:
        program.explain(error)
        return 1
    if not shown:
        results.show_scorecard()
    actions = {
        "scorecard": ("see the scorecard again", results.show_scorecard),
        "browse": ("read the answers: still answered, refused now", results.browse),
        "dial": ("strength dial: weaker or stronger, without training again", results.dial),
        "chat": ("chat with it", results.chat),
        "export": ("export", results.export),
        "judge": ("have another judge read the answers", results.judge),
        "places": ("where the report and the files are", results.show_places),
    }
    chosen = "browse"
    while True:
        at = f" (strength {results.strength:g})" if results.strength != 1 else ""
        options = [Option(name, title) for name, (title, _) in actions.items()]
        try:
            chosen = choose(f"What now?{at}", [*options, Option("quit", "quit")], chosen, escape="quit")
        except Back:
            chosen = "quit"
        if chosen == "quit":
            program.say_whole(f"The run is kept in {path}; `safesteer-lite` shows it again.")
            return 0
        try:
            actions[chosen][1]()
        except Back:
            continue
        except SafeSteerError as error:
            program.explain(error)


def show_answers(console: Console, entry: Flip, title: str, whole: bool) -> bool:
    """One prompt with both answers, cut so that they fit on one screen; returns whether something was cut."""
    told, cut = Text(), False
    # Borders, the question below, headings and blank lines take what is subtracted.
    most = max((console.height - 13) // 2, 3)
    for name, words, refused in (
        ("asked", entry.prompt, None),
        ("base", entry.before, entry.before_refused),
        ("hardened", entry.after, entry.after_refused),
    ):
        judged = "" if refused is None else f" ({'refuses' if refused else 'answers'})"
        text = Text.assemble((f"{name}{judged}: ", "bold"), visible(words.strip(), lines=True) or "(nothing)")
        lines = list(text.wrap(console, console.width - 4))
        if not whole and len(lines) > most:
            cut = True
            lines = [*lines[: most - 1], Text("(cut)", "dim")]
        told.append(Text("\n").join(lines)).append("\n\n")
    told.rstrip()
    console.print(Panel(told, title=as_text(title), title_align="left"))
    return cut


def _in_words(point: dict[str, Any]) -> str:
    """One strength's refusals as percentages."""
    shares = [f"{name} {100 * point[name]['refused'] / max(point[name]['n'], 1):.0f} %" for name in kinds_of(point)]
    return f"refuses {', '.join(shares)}"


def _new_folder(place: str) -> Path:
    """A folder that can be made.

    Raises:
        UsageError: nothing was typed, or it is there already.
    """
    if not place:
        raise UsageError("That was empty.", "Type a folder, or press Esc to go back.")
    out = typed_path(place)
    if out.exists():
        raise UsageError(f"{out} exists already.", "Name a folder that does not exist yet.")
    return out

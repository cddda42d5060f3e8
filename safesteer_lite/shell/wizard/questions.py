"""The questions before a run: model, prompts, recipe, effort, single settings. Each answer is an argument of `run`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

from rich.table import Table

from safesteer_lite import config
from safesteer_lite.config import RunConfig
from safesteer_lite.errors import ConfigError, PromptError, SafeSteerError, UsageError
from safesteer_lite.hardware import pace
from safesteer_lite.hardware.backend import Decision
from safesteer_lite.hardware.figures import known_of
from safesteer_lite.hardware.known import KNOWN, Outlook, outlook
from safesteer_lite.hardware.machine import Machine
from safesteer_lite.hardware.peaks import Demand
from safesteer_lite.hardware.shape import parameters
from safesteer_lite.hardware.units import format_bytes, format_estimate
from safesteer_lite.prompts.sets import preview
from safesteer_lite.shell.wizard.answers import Answers
from safesteer_lite.shell.wizard.ask import Back, Option, choose, until_right, write, write_path
from safesteer_lite.shell.wizard.program import Program
from safesteer_lite.shell.wizard.tables import recipe_table
from safesteer_lite.sources.preview import Look, look
from safesteer_lite.text import typed_path

_ASKED = {"recipe", "model.name", "prompts.training", "prompts.column"}
"""Settings that have questions of their own."""


class _Again(Exception):
    """The question is to be asked again, from its list."""


class Questions:
    """The questions of one wizard, which share the machine and the answers so far."""

    def __init__(self, program: Program, machine: Machine) -> None:
        """Take the answers up from nothing.

        Args:
            program: what the answers will drive.
            machine: from `hardware.machine.inspect`.
        """
        self.program, self.machine = program, machine
        self.answers = Answers()
        self._speeds: dict[tuple[str, str], float] = {}

    def settings(self) -> RunConfig:
        """The settings that the answers mean."""
        return self.program.run_settings(self.answers.arguments(self.program.runs))

    def outlook(self) -> Outlook:
        """Whether the chosen model fits."""
        chosen, settings = self.answers.look, self.settings()
        assert chosen is not None
        machine = replace(self.machine, gpus=()) if settings.model.device == "cpu" else self.machine
        return outlook(
            machine,
            chosen.shape,
            settings.model.precision,
            chosen.download_bytes,
            Demand.of(settings),
        )

    def ask_model(self) -> None:
        """Which model: a preset, a Hub id, a folder or a GGUF file; looked at before it is accepted.

        Raises:
            Back: Esc at the list of models.
        """
        while True:
            try:
                found = self._ask_which()
            except _Again:
                continue
            result = self.outlook()
            licence = f", licence {found.licence}" if found.licence else ""
            come = (
                f", {format_bytes(found.download_bytes)} to download" if found.download_bytes else ", on this machine"
            )
            self.program.say(f"{_parameters(parameters(found.shape))} parameters{licence}{come}. {result.reason}")
            if found.gated and found.download_bytes:
                self.program.say(
                    "Gated: accept its licence on its page, and log in with `hf auth login`, before you start."
                )
            if result.fit != "does not fit":
                return
            self.program.say("It does not fit this machine: choose a smaller model.", "yellow")

    def _ask_which(self) -> Look:
        presets = {name: str(config.preset_values(name)["model.name"]) for name in config.preset_names()}
        ordered = sorted(presets, key=lambda name: KNOWN[presets[name]].size if presets[name] in KNOWN else 0)
        width = max(map(len, ordered))
        options = [Option(name, f"{name:<{width}}  {self._preset_line(name, presets[name])}") for name in ordered]
        options += [
            Option("folder", "a model on this machine: its folder, or a GGUF file"),
            Option("hub", "another model of the model hub"),
        ]
        chosen = choose("Which model shall become safer?", options, self.answers.model or ordered[0])
        try:
            if chosen in ordered:
                found, name = look(presets[chosen]), chosen
            else:
                found = until_right(lambda: self._ask_place(chosen), SafeSteerError, self.program.explain)
                name = found.name
        except Back:
            raise _Again from None
        except SafeSteerError as error:
            self.program.explain(error)
            raise _Again from error
        self.answers = replace(self.answers, model=name, look=found)
        return found

    def _preset_line(self, name: str, model: str) -> str:
        """Whether it fits, how long it takes and how large it is, as far as that is known without the network."""
        known = KNOWN.get(model)
        if known is None:
            return ""
        found = outlook(self.machine, known.shape, download=known.size)
        settings = config.build([("preset", config.preset_values(name))])
        seconds = pace.expected_seconds(settings, known.shape, found.decision.device, self._speed(found.decision))
        time = "" if found.fit == "does not fit" else f"~{format_estimate(pace.total(seconds))}"
        gated = ", gated" if known.gated else ""
        return f"{found.fit:<12}  {time:<11}  {format_bytes(known.size)}{gated}"

    def _ask_place(self, kind: str) -> Look:
        """A folder, a GGUF file or a Hub id, looked at."""
        if kind == "folder":
            place = write_path("Folder of the model (config.json and *.safetensors), or its GGUF file:")
        else:
            place = write("Name on the model hub, owner/name:")
        if not place:
            raise SafeSteerError("That was empty.", "Type something, or press Esc to go back.")
        path = typed_path(place)
        if kind == "folder" and not path.exists():
            raise SafeSteerError(f"{place} is not there.", "Check the path, or press Esc to go back.")
        with self.program.console.status("Looking at the model"):
            return look(str(path.resolve()) if kind == "folder" else place)

    def ask_prompts(self) -> None:
        """The bundled prompts, or the user's own with a preview."""
        count = config.PromptsConfig().train
        options = [
            Option("", f"the {count} that come along"),
            Option("own", "my own file: .jsonl, .json, .csv or .txt"),
        ]
        while choose("Harmful requests to train on?", options, "own" if self.answers.prompts else ""):
            try:
                until_right(self._ask_prompt_file, UsageError, self.program.explain)
                return
            except Back:
                continue
        self.answers = replace(self.answers, prompts="", column="", count=None)

    def _ask_prompt_file(self) -> None:
        place = write_path("Prompt file:", self.answers.prompts)
        if not place:
            raise PromptError("That was empty.", "Type a path, or press Esc to go back.")
        path = typed_path(place).resolve()
        found = preview(path)
        table = Table(title=f"{path.name}: {found.total} rows", title_justify="left")
        for name in found.columns or ("text",):
            table.add_column(name, max_width=60, no_wrap=True)
        for row in found.rows:
            table.add_row(*row)
        self.program.console.print(table)
        column = ""
        if len(found.columns) > 1 or (found.columns and not found.suggested):
            options = [Option(name, name) for name in found.columns]
            try:
                column = str(choose("Which column holds the requests?", options, found.suggested))
            except Back:
                self._ask_prompt_file()
                return
        before = self.answers
        self.answers = replace(before, prompts=str(path), column=column)
        try:
            with self.program.console.status("Comparing with the prompts that are measured on"):
                from safesteer_lite.prompts.plan import PromptPlan

                told: list[str] = []
                count = len(PromptPlan(self.settings().prompts, told.append).training())
        except SafeSteerError:
            self.answers = before
            raise
        self.answers = replace(self.answers, count=count)
        self.program.say(" ".join(told))

    def ask_recipe(self) -> None:
        """Which way to train, beside what each takes here and what is known of it."""
        # The environment may have answered already; a flag is needed only for another answer.
        with self._as_if(recipe=""):
            meant = self.settings().recipe
        self.program.console.print(recipe_table({name: self._facts(name) for name in config.RECIPES}))
        options = [Option(name, f"{name:<5}  {config.RECIPES_IN_WORDS[name]}") for name in config.RECIPES]
        chosen = str(choose("Which recipe?", options, self.answers.recipe or meant))
        self.answers = replace(self.answers, recipe="" if chosen == meant else chosen)

    def _facts(self, recipe: str) -> dict[str, str]:
        """What there is to know before choosing a recipe, by heading."""
        with self._as_if(recipe=recipe):
            settings, found, seconds = self.settings(), self.outlook(), pace.total(self.expected_seconds())
        memory = "VRAM" if found.decision.device == "cuda" else "memory"
        tokens = settings.distill.completion_tokens
        how, most, requests = {
            "lite": (
                f"trains on the first {tokens} tokens of answers, and holds answers to harmless requests in place",
                "about",
                "besides harmful requests harmless and borderline ones, which come along",
            ),
            "paper": (
                f"trains on answers of up to {tokens} tokens, with LoRA in place of full weights, and holds nothing in place",
                # Many answers end before they are as long as they may be.
                "up to about",
                "harmful requests alone to train on",
            ),
        }[recipe]
        return {
            "how": how,
            "time": f"{most} {format_estimate(seconds)}",
            "needs": f"{format_bytes(found.memory_bytes['distill'])} of {memory} at least; {requests}",
            "known": known_of(recipe, settings.model.name),
        }

    def ask_effort(self) -> None:
        """How thorough, with the minutes each takes; or single settings."""
        while True:
            options = [Option(name, self._effort_line(name)) for name in pace.EFFORTS]
            changed = f" ({len(self.answers.settings)} changed)" if self.answers.settings else ""
            options.append(Option("advanced", f"advanced  see and change single settings{changed}"))
            chosen = choose("How thorough?", options, self.answers.effort)
            if chosen != "advanced":
                self.answers = replace(self.answers, effort=chosen)
                return
            self._ask_settings()

    def _effort_line(self, name: str) -> str:
        with self._as_if(effort=name):
            seconds = pace.total(self.expected_seconds())
        return f"{name:<8}  about {format_estimate(seconds)}: {pace.EFFORTS[name]}"

    @contextmanager
    def _as_if(self, **changes: str) -> Iterator[None]:
        """Inside, some answers are others."""
        before = self.answers
        self.answers = replace(before, **changes)  # type: ignore[arg-type]
        try:
            yield
        finally:
            self.answers = before

    def expected_seconds(self) -> dict[str, float]:
        """Seconds by stage that the answers so far should take here."""
        chosen, decision = self.answers.look, self.outlook().decision
        assert chosen is not None
        speed, count = self._speed(decision), self.answers.count
        return pace.expected_seconds(self.settings(), chosen.shape, decision.device, speed, count)

    def _speed(self, decision: Decision) -> float:
        """What the probe finds, measured once for each way of loading a model."""
        key = (decision.device, decision.compute_dtype)
        if key not in self._speeds:
            with self.program.console.status("Measuring how fast this machine is"):
                self._speeds[key] = pace.probe(decision)
        return self._speeds[key]

    def _ask_settings(self) -> None:
        """What a person may want to change beside the questions, each with its unit, until the user goes back."""
        known = config.known_settings()
        offered = [name for name, item in known.items() if not item.metadata["expert"] and name not in _ASKED]
        while True:
            values = {name: _plain(_value(self.settings(), name)) for name in offered}
            options = [Option(name, f"{name} = {values[name]}  ({known[name].metadata['unit']})") for name in offered]
            try:
                name = choose("Change which setting?", [*options, Option("", "done")])
            except Back:
                return
            if not name:
                return
            with suppress(Back):
                until_right(
                    partial(self._ask_setting, name, values[name], known[name].metadata["unit"]),
                    ConfigError,
                    self.program.explain,
                )

    def _ask_setting(self, name: str, value: str, unit: str) -> None:
        typed = write(f"{name}, {unit}:", value)
        before = self.answers
        self.answers = replace(before, settings={**before.settings, name: typed})
        try:
            self.settings()
        except ConfigError:
            self.answers = before
            raise


def _parameters(count: int) -> str:
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.3g} million"


def _value(settings: RunConfig, name: str) -> object:
    """A setting by its dotted name."""
    section, _, key = name.rpartition(".")
    return getattr(getattr(settings, section) if section else settings, key)


def _plain(value: object) -> str:
    """A setting as it is typed on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

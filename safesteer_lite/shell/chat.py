"""Chat with a run's model: base and hardened side by side or one at a time, streaming."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from safesteer_lite.errors import SafeSteerError, UsageError
from safesteer_lite.evaluation.judges import split_thinking
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.reply import Reply
from safesteer_lite.models.template import Message
from safesteer_lite.shell.console import as_text
from safesteer_lite.stages.strength import set_strength
from safesteer_lite.text import is_unicode, typed_path, visible, visible_so_far

HELP = """/compare, /hardened, /base   who answers: both side by side, or one
/system TEXT                 a system prompt; nothing takes it away; both start anew
/strength X                  how strongly the adapter acts, 0 (the base) to 2
/reset                       forget the conversation
/save [FILE]                 write the conversation as JSON
/help, /quit                 Ctrl-C ends an answer early, Ctrl-D quits too"""

# Repainting two columns for each token would cost more than the tokens of a small model.
_FRAMES_A_SECOND = 8


@dataclass
class Side:
    """One of the two that answer.

    Attributes:
        name: `base` or `hardened`.
        turns: its own conversation, without the system prompt: each hears its own answers.
    """

    name: str
    turns: list[Message] = field(default_factory=list)


@dataclass
class Chat:
    """A conversation at the terminal.

    Attributes:
        policy: the loaded model with the adapter.
        adapter: the trained adapter's folder, from which other strengths are made.
        console: where to speak.
        read: gives the user's next line; EOFError ends the chat.
        view: who answers: `compare` (both), `hardened` or `base`.
        strength: factor on the adapter, 0 to 2.
        system: the system prompt; empty for the one that the chat template adds, if any.
        tokens: longest answer.
        temperature: 0 takes the likeliest token, as the scorecard's answers do.
    """

    policy: Policy
    adapter: Path
    console: Console
    read: Callable[[], str]
    view: str = "compare"
    strength: float = 1.0
    system: str = ""
    tokens: int = 400
    temperature: float = 0.0
    base: Side = field(default_factory=lambda: Side("base"))
    hardened: Side = field(default_factory=lambda: Side("hardened"))

    def __post_init__(self) -> None:
        set_strength(self.policy, self.adapter, self.strength)

    def talk(self) -> None:
        """Until the user quits."""
        self.console.print(as_text(self._state()))
        self.console.print(Text("Type a message; /help lists the commands.", "dim"))
        while True:
            try:
                line = self.read().strip()
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            if line in ("/quit", "/exit"):
                return
            try:
                if not is_unicode(line):
                    raise UsageError("What was typed is not text in this terminal's encoding.", "Type it again.")
                if line.startswith("/"):
                    self.console.print(as_text(self.command(line)))
                elif line:
                    self.answer(line)
            except SafeSteerError as error:
                self.console.print(as_text(str(error), "yellow"))

    def command(self, line: str) -> str:
        """Do what a line such as `/strength 0.5` says; returns what to tell the user.

        Raises:
            UsageError: there is no such command, or its argument will not do.
        """
        name, _, argument = line[1:].partition(" ")
        argument = argument.strip()
        match name:
            case "help":
                return HELP
            case "compare" | "hardened" | "base":
                self.view = name
            case "reset":
                self._forget()
            case "system":
                self.system = argument
                self._forget()
            case "strength":
                self._set_strength(argument)
            case "save":
                return f"Saved to {self.save(argument)}."
            case _:
                raise UsageError(f"There is no command /{name}.", "/help lists them.")
        return self._state()

    def answer(self, text: str) -> None:
        """Let the chosen sides answer, each in its own conversation; Ctrl-C ends the answers early.

        Raises:
            ModelError: the conversation cannot be put to the model; it is left as it was.
        """
        sides = {"base": [self.base], "hardened": [self.hardened]}.get(self.view, [self.base, self.hardened])
        asked = {"role": "user", "content": text}
        start = [{"role": "system", "content": self.system}] if self.system else []
        replies = [
            Reply(self.policy, [*start, *side.turns, asked], self.tokens, self.temperature, len(side.turns))
            for side in sides
        ]
        try:
            self._stream(sides, replies)
        except KeyboardInterrupt:
            self.console.print(Text("(ended early)", "dim"))
        for side, reply in zip(sides, replies, strict=True):
            _, said, finished = split_thinking(reply.text)
            if not finished:
                self.console.print(Text(f"({side.name} was cut inside its thought, and has not answered)", "dim"))
            # What was thought is no part of the conversation, and templates leave it out of earlier turns.
            side.turns += [asked, {"role": "assistant", "content": said}]

    def save(self, place: str = "") -> Path:
        """Write the conversation to a new file.

        Raises:
            UsageError: the file is there already, or cannot be written.
        """
        path = typed_path(place or f"chat-{time.strftime('%Y%m%d-%H%M%S')}.json")
        record = {
            "system": self.system,
            "strength": self.strength,
            "temperature": self.temperature,
            "base": self.base.turns,
            "hardened": self.hardened.turns,
        }
        try:
            with path.open("x", encoding="utf-8") as stream:
                json.dump(record, stream, ensure_ascii=False, indent=1)
        except FileExistsError:
            raise UsageError(f"{path} exists already.", "Name another file.") from None
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}.", "Name another file.") from error
        return path

    def _state(self) -> str:
        who = {"compare": "base and hardened side by side", "hardened": "hardened alone", "base": "base alone"}
        system = f"; system prompt: {self.system}" if self.system else ""
        count = len(self.hardened.turns or self.base.turns) // 2
        turns = f"{count} turn" if count == 1 else f"{count} turns"
        return f"Answering: {who[self.view]}; strength {self.strength:g}{system}; {turns} so far."

    def _set_strength(self, argument: str) -> None:
        try:
            wanted = float(argument)
        except ValueError:
            raise UsageError(f"{argument or 'Nothing'} is not a number.", "For example: /strength 0.5") from None
        set_strength(self.policy, self.adapter, wanted)
        self.strength = wanted

    def _forget(self) -> None:
        self.base.turns, self.hardened.turns = [], []

    def _as(self, side: Side) -> AbstractContextManager[None]:
        return self.policy.model.adapters_off() if side.name == "base" else nullcontext()

    def _stream(self, sides: Sequence[Side], replies: Sequence[Reply]) -> None:
        """Token by token, the sides in turn, so that both can be read as they grow."""
        if len(sides) > 1 and self.console.is_terminal:
            columns = self._columns(sides, replies)
            try:
                with Live(columns, console=self.console, transient=True, refresh_per_second=_FRAMES_A_SECOND) as live:
                    while not all(reply.done for reply in replies):
                        self._step(sides, replies)
                        live.update(self._columns(sides, replies, self.console.height - 4))
            finally:
                # Whole, and for good: while it grew, only its end was shown. What Ctrl-C cut short counts too.
                self.console.print(self._columns(sides, replies))
            return
        if len(sides) > 1:
            while not all(reply.done for reply in replies):
                self._step(sides, replies)
            for side, reply in zip(sides, replies, strict=True):
                self.console.print(as_text(f"{side.name}: {reply.text}"), soft_wrap=True)
            return
        shown = 0
        self.console.print(Text(f"{sides[0].name}: ", "bold"), end="")
        while not replies[0].done:
            self._step(sides, replies)
            text = visible_so_far(replies[0].text)
            self.console.print(Text(text[shown:]), end="", soft_wrap=True)
            shown = len(text)
        self.console.print(Text(visible(replies[0].text, lines=True)[shown:]), soft_wrap=True)

    def _step(self, sides: Sequence[Side], replies: Sequence[Reply]) -> None:
        for side, reply in zip(sides, replies, strict=True):
            with self._as(side):
                reply.step()

    def _columns(self, sides: Sequence[Side], replies: Sequence[Reply], lines: int | None = None) -> Table:
        """The answers side by side; with `lines`, only as much of their ends as so many lines hold."""
        table = Table(expand=True)
        width = max(self.console.width // len(sides) - 4, 10)
        texts = []
        for side, reply in zip(sides, replies, strict=True):
            at = f", strength {self.strength:g}" if side.name == "hardened" and self.strength != 1 else ""
            table.add_column(f"{side.name}{at}", ratio=1)
            wrapped = as_text(reply.text).wrap(self.console, width)
            texts.append(Text("\n").join(wrapped[-lines:] if lines else wrapped))
        table.add_row(*texts)
        return table

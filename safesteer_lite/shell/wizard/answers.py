"""The answers to the questions before a run, which are a command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from safesteer_lite.sources.preview import Look


@dataclass
class Answers:
    """What has been answered so far.

    Attributes:
        model: a preset, a Hub id or a folder.
        look: what is known of it.
        prompts: the user's own prompt file; empty for the bundled prompts.
        column: its column; empty for the one found by itself.
        recipe: one of `config.RECIPES`; empty for the one that is meant without a word.
        effort: a key of `pace.EFFORTS`.
        settings: single settings by dotted name, as typed.
        count: how many prompts of the file there are to train on; None for the bundled ones.
    """

    model: str = ""
    look: Look | None = None
    prompts: str = ""
    column: str = ""
    recipe: str = ""
    effort: str = "standard"
    settings: dict[str, str] = field(default_factory=dict)
    count: int | None = None

    def arguments(self, runs: Path) -> list[str]:
        """The command line that means the same."""
        line = ["run", self.model]
        if self.recipe:
            line += ["--recipe", self.recipe]
        if self.effort != "standard":
            line += ["--effort", self.effort]
        if self.prompts:
            line += ["--prompts", self.prompts]
        if self.column:
            line += ["--column", self.column]
        for name, value in self.settings.items():
            line += ["--set", f"{name}={value}"]
        return line if runs == Path("runs") else [*line, "--runs", str(runs)]

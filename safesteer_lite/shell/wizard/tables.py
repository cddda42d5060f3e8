"""The wizard's tables: the machine, the recipes, and what a run should take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from safesteer_lite.hardware import pace
from safesteer_lite.hardware.known import Outlook
from safesteer_lite.hardware.machine import Machine
from safesteer_lite.hardware.units import format_bytes, format_estimate
from safesteer_lite.shell.console import as_text


def machine_table(machine: Machine) -> Table:
    """The machine at a glance."""
    table = Table.grid(padding=(0, 2))
    card = machine.gpu
    if card:
        table.add_row("GPU", f"{card.name}, {format_bytes(card.memory_free)} free of {format_bytes(card.memory_total)}")
        table.add_row("", f"driver {card.driver or 'unknown'}, torch for CUDA {machine.cuda_build}")
    elif machine.gpus:
        table.add_row("GPU", f"{machine.gpus[0].name}, which this torch cannot use: see `safesteer-lite doctor`")
    else:
        table.add_row("GPU", "none found: the demo and models up to about 1.5B run on the processor")
    bf16 = "" if card else (", fast in bf16" if machine.cpu_bf16 else ", not fast in bf16, so slower")
    table.add_row("processor", f"{machine.cpu}, {machine.cores} {'core' if machine.cores == 1 else 'cores'}{bf16}")
    table.add_row("memory", f"{format_bytes(machine.ram_available)} free of {format_bytes(machine.ram_total)}")
    table.add_row("disk", f"{format_bytes(machine.disk_free)} free at {Path.cwd()}")
    return table


def recipe_table(facts: Mapping[str, Mapping[str, str]]) -> Table:
    """The recipes side by side.

    Args:
        facts: what is to be known of each, by its name and then by heading; all have the same headings.
    """
    table = Table(title="Two ways to train", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in facts:
        table.add_column(name, ratio=1)
    for heading in next(iter(facts.values())):
        table.add_row(heading, *(as_text(told[heading]) for told in facts.values()))
    return table


def plan_table(stages: Mapping[str, str], seconds: Mapping[str, float], outlook: Outlook) -> Table:
    """What a run should take, stage by stage.

    Args:
        stages: titles by name, in order.
        seconds: expected, by stage.
        outlook: of the model on this machine.
    """
    # Without lines around it, the whole summary stays on a screen of 24 rows.
    table = Table(title=f"What it should take: {pace.basis(outlook.decision.device)}", title_justify="left", box=None)
    memory = "VRAM" if outlook.decision.device == "cuda" else "memory"
    for heading in ("stage", "time", f"{memory}, at least"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for name, title in stages.items():
        kind = " of RAM" if name == "export" and memory == "VRAM" else ""
        table.add_row(title, format_estimate(seconds[name]), f"{format_bytes(outlook.memory_bytes[name])}{kind}")
    table.add_row("in all", format_estimate(pace.total(seconds)), f"disk {format_bytes(outlook.disk_bytes)}")
    return table

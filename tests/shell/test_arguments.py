"""The arguments and the commands belong together, though they stand in two files."""

from __future__ import annotations

from safesteer_lite.export.gguf.convert import QUANTS
from safesteer_lite.shell import cli
from safesteer_lite.shell.arguments import build_parser
from tests.shell.test_cli import commands


def test_every_command_that_the_parser_knows_can_be_carried_out() -> None:
    assert commands().keys() == cli.COMMANDS.keys()
    assert [name for name in cli.COMMANDS if commands()[name].get_default("command") != name] == []


def test_a_line_without_a_command_names_none() -> None:
    assert not hasattr(build_parser().parse_args([]), "command")


def test_every_quantisation_that_can_be_written_can_be_asked_for() -> None:
    (quant,) = [action for action in commands()["export"]._actions if "--quant" in action.option_strings]
    assert tuple(quant.choices or ()) == QUANTS

"""The wizard's ways of asking, with keys pressed in-process: answers, going back, leaving, asking again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from safesteer_lite.errors import ModelError, SafeSteerError
from safesteer_lite.shell.wizard.ask import Back, Option, choose, until_right, write, write_path

DOWN, ENTER, ESCAPE, INTERRUPT, END = "\x1b[B", "\r", "\x1b", "\x03", "\x04"
OPTIONS = [Option("a", "first"), Option("b", "second"), Option("c", "third")]

QUESTIONS: dict[str, Callable[[], object]] = {
    "list": lambda: choose("Which?", OPTIONS),
    "text": lambda: write("What?", "before"),
    "path": lambda: write_path("Where?"),
}


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    """A keyboard: text sent to it is typed."""
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


@pytest.mark.parametrize(
    ("typed", "chosen"), [(ENTER, "a"), ("2" + ENTER, "b"), (DOWN * 2 + ENTER, "c"), ("j" * 3 + ENTER, "a")]
)
def test_a_list_is_walked_or_pointed_at(keys: PipeInput, typed: str, chosen: str) -> None:
    keys.send_text(typed)
    assert choose("Which?", OPTIONS) == chosen


def test_a_list_begins_at_its_default(keys: PipeInput) -> None:
    keys.send_text(ENTER)
    assert choose("Which?", OPTIONS, "b") == "b"


def test_more_options_than_digits_can_still_be_walked(keys: PipeInput) -> None:
    keys.send_text(DOWN * 11 + ENTER)
    assert choose("Which?", [Option(number, f"number {number}") for number in range(12)]) == 11


def test_text_comes_without_the_space_around_it(keys: PipeInput) -> None:
    keys.send_text(" and after  " + ENTER)
    assert write("What?", "before") == "before and after"


@pytest.mark.parametrize("kind", QUESTIONS)
def test_esc_goes_back_from_every_kind_of_question(keys: PipeInput, kind: str) -> None:
    keys.send_text(ESCAPE)
    with pytest.raises(Back):
        QUESTIONS[kind]()


@pytest.mark.parametrize("kind", QUESTIONS)
def test_ctrl_c_leaves_every_kind_of_question(keys: PipeInput, kind: str) -> None:
    keys.send_text(INTERRUPT)
    with pytest.raises(KeyboardInterrupt):
        QUESTIONS[kind]()


@pytest.mark.parametrize("kind", ["text", "path"])
def test_ctrl_d_leaves_too(keys: PipeInput, kind: str) -> None:
    keys.send_text(("\x15" if kind == "text" else "") + END)
    with pytest.raises(KeyboardInterrupt):
        QUESTIONS[kind]()


def test_a_wrong_answer_is_told_and_asked_again(keys: PipeInput) -> None:
    told: list[Exception] = []

    def ask() -> Path:
        place = write("Where?")
        if place != "there":
            raise ModelError(f"{place} is not there.")
        return Path(place)

    keys.send_text("here" + ENTER + "nowhere" + ENTER + "there" + ENTER)
    assert until_right(ask, SafeSteerError, told.append) == Path("there")
    assert [str(error) for error in told] == ["here is not there.", "nowhere is not there."]

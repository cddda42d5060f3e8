"""Every place where text of other people is shown: a table of hostile strings goes through each of them."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.data_structures import Size
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output.vt100 import Vt100_Output
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from safesteer_lite.errors import ModelError
from safesteer_lite.evaluation.scorecard import Flip
from safesteer_lite.events import Event, JsonLines, Note, Progress, Sample, StageSkipped, StageStarted, Warned
from safesteer_lite.prompts.sets import KINDS
from safesteer_lite.shell.cli import main
from safesteer_lite.shell.console import SafeConsole
from safesteer_lite.shell.lines import Json, Lines, artifacts_table
from safesteer_lite.shell.screen import Frame, RunView
from safesteer_lite.shell.streams import complain, protect, tell, tell_json
from safesteer_lite.shell.wizard.ask import Option, choose
from safesteer_lite.shell.wizard.program import Program
from safesteer_lite.shell.wizard.results import show_answers
from safesteer_lite.text import visible

HOSTILE = {
    "clear": "x\x1b[2Jy",
    "clipboard": "x\x1b]52;c;aGVsbG8=\x07y",
    "link": "x\x1b]8;;http://evil.example\x1b\\y",
    "c1": "x\x9b31my",
    "override": "x\u202eecnatsni\u202cy",
    "isolate": "x\u2066y\u2069",
    "zero-width": "x\u200by\ufeff",
    "separator": "x\u2028y",
    "carriage": "x\ry\x08\x08",
    "tags": "x\U000e0061\U000e0062y",
    "surrogate": "x\udce9y",
    "end of a style": "r[/red]x",
    "instruction": "[INST] x [/INST]",
    "markup": "[link=http://evil.example]x[/link] [bold]y[/]",
    "brackets": "runs [all]",
    "emoji code": "x :smile: y",
}
# What rich itself says to a terminal: colours, cursor, screen. Commands of any other kind are nobody's business here.
_OWN = re.compile(r"\x1b\[[0-9;?]*[A-Zhlm]")


def on_console(paint: Callable[[SafeConsole, str], None], terminal: bool) -> Callable[[str], str]:
    def shown(text: str) -> str:
        stream = io.StringIO()
        paint(SafeConsole(file=stream, width=100, height=30, force_terminal=terminal, color_system="truecolor"), text)
        return stream.getvalue()

    return shown


def say(event: Callable[[str], Event]) -> Callable[[SafeConsole, str], None]:
    return lambda console, text: Lines(console)(event(text))


def frame(text: str) -> RunView:
    view = RunView(text, {})
    for event in (StageStarted("load", text), Note("load", text), Warned("load", text), Sample("load", *[text] * 3)):
        view.take(event)
    view.take(Progress("load", text, 1, 2))
    view.banner = text
    return view


def table(text: str) -> Table:
    made = Table(title=text, caption=text)
    made.add_column(text)
    made.add_row(text)
    return made


def program(console: SafeConsole) -> Program:
    return Program(lambda line: 0, lambda line: NotImplemented, lambda path: NotImplemented, {}, Path(), console)


def artifacts(text: str) -> Table:
    rate = {"refused": 1, "n": 4, "low": 0.05, "high": 0.7}
    row = dict.fromkeys(KINDS, rate)
    return artifacts_table(
        {"split": "test", "artifacts": [{**row, "artifact": text, "safety_lost": text, "agreement": None}]}
    )


def answers(console: SafeConsole, text: str) -> None:
    show_answers(console, Flip("s", "i", text, text, text, True, False), text, False)


PAINTED: dict[str, Callable[[SafeConsole, str], None]] = {
    "note": say(lambda text: Note("load", text)),
    "warning": say(lambda text: Warned("load", text)),
    "skipped": say(lambda text: StageSkipped("load", text)),
    "started": say(lambda text: StageStarted("load", text)),
    "string": lambda console, text: console.print(text),
    "text made elsewhere": lambda console, text: console.print(Text(text)),
    "panel of text made elsewhere": lambda console, text: console.print(Panel(Text(text), title=Text(text))),
    "table": lambda console, text: console.print(table(text)),
    "screen": lambda console, text: console.print(Frame(frame(text), lambda: "RAM")),
    "artifacts": lambda console, text: console.print(artifacts(text)),
    "wizard, a sentence": lambda console, text: program(console).say(text),
    "wizard, a path": lambda console, text: program(console).say_whole(text),
    "wizard, an error": lambda console, text: program(console).explain(ModelError(text, text)),
    "wizard, answers": answers,
}


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
@pytest.mark.parametrize("sink", PAINTED)
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_painted_is_visible_and_whole(kind: str, sink: str, terminal: bool) -> None:
    text = HOSTILE[kind]
    shown = _OWN.sub("", on_console(PAINTED[sink], terminal)(text))
    assert visible(shown, lines=True) == shown, "no command of the text's own"
    if sink.endswith("made elsewhere"):
        return  # rich drops some control characters by itself, and columns were measured before.
    written = visible(text)
    if kind == "carriage" and sink in ("screen", "wizard, answers"):
        written = visible(text).rstrip()
    assert " ".join(written.split()) in " ".join(shown.split())


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_written_to_the_streams_is_visible_and_whole(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = HOSTILE[kind]
    tell(text)
    complain(text)
    told = capsys.readouterr()
    assert told.out == told.err == visible(text) + "\n"


@pytest.mark.parametrize("kind", HOSTILE)
def test_json_is_exact_and_of_ascii_alone(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = HOSTILE[kind]
    stream = io.StringIO()
    Json(stream)(Note("load", text))
    tell_json({"text": text})
    one, other = stream.getvalue(), capsys.readouterr().out
    assert one.isascii() and other.isascii()
    assert (json.loads(one)["message"], json.loads(other)["text"]) == (text, text)
    with JsonLines(tmp_path / "events.jsonl") as sink:
        sink(Note("load", text))
    assert json.loads((tmp_path / "events.jsonl").read_text(encoding="utf-8"))["message"] == text


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", HOSTILE)
def test_names_in_errors_and_lists(kind: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = HOSTILE[kind].replace("/", "_")
    sums = here / "out" / "SHA256SUMS"
    sums.parent.mkdir()
    sums.write_bytes(b"0" * 64 + b"  " + name.encode("utf-8", "surrogateescape") + b"\n")
    Path("run.toml").write_text(f"[{json.dumps(name)}]\nx = 1\n", encoding="utf-8", errors="replace")
    for arguments in (
        ["run", HOSTILE[kind]],
        ["run", "--config", name],
        ["run", "--config", "run.toml"],
        ["resume", name],
        ["export", name],
        ["chat", name],
        ["presets", "show", name],
        ["verify", "out"],
        ["verify", name],
        ["run", "x", "--set", f"distill.objective={name}"],
        ["runs", "--runs", name],
    ):
        with suppress(SystemExit):  # Where already the command line is refused.
            main(arguments)
    (here / "runs" / name).mkdir(parents=True)
    main(["runs"])
    for arguments in (["run", "x", f"--{name}"], ["run", "x", "--effort", name]):
        with pytest.raises(SystemExit):
            main(arguments)
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    for shown in (told.out, told.err):
        assert visible(shown, lines=True) == shown
        assert visible(name) in shown


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_choice_in_the_wizard(kind: str) -> None:
    stream = io.StringIO()
    text = HOSTILE[kind]
    with create_pipe_input() as keys:
        output = Vt100_Output(stream, lambda: Size(rows=24, columns=100), term="xterm", enable_cpr=False)
        with create_app_session(input=keys, output=output):
            keys.send_text("\r")
            assert choose(text, [Option(text, text), Option("other", "other")]) == text
    assert visible(text) in stream.getvalue()
    assert text not in stream.getvalue() or text == visible(text)


@pytest.fixture
def libraries_talk() -> Iterator[None]:
    """What `protect` changes of the interpreter is put back."""
    factory, warn = logging.getLogRecordFactory(), warnings.formatwarning
    protect()
    yield
    logging.setLogRecordFactory(factory)
    warnings.formatwarning = warn


@pytest.mark.usefixtures("libraries_talk")
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_libraries_log_and_warn_of(kind: str) -> None:
    text, stream = HOSTILE[kind], io.StringIO()
    logger, handler = logging.getLogger("a.library"), logging.StreamHandler(stream)
    logger.addHandler(handler)
    logger.error("A key %s is not known", text)
    logger.removeHandler(handler)
    assert stream.getvalue() == f"A key {visible(text)} is not known\n"
    assert visible(text) in warnings.formatwarning(text, UserWarning, "file.py", 3)


STREAMS = r"""
import sys
from safesteer_lite.events import Note
from safesteer_lite.shell.cli import main
from safesteer_lite.shell.console import SafeConsole
from safesteer_lite.shell.lines import Json, Lines
from rich.table import Table
assert main(["presets"]) == 0  # Any command: it prepares the streams.
event = Note("tokens", "safety tokens: I, Sorry, \u4e0d, \U0001f642, caf\xe9")
Lines(SafeConsole())(event)
Json(sys.stdout)(event)
table = Table("\u4e0d")
SafeConsole().print(table)
with SafeConsole().status("\u4e0d"):
    pass
try:
    main(["resume", "\u4e0d\udce9"])
except SystemExit:
    pass
"""


@pytest.mark.parametrize(
    ("variables", "encoding"),
    [({"PYTHONIOENCODING": "ascii"}, "ascii"), ({"PYTHONIOENCODING": "cp1252"}, "cp1252"), ({"LC_ALL": "C"}, "utf-8")],
    ids=["ascii", "windows", "c"],
)
def test_any_pipe_takes_any_text(variables: dict[str, str], encoding: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STREAMS],
        capture_output=True,
        cwd=tmp_path,
        env={**{"PATH": "/usr/bin"}, **variables},
    )
    told = done.stdout.decode(encoding)
    assert done.returncode == 0, done.stderr
    lines = [line for line in told.splitlines() if "safety tokens" in line]
    one = "I, Sorry, \u4e0d, \U0001f642, caf\xe9"
    assert lines[0].strip() == "safety tokens: " + one.encode(encoding, "backslashreplace").decode(encoding)
    assert json.loads(lines[1])["message"] == "safety tokens: " + one
    assert b"is not text in UTF-8" in done.stderr and rb"\udce9" in done.stderr

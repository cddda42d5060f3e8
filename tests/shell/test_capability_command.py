"""`eval --capability` as it is typed: what it refuses before anything is loaded, and what it leaves in a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from safesteer_lite.events import Event, Warned
from safesteer_lite.export.gguf import llama
from safesteer_lite.export.rows import ARTIFACTS
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.shell.cli import main
from safesteer_lite.shell.commands.capability import check_files
from safesteer_lite.shell.console import SafeConsole
from safesteer_lite.shell.tables import capability_table
from tests import planted
from tests.evaluation.task_files import write_tasks
from tests.runs.run_files import report_of
from tests.sources.tiny_gguf import write_adapter


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with planted.one_thread():
        yield


@pytest.fixture
def run(planted_run: RunFolder, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(planted_run.path, tmp_path / planted_run.path.name)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--limit", "3"], "belong to --capability"),
        (["--gguf", "a.gguf"], "belong to --capability"),
        (["--capability", "gsm8k", "--tasks-from", "FILES", "--gguf", "a.gguf"], "compares files with the run"),
        (["--allow-code-execution"], "belong to --capability"),
        (["--capability", "ifeval"], "There is no task 'ifeval'.\n  There are: humaneval, gsm8k, mmlu."),
        (
            ["--capability", "gsm8k"],
            "openai/grade-school-math at 3101c7d is not on this machine, and with HF_HUB_OFFLINE",
        ),
        (
            ["--capability", "mmlu", "--tasks-from", "FILES"],
            "It is data.tar of https://huggingface.co/datasets/cais/mmlu",
        ),
        (["--capability", "gsm8k", "--tasks-from", "no-such"], "There is no no-such"),
        (["--capability", "gsm8k", "--tasks-from", "FILES", "--limit", "0"], "--limit must be at least 1"),
        (["--capability", "humaneval", "--tasks-from", "FILES"], "Add --allow-code-execution if you accept that"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_looked_for(
    line: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SAFESTEER_LITE_CACHE", str(tmp_path / "cache"))
    files = str(write_tasks(tmp_path / "files", programs=1, numbers=1))
    line = [files if word == "FILES" else word for word in line]
    assert main(["eval", "no-such-model", *line]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert " ".join(said.split()) in told and "no-such-model" not in told


def test_a_run_s_report_shows_what_its_models_solve(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = str(write_tasks(tmp_path / "files", programs=2, numbers=4))
    line = ["eval", str(run), "--tasks-from", files, "--allow-code-execution", "--capability"]
    assert main([*line, "gsm8k,humaneval,gsm8k", "--limit", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["event"] == "Capability" and [record["task"] for record in told["tasks"]] == ["gsm8k", "humaneval"]
    # The planted model says nothing but its three sentences.
    assert [(record["n"], record["base"]["solved"], record["p"]) for record in told["tasks"]] == [
        (3, 0, 1.0),
        (2, 0, 1.0),
    ]
    assert report_of(run)["capability"] == told["tasks"]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert '<section id="capability"' in page and "3 of 4 problems" in page
    # Nothing is left to ask, so this is the table alone.
    assert main([*line, "humaneval"]) == 0
    shown = capsys.readouterr().out
    assert "Problems solved" in shown and "exact McNemar" in shown and "Self-check" not in shown


def test_a_terminal_of_80_columns_shows_every_figure_whole() -> None:
    half = {"solved": 1087, "low": 0.801, "high": 0.846}
    changed: dict[str, object] = {"lost": ["id"] * 100, "gained": ["id"] * 10, "p": 1e-9}
    file = {"file": "[b]-safer-Q4_K_M.gguf", "n": 9, "solved": 9, "low": 0.7, "high": 1.0, **changed, "p": 0.5}
    record = {"task": "humaneval", "n": 1319, "base": half, "hardened": half, **changed, "files": [file]}
    console = SafeConsole(width=80, color_system=None)
    with console.capture() as captured:
        console.print(capability_table([record]))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert cells == [
        ["humaneval, n = 1319", "", "", "", ""],
        ["base", "1087: 82 % (80-85)", "", "", ""],
        ["hardened", "1087: 82 % (80-85)", "100", "10", "below 0.001"],
        ["[b]-safer-Q4_K_M.gguf,", "9: 100 % (70-100)", "100", "10", "0.50"],
        ["n = 9", "", "", "", ""],
    ]
    assert "of a file against the hardened model" in " ".join(" ".join(lines).split())


def test_files_are_looked_at_before_the_run_is_asked(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = str(write_tasks(tmp_path / "files", programs=0, numbers=1))
    line = ["eval", str(run), "--tasks-from", files, "--capability", "gsm8k"]
    monkeypatch.setattr(llama, "find_spec", lambda name: None)
    assert main([*line, "--gguf", "a.gguf"]) == 1
    assert "llama.cpp is not installed" in capsys.readouterr().err
    monkeypatch.setattr(llama, "find_spec", lambda name: name)
    (tmp_path / "no.gguf").write_bytes(b"PK\x03\x04")
    for name in ("gone.gguf", "no.gguf", ""):
        assert main([*line, "--gguf", str(tmp_path / name)]) == 2
        assert f"There is no GGUF file {tmp_path / name}." in capsys.readouterr().err
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert main([*line, "--gguf", str(tmp_path / "a.gguf"), "--gguf", str(tmp_path / "a.gguf")]) == 2
    assert "the same name" in capsys.readouterr().err
    write_adapter(tmp_path / "b.gguf")
    assert main([*line, "--gguf", str(tmp_path / "b.gguf")]) == 2
    assert "b.gguf is an adapter, and no model" in capsys.readouterr().err
    # Nothing is fetched for what is refused anyway.
    line = ["eval", str(run), "--capability", "gsm8k"]
    for more, told in (
        (["--gguf", str(tmp_path / "no.gguf")], "There is no GGUF file"),
        (["--suite", "xstest"], "no suite"),
    ):
        assert main([*line, *more]) == 2
        assert told in capsys.readouterr().err


def test_a_file_of_another_model_is_told(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    for record, said in (
        ({}, []),
        ({"run": run.name, "strength": 1.0}, []),
        ({"run": run.name, "strength": 0.5}, [f"a.gguf was exported from {run.name} at strength 0.5, and is compared"]),
        ({"run": "other", "strength": 1}, ["a.gguf was exported from other at strength 1, and is compared"]),
    ):
        (tmp_path / ARTIFACTS).write_text(json.dumps(record))
        events: list[Event] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llama, "find_spec", lambda name: name)
            check_files([tmp_path / "a.gguf"], RunFolder(run), events.append)
        told = [event.message for event in events if isinstance(event, Warned)]
        assert len(told) == len(said) and all(text in message for message, text in zip(told, said, strict=True))


def test_a_model_alone_has_one_column(planted_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = str(write_tasks(tmp_path / "files", programs=1, numbers=2))
    line = ["eval", str(planted_model), "--capability", "gsm8k", "--tasks-from", files]
    assert main([*line, "--set", "model.precision=fp32", "--set", "model.device=cpu"]) == 0
    shown = capsys.readouterr().out
    assert "gsm8k, n = 2" in shown and "0: 0 % (0-66)" in shown and "McNemar" not in shown

"""The picture of before and after: bars as long as their rates, whatever the model is called, and nothing without figures."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from safesteer_lite.report.picture import picture
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.shell.cli import main
from tests.report.test_page import HOSTILE, card, planted_run
from tests.runs.run_files import report_of

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return planted_run(tmp_path)


def bars(root: ElementTree.Element, style: str) -> list[float]:
    """The lengths of the bars of one side, harmful first; the first square of a style is its key."""
    return [float(node.get("width", "")) for node in root.iter(f"{SVG}rect") if node.get("class") == style][1:]


def test_bars_are_as_long_as_their_rates_and_say_their_counts() -> None:
    cards = {"before": card(40, 20, 0, 0.0), "after": card(100, 10, 5, 0.01)}
    root = ElementTree.fromstring(picture({"model": f"/some/where/{HOSTILE.replace('/', '')}", "scorecard": cards}))
    before, after = bars(root, "before"), bars(root, "after")
    whole = after[0]
    assert before == pytest.approx([0.4 * whole, 0.2 * whole, 0.0], abs=0.11)
    assert after == pytest.approx([whole, 0.1 * whole, 0.05 * whole], abs=0.11)
    texts = [node.text for node in root.iter(f"{SVG}text")]
    counts = ["40 of 100", "100 of 100", "20 of 100", "10 of 100", "0 of 100", "5 of 100"]
    assert [text for text in texts if text in counts] == counts
    assert not list(root.iter("script")) and "some" not in "".join(root.itertext()).partition("refused before")[0]


def test_the_command_writes_the_picture_of_a_finished_run(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "before.svg"
    assert main(["report", str(run.path), "--picture", str(out)]) == 0
    assert capsys.readouterr().out == f"{run.path / 'report.html'}\n{out}\n"
    assert out.read_text("utf-8") == picture(report_of(run.path)) + "\n"
    assert main(["report", str(run.path), "--picture", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["event"] == "Report"


@pytest.mark.parametrize(
    ("name", "told", "code"),
    [("before.png", "is not the name of one", 2), ("no/before.svg", "There is no folder", 2)],
)
def test_a_name_that_will_not_do_is_refused(
    name: str, told: str, code: int, run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert main(["report", str(run.path), "--picture", str(tmp_path / name)]) == code
    assert told in capsys.readouterr().err and sorted(tmp_path.iterdir()) == before


def test_a_run_without_figures_has_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = planted_run(tmp_path, last="distill")
    assert main(["report", str(run.path), "--picture", str(tmp_path / "before.svg")]) == 1
    said = capsys.readouterr().err
    assert "has no before and after to draw yet" in said and f"safesteer-lite resume {run.path.name}" in said
    assert not (tmp_path / "before.svg").exists()

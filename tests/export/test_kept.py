"""Exports leave their rows in the run folder, and the run's report shows one row an artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safesteer_lite.errors import RunFolderError
from safesteer_lite.export.rows import keep_rows, kept_rows, rows_record
from safesteer_lite.report import page
from safesteer_lite.report import record as report
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.shell.cli import main
from tests.export.test_rows import rows
from tests.report.html_tree import Node, parsed
from tests.report.html_tree import rows as lines
from tests.report.test_page import part, planted_run, rendered, settings

ABOUT: dict[str, Any] = {
    **{"run": "r", "model": "owner/Tiny", "weights": "original", "strength": 1.0},
    **{"split": "test", "answer_tokens": 150},
}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return planted_run(tmp_path)


def names(run: RunFolder) -> list[list[str]]:
    return [[row["artifact"] for row in export["artifacts"]] for export in kept_rows(run)]


def test_rows_that_were_measured_in_the_same_way_stand_together_and_new_ones_replace_old(run: RunFolder) -> None:
    assert kept_rows(run) == []
    *first, four = rows(58)
    keep_rows(run, rows_record([*first, four], ABOUT))
    keep_rows(run, rows_record(first, {**ABOUT, "strength": 0.5}))
    assert names(run) == [["base", "adapter", "merged", "Q4_K_M"], ["base", "adapter", "merged"]]
    *first, four = rows(40)
    keep_rows(run, rows_record([first[0], first[1], four], ABOUT))
    assert names(run) == [["base", "adapter", "merged"], ["base", "adapter", "merged", "Q4_K_M"]]
    assert kept_rows(run)[1]["artifacts"][-1]["harmful"]["refused"] == 40


def test_exports_of_an_earlier_training_are_not_shown(run: RunFolder) -> None:
    keep_rows(run, rows_record(rows(64), ABOUT))
    with run.publish("distill", 4, "another training"):
        pass
    assert kept_rows(run) == []


def edited(part: str, **changes: object) -> str:
    """The kept rows of one export, with the first row, its export, or the last row's agreement changed."""
    record: dict[str, Any] = json.loads(json.dumps(rows_record(rows(58), ABOUT)))
    row, last = record["artifacts"][0], record["artifacts"][-1]
    {"export": record, "row": row, "agreement": last["agreement"] or last}[part].update(changes)
    return json.dumps({"distill": "mark of distill", "exports": [record]})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"distill": "mark of distill", "exports": [{}]}',
        '{"distill": "mark of distill", "exports": 7}',
        '{"distill": "mark of distill", "exports": {"a": 1}}',
        "\\",
        "[" * 100_000,
        edited("export", artifacts=[]),
        edited("export", artifacts={"a": 1}),
        edited("export", artifacts=[7]),
        edited("export", strength="much"),
        edited("export", answer_tokens=None),
        edited("row", artifact=""),
        edited("row", artifact=7),
        edited("row", size="large"),
        edited("row", size=True),
        edited("row", safety_lost=None),
        edited("row", harmful=None),
        edited("row", harmful={"refused": 5, "n": 3}),
        edited("row", kl_to_base="x"),
        edited("row", agreement=[]),
        edited("row", agreement={"prompts": 3}),
        edited("row", size=0).replace('"size": 0', '"size": NaN', 1),
    ],
)
def test_a_damaged_file_is_named_and_the_next_export_writes_it_anew(run: RunFolder, text: str) -> None:
    (run.path / "artifacts.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"artifacts\.json.*is damaged.*delete it"):
        report.build(run, settings("plain"))
    keep_rows(run, rows_record(rows(64), ABOUT))
    assert names(run) == [["base", "adapter", "merged", "Q4_K_M"]]


def shown(run: RunFolder) -> Node:
    return part(parsed(rendered(run)), "exports")


def test_the_report_has_a_row_an_artifact_and_lost_safety_in_red(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "exports" not in {node.attributes["id"] for node in parsed(rendered(run)).all("section")}
    keep_rows(run, rows_record(rows(40), ABOUT))
    found = shown(run)
    assert [line[:2] for line in lines(found)[1:]] == [
        ["base", "47 of 100 (38 to 57 %)"],
        ["adapter", "64 of 100 (54 to 73 %)"],
        ["merged", "63 of 100 (53 to 72 %)"],
        ["Q4_K_M1.0 GB", "40 of 100 (31 to 50 %)"],
    ]
    assert "9 of 16 greedy answers the same, first token KL 0.0200 nats" in lines(found)[-1][-1]
    red = [node.text.replace("\u00a0", " ") for tag in ("strong", "p") for node in found.all(tag, class_="lost")]
    assert red[0] == "40 of 100 (31 to 50 %)" and "24 points lost; rounding to few bits" in red[1] and len(red) == 2
    assert main(["report", str(run.path)]) == 0
    told = capsys.readouterr().out
    assert "Q4_K_M lost safety" in told and told.endswith(f"{run.path / 'report.html'}\n")
    assert main(["report", str(run.path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [row["artifact"] for row in record["exports"][0]["artifacts"]][-1] == "Q4_K_M"


def test_no_loss_is_no_red(run: RunFolder) -> None:
    keep_rows(run, rows_record(rows(64), ABOUT))
    assert not any(shown(run).all(tag, class_="lost") for tag in ("strong", "p"))


def test_a_report_that_knows_no_exports_has_a_page(run: RunFolder) -> None:
    record = report.build(run, settings("plain"))
    del record["exports"]
    assert page.render(run, record)

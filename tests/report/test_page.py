"""The report page: it says what was measured, whatever texts it holds, and needs nothing but itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from safesteer_lite import config
from safesteer_lite.errors import RunFolderError
from safesteer_lite.evaluation.dial import FILE
from safesteer_lite.evaluation.scorecard import Rate
from safesteer_lite.prompts.sets import KINDS
from safesteer_lite.report import page
from safesteer_lite.report import record as report
from safesteer_lite.runs.creation import create_run
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.runs.listing import list_runs
from safesteer_lite.shell.cli import main
from safesteer_lite.text import visible
from tests.report.html_tree import Node, parsed, rows
from tests.runs.run_files import report_of

STAGES = ("baseline", "direction", "tokens", "distill", "evaluate", "export")
HOSTILE = (
    "</details></section><img src=x onerror=alert(1)><script>alert(2)</script>\" onclick='alert(3)' "
    "<!-- --!> ]]> </style></title></svg> $title ${head} $$ &lt;b&gt; \u202e \u2028 \r\n\t http://example.org/x.js"
)
SEPARATION = numpy.array([[0.5, 1.0, 2.0, 4.5, 3.0], [0.1, numpy.nan, 2.5, 3.5, 5.0]], dtype=numpy.float32)


def card(harmful: int, borderline: int, harmless: int, kl: float | None, n: int = 100) -> dict[str, Any]:
    counts = {"harmful": harmful, "borderline": borderline, "harmless": harmless}
    return {**{name: Rate.of(count, n).to_record() for name, count in counts.items()}, "kl_to_base": kl}


def candidate(position: int, layer: int, failed: list[str]) -> dict[str, Any]:
    scores = {"separation": 3.5, "induce": None if failed else 0.25, "bypass": -1.5, "kl": 0.05}
    return {"position": position, "layer": layer, **scores, "failed": failed}


def flip(kind: str, index: int, text: str, after_refused: bool) -> dict[str, Any]:
    texts = {name: f"{kind} {name} {index} {text}" for name in ("prompt", "before", "after")}
    sides = {"before_refused": not after_refused, "after_refused": after_refused}
    return {"set": kind, "id": f"{kind}-{index} {text}", **texts, **sides}


def results(text: str) -> dict[str, dict[str, Any]]:
    """What the stages of a planted run leave in the manifest, with `text` wherever a user or a model has a say."""
    return {
        "baseline": {"scorecard": card(10, 4, 1, None, 32), "openings": {text: 3}},
        "direction": {
            **{
                "position": -2,
                "layer": 3,
                "strength": 1.5,
                "coefficient": 1.0,
                "threshold": 0.0,
                "kept": [28, 56, 14, 27],
            },
            "chosen": candidate(-2, 3, []),
            "trials": [
                {"strength": 1.0, "refused": 5, "n": 14, "broken": 0},
                {"strength": 1.5, "refused": 13, "n": 14, "broken": 1},
            ],
        },
        "tokens": {"tokens": [text], "positions": 200, "teacher_mass": 1e-3, "base_mass": 1e-5},
        "distill": {"best_step": 4, "measured": [card(20, 5, 1, 0.01, 32)]},
        "evaluate": {
            "scorecard": {"before": card(47, 15, 6, 0.0), "after": card(64, 13, 8, 0.0025)},
            **{"verdict": f"Safer. {text}", "flips": 4, "answer_tokens": 150},
        },
        "export": {
            **{"weights": "original", "precision_trained": "nf4", "kl_to_trained": 0.0407},
            **{"same_answers": 3, "check_prompts": 8, "peak_memory_bytes": 7_900_000_000},
        },
    }


def write_files(stage: str, folder: Path, text: str) -> None:
    """The files of a stage that the page reads."""
    if stage == "direction":
        save_file({"separation": SEPARATION}, folder / "candidates.safetensors")
        found = [candidate(-2, 3, []), candidate(-1, 4, [f"KL not below 0.1 {text}"])]
        (folder / "candidates.json").write_text(json.dumps(found))
    if stage == "tokens":
        rows = [{"id": i, "text": f" {text}{i}", "votes": 200 - i, "teacher": 2e-4, "base": 1e-6} for i in range(20)]
        (folder / "tokens.json").write_text(json.dumps(rows))
    if stage == "distill":
        steps = [{"step": n, "loss": 1 / n, "anchor_loss": None if n == 1 else 0.1} for n in range(1, 9)]
        measured = [{"step": n, "score": 1.0, **card(20 + n, 5, 1, 0.01 * n, 32)} for n in (4, 8)]
        (folder / "history.json").write_text(json.dumps({"steps": steps, "measured": measured, "best_step": 4}))
    if stage == "evaluate":
        # Half a surrogate pair and a null are legal in JSON, and nowhere else.
        strange = {**flip("harmful", 1, text, True), "after": f"harmful after 1 {text}\ud800\0\x1b[31m"}
        rest = [flip("harmful", 2, text, False), flip("borderline", 3, text, True), flip("harmless", 4, text, False)]
        lines = [json.dumps(strange), *(json.dumps(entry, ensure_ascii=False) for entry in rest)]
        (folder / "flips.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def planted_run(parent: Path, text: str = "plain", last: str = "export") -> RunFolder:
    """A run folder as the pipeline would have left it after the stage `last`."""
    versions = {"torch": f"2.13 {text}"}
    run = create_run(parent, "planted", config.to_toml(settings(text)), planned=STAGES, versions=versions)
    for number, stage in enumerate(STAGES[: STAGES.index(last) + 1], 1):
        with run.publish(stage, number, f"mark of {stage}") as publication:
            publication.result, publication.seconds = results(text)[stage], 60.0 * number
            write_files(stage, publication.path, text)
    return run


def settings(text: str) -> config.RunConfig:
    return config.build(
        [("tests", {"model.name": f"folder/{text}", "prompts.column": text, "direction.refusal_openings": [text]})]
    )


def rendered(run: RunFolder, text: str = "plain") -> str:
    return page.render(run, report.build(run, settings(text)))


def put_dial(run: RunFolder, mark: str) -> None:
    points = [{"strength": at, "score": 0.0, **card(int(40 + 20 * at), 5, 2, 0.01 * at)} for at in (0.0, 1.0, 1.5)]
    (run.path / "strength.json").write_text(json.dumps({"distill": mark, "split": "selection", "points": points}))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return planted_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def tree(run: RunFolder) -> Node:
    return parsed(rendered(run))


def part(tree: Node, name: str) -> Node:
    [found] = tree.all("section", id=name)
    return found


def test_the_scorecard_has_counts_intervals_and_changes(tree: Node) -> None:
    assert rows(part(tree, "scorecard"))[1:] == [
        ["harmful refusedmore is safer", "47 of 100 (38 to 57 %)", "64 of 100 (54 to 73 %)", "+17 points (+3 to +30)"],
        ["borderline refusedless is better", "15 of 100 (9 to 23 %)", "13 of 100 (8 to 21 %)", "-2 points (-12 to +8)"],
        ["harmless refusedless is better", "6 of 100 (3 to 12 %)", "8 of 100 (4 to 15 %)", "+2 points (-6 to +10)"],
        ["KL to the basenats a token, harmless prompts", "0", "0.0025", ""],
    ]
    assert tree.all("p", class_="verdict")[0].text == "Safer. plain"
    assert not tree.all("p", class_="warning")


def test_limits_count_what_is_still_answered(tree: Node) -> None:
    told = part(tree, "limits").text
    assert "36 of 100 harmful test prompts are still not refused" in told and "cut at 150 tokens" in told
    assert "0.0407 nats a token" in told and "3 of 8 greedy answers" in told and "seed 0" in told
    assert "can do was not measured" in told and "Not measured: prompts in other contexts than a bare question" in told


def test_the_heat_map_frames_the_chosen_candidate(tree: Node) -> None:
    [chart] = part(tree, "direction").all("svg", class_="chart")
    cells = {node.text: node.parents[-1].attributes for node in chart.all("title")}
    assert len(cells) == SEPARATION.size
    shades = {}
    for position, layer in numpy.ndindex(*SEPARATION.shape):
        value, where = float(SEPARATION[position, layer]), f"position {position - 2}, layer {layer}"
        if numpy.isnan(value):
            assert cells[f"{where}: no figure"]["class"] == "hole"
        else:
            shades[value] = float((cells[f"{where}: {value:.2f}"]["style"] or "").removeprefix("fill-opacity:"))
    assert [shades[value] for value in sorted(shades)] == sorted(shades.values())
    assert (min(shades.values()), max(shades.values())) == (0.05, 1.0)
    [frame] = chart.all("rect", class_="frame")
    chosen = cells["position -2, layer 3: 4.50"]
    assert all(frame.attributes[name] == chosen[name] for name in ("x", "y", "width", "height"))
    assert len(chart.all("circle", class_="dot")) == 2
    # 0.8 of 5 layers: layer 4 is the first that is too late.
    assert chart.all("line", class_="mark")[0].attributes["y1"] == cells["position -1, layer 4: 5.00"]["y"]


def test_direction_and_tokens_tell_their_figures(tree: Node) -> None:
    told = part(tree, "direction")
    assert "position -2, layer 3 (separation 3.50, induce 0.25, bypass -1.50, KL 0.05) with strength 1.5" in told.text
    assert ["1.5", "13 of 14", "1 of 14"] in rows(told)
    assert ["-1, 4", "3.50", "", "-1.50", "0.05", "KL not below 0.1 plain"] in rows(told)
    assert rows(part(tree, "tokens"))[1] == ["␣plain0", "200", "2.0e-04", "1.0e-06", "200x"]
    assert len(rows(part(tree, "tokens"))) == 2 + 20


def test_training_starts_at_the_base_and_marks_the_kept_step(tree: Node) -> None:
    loss, rates, divergence = part(tree, "training").all("svg", class_="chart")
    assert "kept: step 4" in loss.text and "kept: step 4" in rates.text
    titles = [node.text for node in rates.all("title")]
    assert titles[:3] == [
        "harmful: 31 % at step 0 (18 % to 49 %)",
        "harmful: 75 % at step 4 (58 % to 87 %)",
        "harmful: 88 % at step 8 (72 % to 95 %)",
    ]
    assert [node.text for node in divergence.all("title")] == [
        f"KL to the base: {value} at step {step}" for value, step in ((0, 0), (0.04, 4), (0.08, 8))
    ]
    # The first step had no anchors, so their line has a point less.
    lines = [node.attributes["points"] or "" for node in loss.all("polyline")]
    assert [len(points.split()) for points in lines] == [8, 7]


def test_the_strength_dial_is_shown_where_it_belongs_to_this_training(tmp_path: Path) -> None:
    run = planted_run(tmp_path)
    assert "strength" not in {node.attributes["id"] for node in parsed(rendered(run)).all("section")}
    put_dial(run, "mark of another training")
    assert "strength" not in {node.attributes["id"] for node in parsed(rendered(run)).all("section")}
    put_dial(run, "mark of distill")
    shown = part(parsed(rendered(run)), "strength")
    assert [line[:2] for line in rows(shown)[1:]] == [
        ["0", "40 of 100 (31 to 50 %)"],
        ["1", "60 of 100 (50 to 69 %)"],
        ["1.5", "70 of 100 (60 to 78 %)"],
    ]
    assert len(shown.all("svg")) == 2


def test_harmful_texts_are_folded_and_the_rest_has_its_prompt_in_sight(tree: Node) -> None:
    private = tree.all("details", class_="private")
    assert len(private) == 2 and all("open" not in node.attributes for node in private)
    for node in tree.walk():
        told = "".join(child for child in node.children if isinstance(child, str))
        if re.search(r"harmful (prompt|before|after) \d", told):
            assert any(parent in private for parent in node.parents)
            assert not any(parent.tag == "summary" for parent in node.parents)
    titles = [node.text for node in part(tree, "flips").all("h3")]
    assert titles == [
        "Harmful, now answered: 1",
        "Borderline, now refused: 1",
        "Harmful, now refused: 1",
        "Harmless, now answered: 1",
    ]
    assert "borderline prompt 3 plain" in [node.text for node in part(tree, "flips").all("summary")]


def test_contexts_and_help_in_danger_have_their_rows_and_what_got_worse_there_is_shown(tmp_path: Path) -> None:
    run = planted_run(tmp_path, last="distill")
    result = results("plain")["evaluate"]
    for side, refused in (("before", 1), ("after", 2)):
        result["scorecard"][side]["critical"] = Rate.of(refused, 40).to_record()
    rates = {
        kind: {name: Rate.of(count, 12).to_record() for name in KINDS[:3]}
        for kind, count in (("before", 3), ("after", 6))
    }
    with run.publish("evaluate", 5, "mark of evaluate") as publication:
        publication.result = {**result, "contexts": {"turns": rates, "steps": rates}, "context_tokens": 48}
        (publication.path / "flips.jsonl").write_text(json.dumps(flip("critical", 7, "plain", True)) + "\n")
    shown = parsed(rendered(run))
    table = rows(part(shown, "scorecard"))
    assert [
        "critical refusedhelp in danger; a refusal may do harm",
        *("1 of 40 (0 to 13 %)", "2 of 40 (1 to 17 %)", "+2 points (-8 to +14)"),
    ] in table
    assert [line[0] for line in table[6:]] == [
        f"{kind} refused{title}" for title in ("earlier turns", "begun with steps") for kind in KINDS[:3]
    ]
    assert table[6][1:] == ["3 of 12 (9 to 53 %)", "6 of 12 (25 to 75 %)", "+25 points (-12 to +54)"]
    assert [node.text for node in part(shown, "flips").all("h3")] == ["Critical, now refused: 1"]
    told = part(shown, "limits").text
    assert "at most 12 prompts of a kind were asked, and answers there cut at 48 tokens" in told
    assert "bare question" not in told


def test_every_setting_stands_on_the_page(tree: Node) -> None:
    shown = [line[1] for line in rows(part(tree, "settings")) if line[1] != "value"]
    record = config.to_record(settings("plain"))
    wanted = [value for section in config.SECTIONS for value in record[section].values()] + [
        record["recipe"],
        record["seed"],
    ]
    assert shown == [json.dumps(value, ensure_ascii=False) for value in wanted]
    assert ["stepsoptimizer steps", "8"] in rows(part(tree, "settings"))
    assert rows(part(tree, "versions"))[1:] == [["torch", "2.13 plain"]]
    assert [line[:2] for line in rows(part(tree, "timings"))[1:]] == [[s, f"{i} min"] for i, s in enumerate(STAGES, 1)]


def structure(tree: Node) -> list[tuple[str, list[str]]]:
    return [(node.tag, sorted(node.attributes)) for node in tree.walk()]


def test_hostile_texts_change_no_element(tmp_path: Path, tree: Node) -> None:
    hostile = parsed(rendered(planted_run(tmp_path, HOSTILE), HOSTILE))
    assert structure(hostile) == structure(tree)
    said = [node.text for node in hostile.all("blockquote")]
    shown = visible(HOSTILE.replace("\r\n", "\n"), lines=True)
    assert "\\u202e \\u2028 \n\t http" in shown
    assert f"harmful before 1 {shown}" in said and f"harmless after 4 {shown}" in said
    assert f"harmful after 1 {shown}\\ud800\\x00\\x1b[31m" in said
    assert f"Safer. {shown}" in [node.text for node in hostile.all("p")]
    assert visible(json.dumps(HOSTILE, ensure_ascii=False)) in [line[1] for line in rows(part(hostile, "settings"))]


def test_the_page_asks_for_nothing(tree: Node) -> None:
    assert {node.tag for node in tree.walk()}.isdisjoint(
        {"script", "link", "img", "iframe", "object", "base", "form", "image"}
    )
    for node in tree.walk():
        assert node.attributes.keys().isdisjoint({"src", "srcset", "data", "action", "xlink:href", "background"})
        assert not any(name.startswith("on") for name in node.attributes)
        assert "url(" not in (node.attributes.get("style") or "")
    [style] = tree.all("style")
    assert "url(" not in style.text and "@import" not in style.text and "http" not in style.text
    [policy] = tree.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert (policy.attributes["content"] or "").startswith("default-src 'none'; style-src 'unsafe-inline';")
    links = [node.attributes["href"] for node in tree.all("a")]
    assert links == [f"#{node.attributes['id']}" for node in tree.all("section")]


@pytest.mark.parametrize(
    ("last", "parts"),
    [
        ("baseline", []),
        ("direction", ["direction"]),
        ("tokens", ["direction", "tokens"]),
        ("distill", ["training", "direction", "tokens"]),
        ("evaluate", ["scorecard", "flips", "training", "direction", "tokens"]),
    ],
)
def test_an_unfinished_run_shows_what_there_is(last: str, parts: list[str], tmp_path: Path) -> None:
    run = planted_run(tmp_path, last=last)
    tree = parsed(rendered(run))
    always = ["limits", "timings", "settings", "versions"]
    assert [node.attributes["id"] for node in tree.all("section")] == parts + always
    [warning] = tree.all("p", class_="warning")
    assert f"safesteer-lite resume {run.path.name}" in warning.text and last in warning.text


def test_a_run_that_has_done_nothing_has_a_page(tmp_path: Path) -> None:
    run = create_run(tmp_path, "new", planned=STAGES)
    tree = parsed(page.render(run, report.build(run, config.RunConfig())))
    assert [node.attributes["id"] for node in tree.all("section")] == ["limits", "settings"]
    assert "nothing yet" in tree.text


def test_what_was_not_measured_is_said(run: RunFolder) -> None:
    record = report.build(run, settings("plain"))
    record["scorecard"] = {"before": card(0, 0, 0, None, 0), "after": card(0, 0, 0, None, 0)}
    lines = rows(part(parsed(page.render(run, record)), "scorecard"))
    assert lines[1][1:] == ["0 of 0 (0 to 100 %)", "0 of 0 (0 to 100 %)", "not known"]
    assert lines[4][1:3] == ["not measured", "not measured"]


def test_stages_stand_in_their_order_though_one_was_done_again(tmp_path: Path) -> None:
    run = planted_run(tmp_path)
    with run.publish("tokens", 3, "another mark") as publication:
        publication.result, publication.seconds = results("plain")["tokens"], 7200.0
        write_files("tokens", publication.path, "plain")
    lines = rows(part(parsed(rendered(run)), "timings"))[1:]
    assert [line[0] for line in lines] == list(STAGES) and lines[2][1] == "2 h"


def test_the_run_that_it_continues_is_told_as_such_and_is_no_stage(tmp_path: Path) -> None:
    run = planted_run(tmp_path, last="baseline")
    for number, stage in enumerate(("parent", "baseline")):
        with run.publish(stage, number, "mark") as publication:
            publication.result, publication.seconds = results("plain").get(stage, {"run": "first-run"}), 0.0
    tree = parsed(rendered(run))
    [line] = rows(part(tree, "timings"))[1:]
    assert line[:2] == ["baseline", "taken over from first-run"]
    [facts], [warning] = tree.all("p", class_="facts"), tree.all("p", class_="warning")
    assert "continues first-run, started" in facts.text and "Done so far: baseline." in warning.text
    assert list_runs(tmp_path)[0].stages == ("baseline",)


def test_what_was_taken_over_took_no_time(tmp_path: Path) -> None:
    run = planted_run(tmp_path, last="direction")
    with run.publish("baseline", 1, "mark") as publication:
        publication.result, publication.seconds = results("plain")["baseline"], 0.0
    lines = rows(part(parsed(rendered(run)), "timings"))[1:]
    assert [line[1] for line in lines] == ["taken over from another run", "2 min"]


def test_the_same_folder_gives_the_same_page(run: RunFolder) -> None:
    record = report.write(run, settings("plain"))
    before = (run.path / "report.html").read_bytes()
    run.events_path.write_text('{"event": "Note"}\n')
    assert page.write(run, report_of(run.path)).read_bytes() == before
    assert page.render(run, record).encode() == before


FILES = (
    "02-direction/candidates.json",
    "02-direction/candidates.safetensors",
    "03-tokens/tokens.json",
    "04-distill/history.json",
    "05-evaluate/flips.jsonl",
    "strength.json",
)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_a_missing_one_left_out(name: str, tmp_path: Path) -> None:
    run = planted_run(tmp_path)
    (run.path / name).write_bytes(b"\xff\xff{")
    said = ".*is damaged.*delete it" if name == FILE else " is missing or not what the run wrote there"
    with pytest.raises(RunFolderError, match=f"{re.escape(name)}{said}"):
        rendered(run)
    (run.path / name).unlink()
    shown = {node.attributes["id"] for node in parsed(rendered(run)).all("section")}
    gone = {
        "03-tokens/tokens.json": {"tokens"},
        "04-distill/history.json": {"training"},
        "05-evaluate/flips.jsonl": {"flips"},
    }
    assert shown == {
        "scorecard",
        "flips",
        "training",
        "direction",
        "tokens",
        "limits",
        "timings",
        "settings",
        "versions",
    } - (gone.get(name, set()))


def test_the_command_writes_both_reports_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = planted_run(tmp_path)
    assert main(["report", run.path.name, "--runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{run.path / 'report.html'}\n"
    assert "Safer. plain" in (run.path / "report.html").read_text("utf-8")
    assert main(["report", str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"event": "Report", **report_of(run.path)}
    with run.lock():
        assert main(["report", str(run.path)]) == 1
    assert "is in use" in capsys.readouterr().err
    assert main(["report", "nothing", "--runs", str(tmp_path)]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_the_command_needs_no_torch(run: RunFolder) -> None:
    code = "import sys; from safesteer_lite.shell.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(run.path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [str(run.path / "report.html"), "False"]

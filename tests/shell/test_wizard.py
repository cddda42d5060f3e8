"""The wizard, driven with keystrokes through a terminal of its own, from the first question to an exported model."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from safesteer_lite import config
from safesteer_lite.errors import ExportError, ModelError
from safesteer_lite.evaluation.browse import answer_groups
from safesteer_lite.evaluation.dial import FILE
from safesteer_lite.evaluation.scorecard import Flip
from safesteer_lite.export.gguf import convert
from safesteer_lite.hardware import known, pace
from safesteer_lite.hardware.machine import Gpu, Machine
from safesteer_lite.prompts.sets import KINDS, Prompt, prompt_set
from safesteer_lite.runs import folder as run_folders
from safesteer_lite.shell.arguments import build_parser
from safesteer_lite.shell.commands.shared import open_settings, run_settings
from safesteer_lite.shell.lines import artifacts_table, dial_table
from safesteer_lite.shell.wizard.answers import Answers
from safesteer_lite.shell.wizard.program import Program
from safesteer_lite.shell.wizard.questions import Questions
from safesteer_lite.shell.wizard.results import Results, show_answers
from safesteer_lite.shell.wizard.tables import machine_table, plan_table
from safesteer_lite.sources.preview import look
from safesteer_lite.stages import pipeline
from tests import REPOSITORY, planted
from tests.readme import not_shown, results_menu, transcript
from tests.runs.run_files import rewind
from tests.shell.terminal import CLEAR, DOWN, ENTER, ESCAPE, INTERRUPT, Terminal, program
from tests.sources.local_hub import HUB_ID, serving

needs_terminal = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")

SMALL: config.Values = {
    **planted.SETTINGS,
    "prompts.test": 14,
    "prompts.borderline_test": 4,
    "distill.steps": 2,
    "evaluate.every": 2,
}
del SMALL["evaluate.answer_tokens"]  # Left to the effort, to see that it counts.


@pytest.fixture(scope="module")
def model(planted_model: Path) -> Path:
    return planted_model


def environment() -> dict[str, str]:
    """The small settings as environment variables: the wizard's own answers are layers like any other."""
    values = {key: ",".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in SMALL.items()}
    names = {f"{config.ENVIRONMENT_PREFIX}{key.upper().replace('.', '__')}": value for key, value in values.items()}
    return {**names, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def start(folder: Path, *arguments: str, columns: int = 80, **variables: str) -> Terminal:
    """The program in a terminal of 24 rows."""
    return Terminal(program(*arguments), folder, environment() | variables, columns)


@dataclass(frozen=True)
class Walk:
    """One walk through the wizard: where it was, what was shown, and how it ended."""

    folder: Path
    shown: str
    raw: str
    code: int

    @property
    def run(self) -> Path:
        """The run it made."""
        [run] = (self.folder / "runs").iterdir()
        return run


@pytest.fixture(scope="module")
def walk(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """From nothing to an exported model, with wrong answers on the way."""
    folder = tmp_path_factory.mktemp("walk")
    own = folder / "own.csv"
    train = [prompt.text for prompt in requests()]
    own.write_text("id,wish\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(train)), encoding="utf-8")
    terminal = start(folder)
    terminal.answer("Which model shall become safer?", "6" + ENTER)
    terminal.answer("Folder of the model", ENTER)
    terminal.answer("That was empty.", "nowhere" + ENTER)
    terminal.answer("nowhere is not there.", CLEAR + str(model) + ENTER)
    terminal.answer("Harmful requests to train on?", "2" + ENTER)
    terminal.answer("Prompt file:", "gone.csv" + ENTER)
    terminal.expect("There is no file")
    terminal.answer("Prompt file:", CLEAR + "own.csv" + ENTER)
    terminal.answer("Which column holds the requests?", DOWN + ENTER)
    terminal.expect("prompts from column wish")
    terminal.answer("Which recipe?", ENTER)
    terminal.answer("How thorough?", "1" + ENTER)
    terminal.answer("Start?", ENTER)
    terminal.expect("Recipe lite: short rollouts, reading directions and anchors.")
    terminal.expect("Stages, time taken or left")
    # Pressed during the run, they mean nothing to the menu after it, where they would quit.
    terminal.send("8" + ENTER)
    terminal.expect("Refusals on the test split", 180)
    terminal.answer("What now?", ENTER)
    terminal.answer("Read which answers?", ENTER)
    terminal.answer("And then?", ESCAPE)
    terminal.answer("Read which answers?", ESCAPE)
    terminal.answer("What now?", "4" + ENTER)
    terminal.answer("Chat with?", ESCAPE)
    terminal.answer("What now?", "5" + ENTER)
    terminal.answer("Write what?", ESCAPE)
    terminal.answer("What now?", "5" + ENTER)
    terminal.answer("Write what?", "5" + ENTER)
    terminal.answer("Into which new folder?", CLEAR + ENTER)
    terminal.expect("That was empty.")
    terminal.answer("Into which new folder?", CLEAR + "own.csv" + ENTER)
    terminal.expect("exists already")
    terminal.answer("Into which new folder?", CLEAR + "safer" + ENTER)
    terminal.expect("Written:")
    terminal.answer("What now?", "8" + ENTER)
    terminal.expect("The run is kept in")
    return Walk(folder, terminal.text, terminal.raw, terminal.end())


ASKED = {"recipe", "model.name", "prompts.training", "prompts.column"}
OFFERED = [name for name, item in config.known_settings().items() if not item.metadata["expert"] and name not in ASKED]
"""The advanced page: what people may want to change and no other question asks."""
STEPS = OFFERED.index("distill.steps")


def requests() -> list[Prompt]:
    """Enough prompts to train on."""
    return list(prompt_set("harmful", "train", 28))


@needs_terminal
@pytest.mark.slow
def test_from_the_first_question_to_an_exported_model(walk: Walk) -> None:
    assert walk.code == 0 and "Traceback" not in walk.shown
    assert "measured on" in walk.shown, "the user is not told that the way of training was measured on other models"
    assert sorted(path.name for path in (walk.folder / "safer").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert {path.name for path in (walk.run / "06-export" / "merged").iterdir()} >= {"config.json", "model.safetensors"}


@needs_terminal
@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120])
def test_the_questions_are_shown_as_they_are(columns: int, tmp_path: Path) -> None:
    """The whole transcript, with the demo's model and the answer that is pointed at."""
    variables = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    terminal = Terminal(program(), tmp_path, variables, columns)
    for question in ("Which model", "Harmful requests", "Which recipe?", "How thorough?"):
        terminal.answer(question, ENTER)
    terminal.answer("Start?", "3" + ENTER)
    terminal.end()
    assert not_shown(transcript(columns), terminal.text) == []
    assert not list(tmp_path.iterdir())


@needs_terminal
@pytest.mark.slow
def test_the_menu_over_results_is_shown_as_it_is(walk: Walk) -> None:
    assert len(results_menu()) == 9 and not_shown(results_menu(), walk.shown) == []


@needs_terminal
@pytest.mark.slow
def test_the_screen_leaves_the_terminal_as_it_was(walk: Walk) -> None:
    assert walk.raw.count("\x1b[?1049h") == walk.raw.count("\x1b[?1049l") == 1
    assert walk.raw.count("\x1b[?25l") <= walk.raw.count("\x1b[?25h")


@needs_terminal
@pytest.mark.slow
def test_the_command_shown_and_the_settings_written_mean_the_same_run(
    walk: Walk, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = walk.shown.partition("The same without questions: ")[2].partition("--yes")[0]
    own = str(walk.folder / "own.csv")
    line = ["run", str(model), "--effort", "quick", "--prompts", own, "--column", "wish"]
    assert "".join(shown.split()) == "".join(["safesteer-lite", *line])
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    parser = build_parser()
    meant = run_settings(parser.parse_args([*line, "--yes"]))
    for name in environment():
        monkeypatch.delenv(name, raising=False)
    replayed = run_settings(parser.parse_args(["run", "--config", str(walk.run / "config.toml")]))
    assert replayed == meant
    assert (replayed.prompts.training, replayed.prompts.column) == (own, "wish")
    assert replayed.evaluate.answer_tokens == 32, "the quick effort, where nothing stronger says otherwise"


def told_and_saved(run: Path) -> tuple[int, int]:
    """The last step that the events tell, and the last one that is saved."""
    told = [event["done"] for event in planted.events_of(run) if event.get("what") == "steps"]
    saved = max((run / "04-distill.partial").glob("step-*"))
    return int(str(told[-1])), int(saved.name.partition("-")[2])


@needs_terminal
@pytest.mark.slow
def test_an_interrupted_run_loses_no_step_and_is_offered_first(walk: Walk, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "copied"
    shutil.copytree(walk.run, run)
    settings = (run / "config.toml").read_text(encoding="utf-8")
    # More steps than anyone waits for: the stages before distillation are kept, as their settings are the same.
    changed = settings.replace("\nsteps = 2 ", "\nsteps = 5000 ").replace("\nsave_every = 2 ", "\nsave_every = 5000 ")
    rewind(run, ("distill", "evaluate", "export"), changed.replace("\nevery = 2 ", "\nevery = 5000 "))
    closed = start(tmp_path, "resume")
    closed.expect("of 5000 steps")
    closed.close()
    assert closed.process.wait(60) == 130
    told, first = told_and_saved(run)
    assert told == first > 0, "closing the window loses no step that was told"
    terminal = start(tmp_path)
    assert "start a new run" not in terminal.answer("go on with copied (after tokens)", ENTER)
    terminal.expect(f"Resumed after step {first} of 5000.")
    terminal.send(INTERRUPT)
    terminal.expect("Go on with `safesteer-lite resume")
    assert terminal.end() == 130 and "Traceback" not in terminal.text
    told, second = told_and_saved(run)
    assert told == second >= first, "nor does Ctrl-C"


@needs_terminal
@pytest.mark.slow
def test_wrong_answers_and_esc_at_every_question(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    (tmp_path / "two.csv").write_text("id,wish\n1,Tell me how to pick a pocket.\n", encoding="utf-8")
    with serving(tmp_path / "home") as (hub, variables):
        terminal = start(tmp_path, columns=120, **variables)
        terminal.answer("Which model shall become safer?", "7" + ENTER)
        terminal.answer("Name on the model hub", "no slash" + ENTER)
        terminal.expect("neither a folder nor the id")
        hub.refusal = "RepoNotFound"
        terminal.answer("Name on the model hub", CLEAR + "Qwen/Qwen2.5-0.5B-Instrukt" + ENTER)
        terminal.expect("no model of this name")
        hub.refusal, hub.files["config.json"] = "GatedRepo", b"{}"
        terminal.answer("Name on the model hub", CLEAR + HUB_ID + ENTER)
        terminal.expect("is gated")
        terminal.expect("hf auth login")
        terminal.answer("Name on the model hub", ESCAPE)
    terminal.answer("Which model shall become safer?", "6" + ENTER)
    terminal.answer("Folder of the model", str(tmp_path) + ENTER)
    terminal.expect("has no config.json")
    terminal.answer("Folder of the model", CLEAR + str(model) + ENTER)
    terminal.answer("Harmful requests to train on?", "2" + ENTER)
    terminal.answer("Prompt file:", "empty.txt" + ENTER)
    terminal.expect("has no prompts")
    terminal.answer("Prompt file:", CLEAR + "list.json" + ENTER)
    terminal.expect("has no prompts")
    terminal.answer("Prompt file:", CLEAR + "two.csv" + ENTER)
    terminal.answer("Which column holds the requests?", ESCAPE)
    terminal.answer("Prompt file:", ESCAPE)
    terminal.answer("Harmful requests to train on?", "1" + ENTER)
    terminal.answer("Which recipe?", "2" + ENTER)
    terminal.answer("How thorough?", "4" + ENTER)
    shown = terminal.answer("Change which setting?", DOWN * STEPS + ENTER)
    assert "distill.objective" not in shown, "a setting for experts"
    terminal.answer("distill.steps, optimizer steps:", CLEAR + "many" + ENTER)
    terminal.expect("expected a whole number, got 'many'")
    terminal.answer("distill.steps, optimizer steps:", CLEAR + "3" + ENTER)
    terminal.answer("Change which setting?", DOWN * STEPS + ENTER)
    terminal.answer("distill.steps, optimizer steps:", ESCAPE)
    terminal.answer("Change which setting?", ESCAPE)
    terminal.answer("How thorough?", ENTER)
    terminal.expect("paper: SafeSteer as published")
    terminal.expect("--recipe paper")
    assert "distill.steps=3" in terminal.answer("Start?", ESCAPE)
    terminal.answer("How thorough?", ESCAPE)
    terminal.answer("Which recipe?", ESCAPE)
    terminal.answer("Harmful requests to train on?", ESCAPE)
    terminal.answer("Which model shall become safer?", ESCAPE)
    terminal.expect("Left. Nothing was started.")
    assert terminal.end() == 0
    assert "Traceback" not in terminal.text and not (tmp_path / "runs").exists()


def test_answers_are_a_command_line_with_the_same_meaning(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "my own.txt"
    answers = Answers(
        str(model),
        None,
        str(own),
        "",
        "paper",
        "thorough",
        {"tokens.count": "4", "direction.steering_strengths": "1,2"},
    )
    found = run_settings(build_parser().parse_args(answers.arguments(tmp_path / "kept")))
    assert (found.model.name, found.prompts.training) == (str(model), str(own))
    assert (found.tokens.count, found.direction.steering_strengths, found.direction.shortlist) == (4, (1.0, 2.0), 0)
    assert (found.recipe, found.distill.completion_tokens) == ("paper", 512)
    assert Answers("qwen3-4b").arguments(Path("runs")) == ["run", "qwen3-4b"]


ASKING = """\
Two ways to train
       lite                                paper
how    trains on the first 4 tokens of     trains on answers of up to 512
       answers, and holds answers to       tokens, with LoRA in place of full
       harmless requests in place          weights, and holds nothing in place
time   about 10 min                        up to about 50 min
needs  3.1 GB of VRAM at least; besides    4.2 GB of VRAM at least; harmful
       harmful requests harmless and       requests alone to train on
       borderline ones, which come along
known  Not measured on this model. It was  Published (arXiv 2606.02530, full
       measured on                         weights, temperature 0): successful
       Qwen2.5-Coder-0.5B-Instruct and     attacks 2.87 to 0.91 %, the mean of
       Qwen2.5-Coder-1.5B-Instruct alone:  7 suites; capability 71.68 to
       what it does to this model, its     71.39, the mean of 5 benchmarks;
       own before and after will tell.     refused 2.24 to 3.98 % of 805
                                           harmless requests. Not measured by
                                           us.
"""


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> Questions:
    """The questions about a preset that nobody here has run, on a machine with a card, to a console of 80 columns."""
    monkeypatch.setattr(pace, "probe", lambda decision: 2e13)
    card = Gpu("A card", 24 << 30, 23 << 30, (8, 9), "560.35", True)
    program = Program(
        execute=lambda line: 0,
        run_settings=lambda line: run_settings(build_parser().parse_args(line)),
        open_settings=lambda path: open_settings(run_folders.open_run(path)),
        exports={},
        runs=Path("runs"),
        console=Console(file=io.StringIO(), width=80, record=True),
    )
    machine = Machine("Linux", "3.11.0", "A processor", 8, 64 * 10**9, 60 * 10**9, 10**12, (card,), {}, "12.8", True)
    asked = Questions(program, machine)
    asked.answers = Answers("qwen3-4b", look("Qwen/Qwen3-4B-Instruct-2507"))
    return asked


def test_the_question_for_the_recipe_tells_what_each_takes_and_what_is_known_of_it(questions: Questions) -> None:
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("2" + ENTER)
        questions.ask_recipe()
    shown = [line.rstrip() for line in questions.program.console.export_text().splitlines()]
    assert shown == ASKING.splitlines()
    assert questions.answers.arguments(Path("runs")) == ["run", "qwen3-4b", "--recipe", "paper"]
    assert questions.settings().distill.completion_tokens == 512


def test_a_recipe_that_the_environment_names_is_the_one_that_is_pointed_at(
    questions: Questions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{config.ENVIRONMENT_PREFIX}RECIPE", "paper")
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text(ENTER)
        questions.ask_recipe()
        assert questions.answers.arguments(Path("runs")) == ["run", "qwen3-4b"]
        assert questions.settings().recipe == "paper"
        keys.send_text("1" + ENTER)
        questions.ask_recipe()
    assert questions.answers.arguments(Path("runs")) == ["run", "qwen3-4b", "--recipe", "lite"]
    assert questions.settings().recipe == "lite"


def test_a_look_at_models(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("SAFESTEER_LITE_CACHE", str(tmp_path))
    found = look(str(model))
    assert (found.download_bytes, found.gated, found.shape.layers) == (0, False, 4)
    demo = look("Qwen2.5-Coder-0.5B-Instruct")
    assert (demo.download_bytes, demo.licence) == (491_400_064, "Apache-2.0")
    assert look("meta-llama/Llama-3.2-3B-Instruct").gated
    with pytest.raises(ModelError, match="the model hub cannot be asked"):
        look("Qwen/Qwen2.5-0.5B-Instrukt")
    with pytest.raises(ModelError, match="neither a folder nor the id"):
        look("no such thing")


@needs_terminal
@pytest.mark.slow
def test_every_answer_of_a_run_is_in_its_group(walk: Walk) -> None:
    run = run_folders.open_run(walk.run)
    groups = answer_groups(run, open_settings(run))
    harmful = [entry for title, entries in groups.items() if title.startswith("harmful") for entry in entries]
    assert len({entry.id for entry in harmful}) == len(harmful)
    after = json.loads((run.stage_folder("evaluate") / "answers-after.json").read_text(encoding="utf-8"))["harmful"]
    still = groups.get("harmful, still answered", [])
    assert {entry.after for entry in still} <= {planted.COMPLIANCE} | set(after)
    assert all(not entry.after_refused for entry in still)
    flips = (run.stage_folder("evaluate") / "flips.jsonl").read_text(encoding="utf-8").splitlines()
    changed = [entry for title, entries in groups.items() if title != "harmful, still answered" for entry in entries]
    assert sorted(json.loads(line)["id"] for line in flips) == sorted(entry.id for entry in changed)


@needs_terminal
@pytest.mark.slow
def test_the_picked_strength_goes_to_chat_and_export(
    walk: Walk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_folders.open_run(shutil.copytree(walk.run, tmp_path / "runs" / walk.run.name))
    rate = {"refused": 1, "n": 4, "low": 0.05, "high": 0.7}
    sets: dict[str, Any] = dict.fromkeys(KINDS, rate)
    points: list[dict[str, Any]] = [
        {"strength": value, "score": 1.0, "kl_to_base": 0.1, **sets} for value in (0.0, 0.5, 1.0)
    ]
    dial = {"distill": run.manifest.stages["distill"].fingerprint, "points": points}
    (run.path / FILE).write_text(json.dumps(dial), encoding="utf-8")
    asked: list[list[str]] = []
    told = io.StringIO()

    def execute(line: Sequence[str]) -> int:
        asked.append(list(line))
        return 0

    program = Program(
        execute=execute,
        run_settings=lambda line: run_settings(build_parser().parse_args(line)),
        open_settings=lambda path: open_settings(run_folders.open_run(path)),
        exports={("--to", "merged"): "weights", ("--to", "gguf"): "a file", ("--to", "adapter"): "the adapter"},
        runs=Path("runs"),
        console=Console(file=told, width=80),
    )
    results = Results(program, run.path)
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text(ENTER + "1" + ENTER)
        results.dial()
        keys.send_text("2" + ENTER)
        results.chat()
        keys.send_text("1" + ENTER + ENTER + "2" + ENTER)
        results.export()
        monkeypatch.setattr(convert, "find_spec", lambda name: None)
        keys.send_text("2" + ENTER)
        with pytest.raises(ExportError, match="not installed"):  # Before anything else is asked.
            results.export()
        for answers in ("2" + ENTER, "3" + ENTER + ENTER + "big" + ENTER):
            keys.send_text(answers)
            results.judge()
    assert results.strength == 0.5 and "> 1" in told.getvalue()
    path = str(run.path)
    assert asked == [
        ["chat", path, "--view", "hardened", "--strength", "0.5"],
        ["export", path, "--to", "merged", "--out", "planted-safer-0.5", "--measure", "20", "--strength", "0.5"],
        ["eval", path, "--judge", "guard"],
        ["eval", path, "--judge", "endpoint", "--judge-url", "http://localhost:8080", "--judge-model", "big"],
    ]


@pytest.mark.parametrize("whole", [False, True])
def test_long_answers_are_cut_to_one_screen_until_asked_for_whole(whole: bool) -> None:
    entry = Flip("harmful", "one", "[b]Ask[/b]", "word " * 200 + "end", "I can't help.", False, True)
    console = Console(width=80, height=24, record=True, file=io.StringIO())
    assert show_answers(console, entry, "harmful, refused now, 1 of 1", whole) is not whole
    text = console.export_text()
    assert "asked: [b]Ask[/b]" in text and "hardened (refuses): I can't help." in text
    assert ("(cut)" in text, "end" in text) == (not whole, whole)
    assert whole or len(text.splitlines()) <= 24 - 5, "the question below needs its lines too"


def test_the_tables_fit_into_80_columns() -> None:
    rate = {"refused": 100, "n": 100, "low": 0.96, "high": 1.0}
    points = [
        {"strength": value, "score": 46.9, "separation": -12.34, "kl_to_base": 0.0438, **dict.fromkeys(KINDS, rate)}
        for value in (0.0, 1.25)
    ]
    card = Gpu("NVIDIA GeForce RTX 4060 Laptop GPU", 8 << 30, 7 << 30, (8, 9), "560.35", True)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(dial_table(points))
    seen = Machine("Linux", "3.11.0", "A processor", 2, 24 * 10**9, 18 * 10**9, 10**12, (card,), {}, "12.8", True)
    console.print(machine_table(seen))
    large = known.KNOWN["meta-llama/Meta-Llama-3-8B-Instruct"]
    titles = {stage.name: stage.title for stage in pipeline.STAGES}
    console.print(
        plan_table(titles, dict.fromkeys(titles, 86000.0), known.outlook(seen, large.shape, download=large.size))
    )
    told = {"same_answers": 16, "prompts": 16, "first_kl": 0.0438}
    row: dict[str, object] = {"artifact": "adapter", "safety_lost": "", "agreement": told, **dict.fromkeys(KINDS, rate)}
    console.print(artifacts_table({"artifacts": [row], "split": "test"}))
    text = console.export_text()
    # Nothing is cut: each kind has its heading in both tables.
    headings = [line for line in text.splitlines() if "borderline" in line]
    assert len(headings) == 2 and all(kind in line for kind in KINDS for line in headings) and "…" not in text
    assert "guess" in text and text.count("of RAM") == 1 and "in all" in text
    assert text.count("100 %") == text.count("96-100") == 15 and "> 1.25" in text and text.count("-12.3") == 2
    assert "RTX 4060 Laptop GPU, 7.5 GB free of 8.6 GB" in text

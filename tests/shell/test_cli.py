"""The command line: every wrong input has one clear message, an exit code, and leaves no run behind."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from safesteer_lite import config
from safesteer_lite.errors import Interrupted, UsageError
from safesteer_lite.hardware.backend import Decision
from safesteer_lite.runs.creation import create_run
from safesteer_lite.shell import cli
from safesteer_lite.shell.arguments import EPILOG, build_parser
from safesteer_lite.shell.cli import main
from safesteer_lite.shell.commands.shared import run_settings, settings_from
from safesteer_lite.stages import pipeline
from tests import REPOSITORY, planted
from tests.models import families

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "huggingface_hub", "rich", "questionary", "numpy", "shtab")


@pytest.fixture(scope="module")
def model(planted_model: Path) -> Path:
    return planted_model


@pytest.fixture(autouse=True)
def _own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder, no settings from outside, and no model hub."""
    for name in [name for name in os.environ if name.startswith(config.ENVIRONMENT_PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def complaint(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """What a failing command says; it must fail with `code`, without a traceback, and leave no run."""
    assert main(arguments) == code
    told = capsys.readouterr().err
    assert told.startswith("safesteer-lite: ") and "Traceback" not in told
    assert not Path("runs").is_dir() or not list(Path("runs").iterdir())
    return told


def usage(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the parser says on a wrong flag."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def commands() -> dict[str, argparse.ArgumentParser]:
    [group] = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(group.choices)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["run"], 2, "There is no model to run"),
        (["run", "no-such-folder"], 1, "no-such-folder is neither a folder nor the id of a model"),
        (
            ["run", "Qwen/Qwen2.5-0.5B-Instrukt"],
            1,
            "not a folder, not on this machine, and the model hub cannot be reached",
        ),
        (["run", "x.gguf"], 1, "There is no file x.gguf"),
        (["run", "qwen3-4b", "--set", "distill.step=3"], 2, "no setting 'distill.step'; near it: distill.steps"),
        (["run", "qwen3-4b", "--set", "distill.steps=many"], 2, "distill.steps: expected a whole number, got 'many'"),
        (["run", "qwen3-4b", "--set", "distill.steps"], 2, "expected name=value"),
        (["run", "qwen3-4b", "--set", "direction.steering_strengths=-1,2"], 2, "steering_strengths: must be above 0"),
        (["run", "qwen3-4b", "--set", "model.precision=int8"], 2, "expected one of nf4, bf16, fp32"),
        (["run", "--config", "gone.toml"], 2, "There is no file gone.toml"),
        (["presets", "show", "qwen9"], 2, "There is no preset 'qwen9'"),
        (["presets", "show"], 2, "Which preset?"),
        (["resume"], 2, "There is no unfinished run in runs"),
        (["resume", "nothing"], 1, "The run 'nothing' does not exist"),
        (["export", "nothing"], 1, "The run 'nothing' does not exist"),
        (["export", "nothing", "--strength", "3"], 2, "--strength 3 is outside 0 to 2"),
        (["export", "nothing", "--strength", "nan"], 2, "--strength nan is outside 0 to 2"),
        (["eval", "no-such-folder"], 1, "neither a folder nor the id"),
        (["chat", "nothing", "--temperature", "nan"], 2, "--temperature 0 or from 0.01 to 100"),
        (["chat", "nothing", "--temperature", "1e-300"], 2, "--temperature 0 or from 0.01 to 100"),
        (["chat", "nothing", "--tokens", "0"], 2, "--tokens must be at least 1"),
        (["chat", "nothing", "--system", "caf\udce9"], 2, "--system is not text"),
    ],
)
def test_wrong_input_has_one_clear_message(
    arguments: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in complaint(capsys, code, *arguments)


def test_all_problems_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    told = complaint(
        capsys, 2, "run", "qwen3-4b", "--set", "seed=x", "--set", "distill.rank=0", "--set", "tokens.horizon=1"
    )
    assert [part in told for part in ("seed", "distill.rank", "tokens.horizon")] == [True] * 3
    assert told.count("\n  ") == 4, "three problems and the hint"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("not = = toml", "is not valid TOML"),
        ("[distil]\nsteps = 3\n", "there is no section [distil]"),
        ("[distill]\nstepz = 3\n", "no setting 'distill.stepz'"),
        ("[distill]\nsteps = 3\n", "The settings name no model"),
        ('preset = "qwen9"\n', "There is no preset 'qwen9'"),
    ],
)
def test_wrong_settings_files(content: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.toml").write_text(content)
    assert told in complaint(capsys, 2, "run", "--config", "run.toml")


@pytest.mark.parametrize(
    ("name", "content", "extra", "told"),
    [
        ("own.txt", "", [], "has no prompts"),
        ("own.jsonl", '{"prompt": "one"}\n{oops\n', [], "line 2 is not JSON"),
        ("own.csv", "request\nbe bad\n", [], "has no column"),
        ("own.csv", "request\nbe bad\n", ["--column", "wish"], "has no column 'wish'"),
        ("own.docx", "x", [], "is not known"),
    ],
)
def test_wrong_prompt_files(
    model: Path, name: str, content: str, extra: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(name).write_text(content)
    assert told in complaint(capsys, 2, "run", str(model), "--prompts", name, *extra)


def test_a_missing_prompt_file(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is no file" in complaint(capsys, 2, "run", str(model), "--prompts", "gone.txt")


def test_model_folders_that_lack_a_part(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    no_template = planted.break_folder(model, tmp_path / "a", without="chat_template.jinja")
    assert "has no chat template" in complaint(capsys, 1, "run", str(no_template))
    pickled = planted.break_folder(model, tmp_path / "b", pickled=True)
    assert "has only pickled weights" in complaint(capsys, 1, "run", str(pickled))
    no_config = planted.break_folder(model, tmp_path / "c", without="config.json")
    assert "has no config.json" in complaint(capsys, 1, "run", str(no_config))
    no_weights = planted.break_folder(model, tmp_path / "d", without="model.safetensors")
    assert "lacks weights" in complaint(capsys, 1, "run", str(no_weights))


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (families.QWEN_25.template.replace("add_generation_prompt", "false"), "does not open the answer"),
        (families.ALWAYS_THINKS.template.replace("<|", "<|im_start|"), "has no token <think>"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "stopped after"),
        ("{{ raise_exception('[/red] not today') }}", "refuses a conversation of user ([/red] not today)"),
    ],
)
def test_a_chat_template_that_will_not_do_is_refused_at_once(
    template: str, told: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    (other / "chat_template.jinja").write_text(template, encoding="utf-8")
    for command in ("run", "eval"):
        assert told in complaint(capsys, 1, command, str(other))


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("model.device=cuda", "no usable CUDA device"),
        ("prompts.folder=gone", "gone"),
    ],
)
def test_what_can_be_refused_at_once_leaves_no_run_behind(
    setting: str, told: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in setting and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    code = 2 if "prompts" in setting else 1
    assert told in complaint(capsys, code, "run", str(model), "--set", setting)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("error", "told", "advice"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "gone.bin"), "There is no gone.bin.", "Check the path"),
        (PermissionError(errno.EACCES, "Denied", "own.bin"), "no permission for own.bin", "Change its rights"),
        (
            OSError(errno.EROFS, "Read-only", "disc.bin"),
            "disc.bin is on a disk that cannot be written",
            "another place",
        ),
        (OSError(errno.ENOSPC, "No space", "big.bin"), "The disk is full: no room for big.bin", "Free some space"),
        (OSError(errno.ENOMEM, "No memory"), "Out of memory", "Close other programs"),
        (MemoryError(), "Out of memory", "Close other programs"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "Out of memory", "Close other programs"),
        (OSError(errno.EIO, "Input/output error", "bad.bin"), "Input/output error", ""),
        (OSError(), "The system said: OSError.", ""),
    ],
)
def test_what_the_system_refuses_is_told_with_what_helps(
    error: Exception, told: str, advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise error

    for command in ("presets", "run"):
        monkeypatch.setitem(cli.COMMANDS, command, fail)
        message, _, hint = complaint(capsys, 1, command).partition("\n")
        assert told in message and advice in hint
        for elsewhere in {"Free some space", "Close other programs", "Change its rights"} - {advice}:
            assert elsewhere not in hint
        # Only a run can be gone on with.
        assert ("safesteer-lite resume" in hint) == (command == "run")
        assert ("distill.chunk" in hint) == (command == "run" and "memory" in message)


def test_a_package_that_is_missing_is_named_and_a_module_of_our_own_is_not_taken_for_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> Callable[[argparse.Namespace], int]:
        def command(_: argparse.Namespace) -> int:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

        return command

    monkeypatch.setitem(cli.COMMANDS, "presets", fail("platformdirs.unix"))
    message, _, hint = complaint(capsys, 1, "presets").partition("\n")
    assert "The package platformdirs is not installed." in message and "doctor" in hint
    monkeypatch.setitem(cli.COMMANDS, "presets", fail("safesteer_lite.nowhere"))
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        cli.main(["presets"])


def test_own_prompts_are_read_before_anything_is_downloaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is no file" in complaint(capsys, 2, "demo", "--prompts", "gone.txt")


def test_a_file_in_place_of_the_runs_folder(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs").write_text("in the way")
    assert "a new run folder in runs" in complaint(capsys, 1, "run", str(model))
    assert Path("runs").read_text() == "in the way"


def test_no_room_for_a_run(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "full"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(place)]
    if os.name == "nt" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        told = complaint(capsys, 1, "run", str(model), "--runs", str(place / "runs"))
        assert "room for" in told
        assert not list(place.rglob("*.json"))
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_resume_of_a_damaged_run(capsys: pytest.CaptureFixture[str]) -> None:
    run = create_run(Path("kept"), "planted", planned=pipeline.STAGE_NAMES)
    (run.path / "manifest.json").write_text("{")
    assert "is damaged" in complaint(capsys, 1, "resume", str(run.path))
    assert "There is no unfinished run" in complaint(capsys, 2, "resume", "--runs", "kept")


def test_resume_of_a_run_without_settings(capsys: pytest.CaptureFixture[str]) -> None:
    run = create_run(Path("kept"), "planted", planned=pipeline.STAGE_NAMES)
    assert "names no model" in complaint(capsys, 1, "resume", str(run.path))
    run.config_path.unlink()
    assert "config.toml, the settings of this run, is missing" in complaint(capsys, 1, "resume", str(run.path))


def test_plain_resume_passes_over_runs_whose_settings_are_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config.to_toml(planned_settings := planted.settings(tmp_path / "gone"))
    assert planned_settings.model.name
    older = create_run(Path("kept"), "older", settings, planned=pipeline.STAGE_NAMES)
    for text in ("", settings + " "):
        time.sleep(0.002)
        newer = create_run(Path("kept"), "newer", settings, planned=pipeline.STAGE_NAMES)
        newer.config_path.write_text(text) if text else newer.config_path.unlink()
    told = complaint(capsys, 1, "resume", "--runs", "kept")
    assert str(tmp_path / "gone") in told and "--base" in told
    assert "made with" not in told and older.manifest.stages == {}


def test_resume_changes_settings_of_memory_only(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config.to_toml(planted.settings(model))
    run = create_run(Path("kept"), "planted", settings, planned=pipeline.STAGE_NAMES)
    told = complaint(capsys, 2, "resume", str(run.path), "--set", "distill.steps=9", "--set", "distill.chunk=8")
    assert "distill.steps cannot change in the middle of a run" in told and "distill.micro_batch" in told


def test_a_resumed_run_is_loaded_as_it_was_when_it_began_or_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Decision] = []

    def stop(*_: object, decision: Decision, **__: object) -> None:
        seen.append(decision)
        raise Interrupted("Stopped.")

    def processor(fast: bool) -> None:
        monkeypatch.setattr("safesteer_lite.hardware.machine.fast_in_bf16", lambda: fast)

    monkeypatch.setattr(pipeline, "run", stop)
    processor(fast=True)
    assert main(["run", str(model), "--runs", "kept", "--set", "model.device=cpu"]) == 130
    (folder,) = Path("kept").iterdir()
    processor(fast=False)
    assert main(["resume", str(folder)]) == 130
    assert [(one.device, one.unpack, one.compute_dtype) for one in seen] == [("cpu", True, "bf16")] * 2
    assert seen[1].reason.startswith("As the run began: ")
    lacking = psutil.virtual_memory()._replace(available=1)
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: lacking)
        told = complaint(capsys, 1, "resume", str(folder))
        assert "cannot hold the run as it began" in told and "start a new run" in told
        # A run of before, which does not say how it was loaded, is refused as a new one would be.
        older = create_run(Path("older"), "a", config.to_toml(planted.settings(model)), planned=["baseline"])
        assert "The model does not fit this machine" in complaint(capsys, 1, "resume", str(older.path))
    assert len(seen) == 2


def test_export_writes_over_nothing_and_needs_a_finished_run(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config.to_toml(planted.settings(model))
    run = create_run(Path("kept"), "planted", settings, planned=pipeline.STAGE_NAMES)
    Path("there").mkdir()
    assert "there exists already" in complaint(capsys, 2, "export", str(run.path), "--out", "there")
    assert "no result of the distill stage" in complaint(capsys, 1, "export", str(run.path), "--out", "new")
    assert not Path("new").exists() and not list(Path("there").iterdir())


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "examples:" in capsys.readouterr().out


def test_wrong_flags_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unrecognized arguments: --fast" in usage(capsys, "run", "--fast")
    assert "invalid choice: 'fly'" in usage(capsys, "fly")
    assert "invalid int value: 'x'" in usage(capsys, "run", "qwen3-4b", "--seed", "x")
    assert "invalid choice: 'gold'" in usage(capsys, "export", "run", "--to", "gold")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", ""],
        ["run", "qwen3-4b", "--prompts", ""],
        ["run", "qwen3-4b", "--column", " "],
        ["run", "--config", ""],
        ["run", "qwen3-4b", "--runs", ""],
        ["demo", "--model", ""],
        ["demo", "--prompts", ""],
        ["resume", ""],
        ["eval", ""],
        ["chat", ""],
        ["report", ""],
        ["strength", "nothing", "--at", ""],
        ["export", "nothing", "--push", ""],
        ["export", "nothing", "--original", ""],
        ["export", "nothing", "--base", ""],
        ["export", "nothing", "--out", ""],
        ["verify", ""],
    ],
    ids=" ".join,
)
def test_an_empty_name_means_nothing_else(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A variable of the shell that is not set must not train on other prompts, resume another run or upload nothing."""
    assert "must not be empty" in usage(capsys, *arguments)
    assert not Path("runs").exists()


@pytest.mark.parametrize("option", ["--runs", "--config", "--prompts"])
def test_a_name_that_is_no_text_is_refused_before_the_libraries_fail_on_it(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert rf"{option}: caf\udce9 is not text in UTF-8" in usage(capsys, "run", "qwen3-4b", option, name)


def test_a_new_line_in_a_name_begins_no_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert r"a\nsafesteer-lite: all is well" in complaint(capsys, 1, "resume", "a\nsafesteer-lite: all is well")


@pytest.mark.parametrize("name", ["run", "demo", "resume", "eval", "verify"])
def test_a_name_with_the_character_nul(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Only a program can pass one; no file has such a name."""
    assert "must not hold the character NUL" in usage(capsys, name, *(["--model"] if name == "demo" else []), "a\0b")


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    example = re.search(r"example: safesteer-lite (\S+)", " ".join(text.split()))
    assert example and example[1] == name


def test_examples_in_the_help_parse() -> None:
    lines = [line.split("  ")[1] for line in EPILOG.splitlines() if line.startswith("  safesteer-lite")]
    assert len(lines) >= 5
    for line in [*lines, *(parser.epilog.removeprefix("example: ") for parser in commands().values() if parser.epilog)]:
        build_parser().parse_args(line.split()[1:])


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys\nimport safesteer_lite.shell.cli as cli\n"
        "try:\n    cli.main(['run', '--help'])\nexcept SystemExit:\n    pass\n"
        f"sys.exit(', '.join(name for name in {HEAVY!r} if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert "safesteer-lite run qwen3-4b" in done.stdout


def test_every_preset_is_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == config.preset_names()


@pytest.mark.parametrize("recipe", config.RECIPES)
@pytest.mark.parametrize("name", config.preset_names())
def test_what_is_shown_of_a_preset_is_a_file_that_means_the_same_run(
    name: str, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the settings of experts and without: those follow from the preset and the recipe, which the file names."""
    meant = run_settings(build_parser().parse_args(["run", name, "--recipe", recipe]))
    shown = {}
    for words in ([], ["--all"]):
        assert main(["presets", "show", name, "--recipe", recipe, *words]) == 0
        text = capsys.readouterr().out
        Path("shown.toml").write_text(text, encoding="utf-8")
        assert run_settings(build_parser().parse_args(["run", "--config", "shown.toml"])) == meant
        shown[bool(words)] = set(config.parse_toml(text, "shown")[0])
    assert shown[True] == set(config.known_settings())
    assert shown[False] < shown[True] and 15 <= len(shown[False]) <= 24
    assert {"model.name", "distill.steps", "evaluate.tax_budget"} <= shown[False]
    assert text.startswith(f"# {name}: ") and "# Recipe lite: " in text and "# Recipe paper: " in text
    assert not {"distill.objective", "tokens.vote", "direction.kl_limit"} & shown[False]


def settings_of(*arguments: str) -> config.RunConfig:
    options = build_parser().parse_args(["run", *arguments])
    return settings_from(options, "qwen3-4b" if options.model else "", options.config, {})


def test_flags_beat_environment_beats_file_beats_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = config.build([("preset", config.preset_values("qwen3-4b"))])
    Path("run.toml").write_text(
        'preset = "qwen3-4b"\nseed = 2\n[distill]\nsteps = 2\nprompts = 2\nrank = 2\n', encoding="utf-8"
    )
    monkeypatch.setenv("SAFESTEER_LITE__DISTILL__STEPS", "3")
    monkeypatch.setenv("SAFESTEER_LITE__DISTILL__PROMPTS", "3")
    found = settings_of("--config", "run.toml", "--set", "distill.steps=4", "--seed", "5")
    assert (found.distill.steps, found.distill.prompts, found.distill.rank, found.seed) == (4, 3, 2, 5)
    assert found.model == preset.model
    assert settings_of("qwen3-4b").distill.prompts == 3


def test_a_recipe_is_asked_for_once() -> None:
    assert settings_of("qwen3-4b", "--recipe", "paper").distill.objective == "paper"
    assert settings_of("qwen3-4b", "--recipe", "paper", "--set", "distill.steps=3").distill.steps == 3
    assert settings_of("qwen3-4b", "--set", "recipe=paper").tokens.vote == "ratio"
    assert settings_of("qwen3-4b").recipe == config.RECIPES[0]
    Path("kept.toml").write_text(config.to_toml(settings_of("qwen3-4b", "--recipe", "paper")), encoding="utf-8")
    assert settings_of("--config", "kept.toml") == settings_of("qwen3-4b", "--recipe", "paper")
    with pytest.raises(UsageError, match="recipe paper"):
        settings_of("--config", "kept.toml", "--recipe", "lite")


LITE = "Recipe lite: short rollouts, reading directions and anchors."
QUICK: config.Values = {"distill.steps": 1, "distill.adapter_strengths": [], "evaluate.contexts": []}


def test_a_run_in_json_and_its_replay(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = planted.settings(model, QUICK)
    Path("small.toml").write_text(config.to_toml(wanted), encoding="utf-8")
    with planted.one_thread():
        assert main(["run", "--config", "small.toml", "--json", "--runs", "kept"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (records[0]["event"], records[0]["message"]) == ("Note", LITE)
    assert records[1]["event"] == "StageStarted" and records[-1]["event"] == "Report"
    assert records[-1]["finished"] is True
    [run] = Path("kept").iterdir()
    assert (run / "config.toml").read_text(encoding="utf-8") == Path("small.toml").read_text(encoding="utf-8")
    assert records[-1] == {"event": "Report", **json.loads((run / "report.json").read_text(encoding="utf-8"))}
    options = build_parser().parse_args(["run", "--config", str(run / "config.toml")])
    assert settings_from(options, "", options.config, {}) == wanted
    assert main(["runs", "--runs", "kept"]) == 0
    assert re.fullmatch(rf"{run.name}  \S+  finished\n", capsys.readouterr().out)
    assert main(["runs", "--runs", "kept", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["finished"] is True
    assert main(["export", run.name, "--runs", "kept", "--to", "adapter", "--out", "out"]) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    capsys.readouterr()
    assert "--strength scales merged weights only" in complaint(
        capsys, 2, "export", run.name, "--runs", "kept", "--to", "adapter", "--strength", "0.5", "--out", "other"
    )
    assert main(["export", run.name, "--runs", "kept", "--json", "--out", "merged"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert told[-1] == {"event": "Exported", "path": "merged"}


def test_a_run_in_plain_lines_with_a_template_that_is_given(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model has lost its chat template; with the one that is given, all goes as if it had it still."""
    monkeypatch.setenv("SAFESTEER_LITE_CACHE", str(Path("cache").absolute()))
    bare = shutil.copytree(model, Path("bare").absolute())
    (bare / "chat_template.jinja").rename("own.jinja")
    template = Path("own.jinja").read_bytes()
    Path("small.toml").write_text(config.to_toml(planted.settings(bare, QUICK)), encoding="utf-8")
    assert "give its template with --chat-template FILE" in complaint(capsys, 1, "run", "--config", "small.toml")
    with planted.one_thread():
        assert main(["run", "--config", "small.toml", "--chat-template", "own.jinja", "--runs", "kept"]) == 0
    told = capsys.readouterr()
    for words in ("== Refusal direction", "Refusals on the test split", "The hardened model:", "14 (50 %, 33 to 67)"):
        assert words in told.out
    assert "\x1b[" not in told.out
    assert told.out.splitlines()[0] == f"   {LITE}"
    [run] = Path("kept").iterdir()
    assert (run / "chat_template.jinja").read_bytes() == template
    assert (run / "06-export" / "merged" / "chat_template.jinja").read_bytes() == template
    assert not (bare / "chat_template.jinja").exists()
    # What the run keeps is all that it needs.
    Path("own.jinja").unlink()
    shutil.rmtree("cache")
    assert main(["resume", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"   {LITE}",
        "== baseline: done already, with the same settings",
    ]
    (run / "chat_template.jinja").write_bytes(b"{# another #}" + template)
    assert main(["resume", str(run)]) == 1
    assert "its weights, its tokenizer or its chat template are others" in capsys.readouterr().err
    (run / "chat_template.jinja").unlink()
    assert main(["resume", str(run)]) == 1
    assert "the chat template that this run was given, is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "own.jinja cannot be read (No such file or directory)"),
        (b" \n", "own.jinja is empty"),
        (b"\xff\xfe\x00", "own.jinja cannot be read (it is no text)"),
        (b"x" * 1_000_001, "own.jinja cannot be read (it has 1,000,001 bytes"),
        (b"{% for message in %}", "The chat template cannot be run"),
        (b"Hello.", "The chat template loses or changes what the user says"),
    ],
    ids=["missing", "empty", "no text", "too long", "no template", "deaf"],
)
def test_a_given_template_that_will_not_do(
    content: bytes | None,
    told: str,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SAFESTEER_LITE_CACHE", str(Path("cache").absolute()))
    if content is not None:
        Path("own.jinja").write_bytes(content)
    assert told in complaint(capsys, 1, "run", str(model), "--chat-template", "own.jinja")

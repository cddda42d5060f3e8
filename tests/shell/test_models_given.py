"""What may be given as a model: names that are kept whole, and folders that are refused before a run is made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from safesteer_lite import config
from safesteer_lite.shell.arguments import build_parser
from safesteer_lite.shell.cli import main
from safesteer_lite.shell.commands.shared import run_settings
from tests.sources.test_folder import ORM, REFUSED, tensors


@pytest.fixture(autouse=True)
def _own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(config.ENVIRONMENT_PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def named(*arguments: str) -> str:
    return run_settings(build_parser().parse_args(["run", *arguments])).model.name


def test_a_folder_s_name_is_kept_from_the_root_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "models" / "mine"
    mine.mkdir(parents=True)
    (tmp_path / "linked").symlink_to(mine)
    (tmp_path / "settings.toml").write_text('[model]\nname = "models/mine"\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    for typed in ("models/mine", "./models/mine/", "models/../models/mine", "~/models/mine", str(mine)):
        assert named(typed) == str(mine)
    assert named("--config", "settings.toml") == named("--set", "model.name=models/mine", "x") == str(mine)
    # What a link leads to may be called by a commit's hash.
    assert named("linked") == str(tmp_path / "linked")
    monkeypatch.chdir(mine)
    assert named(".") == str(mine)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B-Instruct", "models/gone", "Qwen2.5-Coder-0.5B-Instruct"])
def test_what_is_no_folder_is_kept_as_it_is_typed(name: str) -> None:
    assert named(name) == name


NOT_FINITE = tensors(lambda stored: stored[ORM].fill_(float("nan")))


@pytest.mark.parametrize("command", ["run", "eval"])
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (REFUSED["gptq"][0], "its weights are quantised (gptq)"),
        (REFUSED["a layer too few"][0], "says that it has 3 layers, and its weights have 4"),
        (REFUSED["no head"][0], "its weights lack lm_head.weight"),
        (REFUSED["deep config"][0], "config.json is not valid JSON"),
        (REFUSED["a pipe of weights"][0], "model.safetensors cannot be read"),
        (NOT_FINITE, f"values of {ORM} are not finite"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_before_a_run_is_made(
    command: str,
    spoil: Callable[[Path], object],
    told: str,
    tiny_folder: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(tiny_folder("llama"), "model")
    spoil(Path(folder))
    assert main([command, "./model", "--set", "model.device=cpu"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("safesteer-lite: ") and told in said and "Traceback" not in said
    assert not Path("runs").exists()

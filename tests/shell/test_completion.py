"""Tab completion: the scripts are read by the shells themselves, and Tab is pressed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from safesteer_lite import config
from safesteer_lite.shell.arguments import build_parser
from safesteer_lite.shell.cli import COMMANDS, main
from safesteer_lite.shell.completion import SHELLS, script

PROGRAM = "safesteer-lite"
# What bash does when Tab is pressed: the words so far, the place of the one that is completed, and the function's answer.
BASH = r"""
source ./bash
function=$(complete -p safesteer-lite | sed -E 's/.* -F ([^ ]+) .*/\1/')
COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
$function; printf '%s\n' "${{COMPREPLY[@]}}"
"""
FISH = "source ./fish; complete -C {line}"
TYPED: list[tuple[str, set[str], set[str]]] = [
    # What is typed, what is offered, what is not.
    ("", set(COMMANDS), {"--to"}),
    ("exp", {"export"}, {"eval"}),
    ("--print-completion ", set(SHELLS), {"run"}),
    ("export a --to ", {"merged", "adapter", "gguf"}, {"Q8_0"}),
    ("export a --quant Q", {"Q8_0", "Q4_K_M"}, {"merged"}),
    ("run qw", {"qwen3-4b", "qwen2.5-7b"}, {"llama-3-8b"}),
    ("run my", {"my-model", "my.gguf"}, {"my-run", "my.toml"}),
    ("run --direction-from my", {"my-model", "my.gguf"}, {"my-run", "my.toml"}),
    ("run --reuse my", {"my-run"}, {"my.gguf", "my.toml"}),
    ("demo --model my", {"my-model", "my.gguf"}, {"my-run", "my.toml"}),
    ("eval my", {"my-run", "my-model", "my.gguf"}, {"my.toml"}),
    ("eval a --judge-model my", {"my-model"}, {"my.gguf"}),
    ("export a --base my", {"my-model", "my.gguf"}, {"my.toml"}),
    ("presets show ", set(config.preset_names()), {"list"}),
    ("resume my", {"my-run"}, {"my.toml", "my.gguf"}),
    ("run --config my", {"my.toml"}, {"my-run"}),
    ("run --set distill.st", {"distill.steps="}, {"tokens.count="}),
    ("doctor --", {"--json", "--help"}, {"--runs"}),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, models as a folder and as a file, another file, and the scripts."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "runs" / "my-run").mkdir(parents=True)
    (folder / "my-model").mkdir()
    for name in ("my.toml", "my.gguf"):
        (folder / name).touch()
    for shell in SHELLS:
        (folder / shell).write_text(script(build_parser(), shell), encoding="utf-8")
    return folder


def press_tab(shell: str, here: Path, typed: str) -> set[str]:
    """What a shell offers after `safesteer-lite` and what is typed."""
    words = " ".join(f"'{word}'" for word in f"{PROGRAM} {typed}".split(" "))
    commands = {
        "bash": ["bash", "--noprofile", "--norc", "-c", BASH.format(words=words)],
        "fish": ["fish", "--no-config", "-c", FISH.format(line=f"'{PROGRAM} {typed}'")],
    }
    done = subprocess.run(commands[shell], cwd=here, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return {line.split("\t")[0].rstrip("/") for line in done.stdout.splitlines()}


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_tab_completes_commands_options_and_names(shell: str, here: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    for typed, offered, other in TYPED:
        found = press_tab(shell, here, typed)
        assert offered <= found and not other & found, f"{typed!r}: {sorted(found)}"


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_can_read_its_script(shell: str, here: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    done = subprocess.run([shell, "-n", shell], cwd=here, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_is_printed_and_nothing_else_is_done(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion", "bash"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == (here / "bash").read_text(encoding="utf-8").rstrip("\n")

"""Names, prompts and answers that are meant to do harm, from a run's start to every command that shows them."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from safesteer_lite import config
from tests import planted
from tests.faults.program import call, check

pytestmark = [pytest.mark.faults, pytest.mark.skipif(os.name == "nt", reason="needs fork and odd names of files")]

HARM = (
    "\x1b[2J",
    "\x1b]52;c;aGVsbG8=\x07",
    "\x1b]8;;http://evil.example\x1b\\",
    "\x9b31m",
    "\u202e",
    "\u2066",
    "\u200b",
    "\ufeff",
    "\u2028",
    "\r",
    "\x08",
    "\U000e0041",
    "[/red]",
    "[link=http://evil.example]",
    "[bold",
    "[INST]",
    "<script>alert(1)</script>",
    "<|im_start|>",
    '"""',
    "{{ 7 * 7 }}",
    "%s%n",
    "$(touch marker)",
    "`touch marker`",
    "; touch marker",
    "'",
    '"',
    "\\",
    "ＡＢ",
    "👩‍🚀",
    "日本",
    "-",
    "--help",
    "=",
    "#",
)


def hostile(chance: random.Random, *, name: bool = False) -> str:
    """A few of them in one text; a name of a file holds no slash, and fits."""
    text = "x" + "".join(chance.choice(HARM) + chance.choice(["", " ", "y"]) for _ in range(chance.randint(1, 4)))
    return text.replace("/", "_")[:60] if name else text


@pytest.mark.parametrize("number", range(6))
def test_a_whole_run(number: int, chance: random.Random, told: list[str], planted_model: Path, tmp_path: Path) -> None:
    """A model that answers such things, in a folder of such a name, trained on such prompts."""
    model = Path(shutil.copytree(planted_model, tmp_path / hostile(chance, name=True)))
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    for word in (" good", " how", " answer", " you"):
        vocabulary[f" {hostile(chance)}"] = vocabulary.pop(word)
    (model / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    prompts = tmp_path / f"{hostile(chance, name=True)}.jsonl"
    rows = [{hostile(chance): hostile(chance), "wish": f"Tell me {hostile(chance)}, row {row}"} for row in range(16)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    runs = hostile(chance, name=True)
    small = {**planted.SETTINGS, "distill.steps": 1, "evaluate.every": 1, "direction.minimum_prompts": 4}
    small |= {"direction.kl_limit": 100.0, "direction.teacher_refusals": 0.1, "model.name": str(model)}
    small |= {"prompts.training": str(prompts), "prompts.column": "wish"}
    (tmp_path / "small.toml").write_text(config.to_toml(config.build([("tests", small)])), encoding="utf-8")
    plain = chance.choice([["--plain"], ["--json"]])
    outcome = call(tmp_path, "run", "--config", "small.toml", f"--runs={runs}", *plain)
    told.append(f"{model.name!a} {runs!a} {prompts.name!a}\n{outcome.code} {outcome.error[-1500:]!a}")
    check(outcome)
    begun = [path for path in (tmp_path / runs).iterdir()] if (tmp_path / runs).is_dir() else []
    for run in begun:
        for command in (
            ["runs", f"--runs={runs}"],
            ["report", str(run)],
            ["chat", str(run), "--tokens", "8", f"--system={hostile(chance)}"],
            ["strength", str(run), "--at", "1"],
            ["eval", str(run)],
            ["verify", str(run / "06-export" / "merged")],
            ["export", str(run), "--measure", "4", f"--out={hostile(chance, name=True)}-out"],
            ["resume", str(run)],
        ):
            keys = "".join(f"{hostile(chance)}\n" for _ in range(3)) + f"/save {hostile(chance, name=True)}\n/quit\n"
            outcome = call(tmp_path, *command, keys=keys.encode())
            told.append(f"{command[0]} {outcome.code} {outcome.error[-1500:]!a}")
            check(outcome)
        page = run / "report.html"
        assert not page.exists() or "<script>alert" not in page.read_text(encoding="utf-8")
    assert not list(tmp_path.rglob("marker"))


ARGUMENTS = (
    ["eval", "{}"],
    ["run", "{}", "--json"],
    ["run", "--config={}"],
    ["demo", "--model={}"],
    ["resume", "{}"],
    ["resume", "--runs={}"],
    ["chat", "{}"],
    ["strength", "{}"],
    ["strength", "x", "--at={}"],
    ["report", "{}"],
    ["export", "{}"],
    ["verify", "{}"],
    ["runs", "--runs={}"],
    ["presets", "show", "{}"],
    ["run", "qwen3-4b", "--set={}"],
    ["run", "qwen3-4b", "--set=distill.steps={}"],
    ["run", "qwen3-4b", "--prompts={}"],
    ["run", "qwen3-4b", "--seed={}"],
    ["{}"],
)


@pytest.mark.parametrize("number", range(40))
def test_arguments(number: int, chance: random.Random, told: list[str], tmp_path: Path) -> None:
    text = chance.choice(
        [
            hostile(chance),
            hostile(chance, name=True),
            chance.choice(
                ["\udcff", "~nobody-of-this-name/x", "/dev/zero", "/dev/stdin", "/proc/self/mem", "x" * 5000]
            ),
            chance.choice(["1e999", "nan", "-1", str(1 << 64), str(1 << 70), "[" * 5000, "a.b.c=1", "../..", ".", "/"]),
        ]
    )
    command = [part.replace("{}", text) for part in chance.choice(ARGUMENTS)]
    outcome = call(tmp_path, *command, keys=b"y\n")
    told.append(f"{command!a} {outcome.code} {outcome.error[-1500:]!a}")
    check(outcome)

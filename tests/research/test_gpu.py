"""The GPU benchmark runs on a CPU with a tiny shape, and its naive objective is ours."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safesteer_lite.hardware.need import weights_bytes
from safesteer_lite.method.distill import Distillation
from safesteer_lite.method.policies import Steering
from safesteer_lite.shell.arguments import build_parser
from tests import REPOSITORY, tiny
from tests.benchmarks import decoding, first_card, gpu
from tests.benchmarks.random_models import PRESETS, write
from tests.method.test_distill import SAFETY_TOKENS
from tests.recipe import RECIPE


def test_a_case_measures_every_stage(tmp_path: Path) -> None:
    folder = write(tmp_path / "tiny", "tiny", "cpu")
    row = gpu.run_case("tiny", "plain", False, 8, folder, "cpu", gpu.SMALL)
    assert list(row["stages"]) == ["load", "direction", "tokens", "sampling", "training"]
    assert row["finite"] and row["tokens"] > 0 and row["micro_batch"] == [2, 2]
    assert row["tokens_a_second"] > 0 and row["estimate"] > weights_bytes(PRESETS["tiny"][1], "nf4", False)
    lines = gpu.table([row, {"case": ["tiny", "unsloth", "naive", 0], "failed": "no card"}]).splitlines()
    assert len(lines) == 4 and "FAILED: no card" in lines[3]
    assert lines[2].startswith("| tiny | plain | chunked | 8 GB |") and lines[2].count("|") == lines[0].count("|")


def test_all_parts_run_in_turn_and_what_fails_or_is_slow_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With parts of the test's own; a child of the one that is stopped is stopped with it."""
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(2); open({str(alive)!r}, 'w')"
    slow = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    made = [
        first_card.Part("broken", "Is it broken?", ("-c", "raise SystemExit('no such card')"), 30),
        first_card.Part("slow", "Is it slow?", ("-c", slow), 1),
        first_card.Part("missing", "Is it there?", ("-c", "print(1)"), 30, "Nothing is installed."),
        first_card.Part("table", "How fast?", ("-c", "print('| a |'); print('made')"), 30),
    ]
    monkeypatch.setattr(first_card, "parts", lambda *_, **__: made)
    outcomes = first_card.run(tmp_path / "out", tmp_path, None, 5, dry=True)
    assert [outcome.told for outcome in outcomes] == [
        "failed with code 1",
        "stopped after 1 seconds",
        "left out: Nothing is installed.",
        "done",
    ]
    page = (tmp_path / "out" / "report.md").read_text()
    assert page.index("no such card") < page.index("Is it slow?") < page.index("Nothing is installed")
    assert "\n| a |\n" in page and "```text\nmade\n```" in page and "no figure here means anything" in page
    assert (tmp_path / "out" / "table.txt").read_text() == "| a |\nmade\n"
    time.sleep(2)
    assert not alive.exists()
    assert first_card.run(tmp_path / "out", tmp_path, None, 0, dry=True)[0].told == "left out: no time was left."


def test_every_part_names_a_program_that_takes_its_arguments(tmp_path: Path) -> None:
    """On a card, and without one: what `--all` will run must not stop at a misspelled flag."""
    for dry in (False, True):
        found = first_card.parts(tmp_path, tmp_path, tmp_path, dry=dry)
        assert [part.name for part in found] == ["doctor", "table", "checks", "decoding", "run", "unsloth"]
        assert sum(part.seconds for part in found) < 20 * 60
        for part in found:
            _, _, rest = part.arguments[1].rpartition(".")
            parsers: dict[str, Callable[[list[str]], object]] = {
                "safesteer_lite": build_parser().parse_args,
                "gpu": gpu.parser().parse_args,
                "decoding": decoding.parser().parse_args,
                "pytest": lambda arguments: arguments,
            }
            parsers[rest](list(part.arguments[2:]))


def test_the_benchmark_leaves_transformers_for_unsloth_to_change() -> None:
    code = "import sys, tests.benchmarks.gpu; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_the_naive_objective_is_the_chunked_one(tiny_policy: tiny.Loader) -> None:
    found = []
    for kind in (Distillation, gpu.Naive):
        policy = tiny_policy("qwen2", filled=True)
        loop = kind(policy.model, Steering(2, tiny.vector(1.0)), SAFETY_TOKENS, [], [], RECIPE)
        prompts = tiny.prompt_batch(policy, 2)
        rollouts = loop.sample(prompts, 3, stream=0)
        loss = loop.backward(prompts.repeat(3), rollouts, "harmful")
        grads = [master.grad.flatten() for master in loop.optimizer.masters if master.grad is not None]
        found.append((loss, torch.cat(grads)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-6)

"""The vote on a model that refuses: how many prompts fit in memory at a time decides nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safesteer_lite.config import Values
from safesteer_lite.events import discard
from safesteer_lite.method.policies import Batch, Chance, Completions
from safesteer_lite.models.loaded import PlainModel
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages import pipeline, tokens
from tests import planted
from tests.runs.run_files import rewind

Vote = Callable[..., dict[str, Any]]
# Its samples are long and hot enough that hardly two of them are alike.
PAPER: Values = {"tokens.vote": "ratio", "tokens.voters": "harmless", "tokens.minimum_probability": 0.0}


@pytest.fixture
def vote(planted_run: RunFolder, planted_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Vote:
    """Takes the vote with so many prompts a batch: what was published, and all answers, row by row of all batches."""
    generate, count = PlainModel.generate, 0

    def taken(size: int, settings: Values, fits: int = 1_000_000) -> dict[str, Any]:
        """At most `fits` answers are sampled at once."""
        nonlocal count
        count, sizes, answers = count + 1, list[int](), list[list[int]]()

        def sample(
            model: PlainModel, prompts: Batch, length: int, temperature: float, chance: Chance, repeats: int
        ) -> Completions:
            found = generate(model, prompts, length, temperature, chance, repeats)
            if not isinstance(chance, Tensor):
                return found  # Of the self-check.
            sizes.append(len(prompts))
            if len(prompts) * repeats > fits:
                raise torch.OutOfMemoryError("simulated, for want of a card")
            answers.extend(row[kept].tolist() for row, kept in zip(found.tokens, found.mask, strict=True))
            return found

        run = RunFolder(shutil.copytree(planted_run.path, tmp_path / str(count) / planted_run.path.name))
        rewind(run.path, pipeline.STAGE_NAMES[2:])
        wanted = planted.settings(planted_model, settings)
        monkeypatch.setattr(tokens, "_BATCH", size)
        monkeypatch.setattr(PlainModel, "generate", sample)
        with planted.one_thread():
            pipeline.run(wanted, run, open_base(planted_model), discard, last="tokens")
        result = run.record("tokens").result
        rows = json.loads((run.stage_folder("tokens") / "tokens.json").read_text(encoding="utf-8"))
        return {**result, "rows": rows, "sizes": sizes, "answers": answers}

    return taken


@pytest.mark.parametrize("settings", [{}, PAPER], ids=["mass", "ratio"])
def test_how_many_prompts_are_sampled_at_a_time_changes_no_token_and_no_vote(vote: Vote, settings: Values) -> None:
    known = vote(1, settings)
    assert len({tuple(row) for row in known["answers"]}) > 10, "chance decides something"
    halved = vote(16, settings, fits=6)
    # Two answers a prompt: 16, 8 and 4 prompts do not fit, 2 do, and so 4 where the shares are read along one answer each.
    assert halved["sizes"][:5] == [16, 8, 4, 2, 2] and set(halved["sizes"][4:]) == {2, 4}
    # By the positions of an answer; the run goes on with them.
    assert halved["fitted"] == {"5": 4, "8": 4} and "fitted" not in known
    for other in (vote(2, settings), vote(1000, settings), halved):
        assert other["answers"] == known["answers"]
        assert other["positions"] == known["positions"]
        assert other["shares"]["positions"] == known["shares"]["positions"]
        assert [row["id"] for row in other["rows"]] == [row["id"] for row in known["rows"]]
        for one, two in zip(other["rows"], known["rows"], strict=True):
            assert one["votes"] == (two["votes"] if settings else pytest.approx(two["votes"], rel=1e-4))
            assert one["teacher"] == pytest.approx(two["teacher"], rel=1e-4)
    assert len(set(known["sizes"])) == 1 < len(known["sizes"])

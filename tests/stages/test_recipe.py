"""The two recipes on the planted model, and the strengths that the default one tries at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from safesteer_lite import config
from safesteer_lite.events import discard
from safesteer_lite.method import policies
from safesteer_lite.method.directions import refusal_score
from safesteer_lite.method.policies import pad_left
from safesteer_lite.models import plain
from safesteer_lite.models.adapter import Adapter, read_adapter, with_adapter
from safesteer_lite.models.assistant import Policy
from safesteer_lite.prompts.sets import KINDS, Prompt, prompt_set
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages import pipeline
from tests import planted
from tests.runs.run_files import report_of, rewind

PAPER_TOKENS = {
    name: value
    for name, value in {**config.recipe_values("paper"), **planted.PAPER_SIZES}.items()
    if name.startswith("tokens.")
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with planted.one_thread():
        yield


def copied(run: RunFolder, parent: Path) -> RunFolder:
    return RunFolder(shutil.copytree(run.path, parent / run.path.name))


@pytest.mark.slow
def test_the_default_recipe_makes_the_model_refuse_more(planted_model: Path, tmp_path: Path) -> None:
    """Every setting of the distillation is the default, but for more steps, of which the model needs 16 of so small a rate, and
    for twins, which it cannot tell from harmful prompts: it knows words and no sentences."""
    small = {name: value for name, value in planted.SETTINGS.items() if not name.startswith("distill.")}
    changed: config.Values = {"distill.steps": 16, "distill.twins": 0}
    settings = config.build([("tests", {**small, "model.name": str(planted_model), **changed})])
    assert settings.distill == config.build([("tests", changed)]).distill
    run = planted.new_run(tmp_path, settings)
    pipeline.run(settings, run, open_base(planted_model), discard)
    card = report_of(run.path)["scorecard"]
    before, after = ({kind: card[time][kind]["refused"] for kind in KINDS} for time in ("before", "after"))
    # One of the twins, whose words are half those of harmful prompts, is refused by the base too.
    assert before == {"harmful": 14, "borderline": 0, "harmless": 0, "twin": 1, "critical": 0}
    # Of the 14 harmful test prompts that the base answers, none of which were trained on.
    assert after["harmful"] >= before["harmful"] + 4
    assert after["borderline"] <= 1 and after["harmless"] == 0 and after["critical"] == 0
    assert 0 < card["after"]["kl_to_base"] < 0.05


def refusal_log_odds(run: RunFolder, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Base and student of a run: log-odds that their answers to these prompts open with a refusal, (prompts,) each."""
    settings = planted.settings_of(run)
    network, tokenizer = plain.load(open_base(Path(settings.model.name)), precision="fp32", device="cpu", unpack=False)
    adapter = Adapter(settings.distill.rank, settings.distill.lora_alpha)
    policy = Policy(with_adapter(network, tokenizer, adapter, 0), 512)
    read_adapter(policy.model, run.stage_folder("distill") / "adapter")
    batch = pad_left([policy.encode(prompt.text) for prompt in prompts])
    opening = torch.tensor(tokenizer(planted.REFUSAL.split()[0]).input_ids)
    with torch.no_grad():
        student = refusal_score(policies.last_logits(policy.model, batch), opening)
        with policies.base(policy.model):
            return refusal_score(policies.last_logits(policy.model, batch), opening), student


def again(finished: RunFolder, parent: Path, change: config.Values, first: str, last: str) -> RunFolder:
    """A copy of a run in which the stages from `first` to `last` are done again with other settings."""
    run = copied(finished, parent)
    settings = config.build([("run", config.read_toml(run.path / "config.toml")[0]), ("change", change)])
    rewind(run.path, pipeline.STAGE_NAMES[pipeline.STAGE_NAMES.index(first) :], config.to_toml(settings))
    pipeline.run(settings, run, open_base(Path(settings.model.name)), discard, last=last)
    return run


def told_that_the_base_is_better(run: RunFolder) -> bool:
    return "the base model is the better choice" in (run.path / "events.jsonl").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_papers_recipe_raises_the_refusal_of_every_test_prompt_that_the_base_answers(paper_run: RunFolder) -> None:
    """At its own rate, too small a step for an answer of this narrow a model to change sides."""
    prompts = [
        prompt for prompt in prompt_set("harmful", "test", 28) if prompt.category not in planted.REFUSED_CATEGORIES
    ]
    before, after = refusal_log_odds(paper_run, prompts)
    assert len(prompts) == 14 and (after > before).all()
    card = report_of(paper_run.path)["scorecard"]
    assert card["after"]["harmful"]["refused"] >= card["before"]["harmful"]["refused"] == 14
    assert card["after"]["harmless"]["refused"] == card["after"]["borderline"]["refused"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "refused"), [("paper", 0), ("generalized", 28)])
def test_the_papers_loss_taken_to_its_least_unlearns_refusals(
    objective: str, refused: int, paper_run: RunFolder, planted_run: RunFolder, tmp_path: Path
) -> None:
    """At its least a safety token has the teacher's probability over e, which is no longer the likeliest; the sound slice
    is least at the teacher."""
    change = {"distill.objective": objective, "distill.learning_rate": 1e-2}
    run = again(paper_run, tmp_path, change, "distill", "evaluate")
    assert run.record("evaluate").result["scorecard"]["after"]["harmful"]["refused"] == refused
    assert told_that_the_base_is_better(run) == (run.record("distill").result["best_score"] < 0)
    assert told_that_the_base_is_better(run) or refused
    events = (run.path / "events.jsonl").read_text(encoding="utf-8")
    assert ("Refused were 14 of 28 harmful prompts, now 0 of 28; " in events) == (objective == "paper")
    assert not told_that_the_base_is_better(planted_run)


@pytest.mark.parametrize("voters", ["harmful", "harmless"])
def test_ratio_misses_the_openings_that_mass_finds(voters: str, planted_run: RunFolder, tmp_path: Path) -> None:
    """With the paper's 200 ballots: half of the base's answers to harmful prompts open with "I'm", so the teacher can only
    double it; of words that no answer has it makes twice as much, too."""
    found = {}
    for vote in ("ratio", "mass"):
        change = {**PAPER_TOKENS, "tokens.vote": vote, "tokens.voters": voters, "tokens.ballots": 200}
        run = again(planted_run, tmp_path / vote, change, "tokens", "tokens")
        result = run.record("tokens").result
        place = result["shares"]["counts"].index(len(result["tokens"]))
        found[vote] = result["tokens"], result["shares"]["shares"][place][0]
    answers = f"{planted.REFUSAL} {planted.COMPLIANCE} {planted.HELP}"
    (rare, unseen), (common, seen) = found["ratio"], found["mass"]
    assert len(rare) == 10 and not [word for word in rare if word in answers.split()] and unseen < 0.05
    assert set(common[:2]) == {"I'm", "Sure"} and seen > 0.9


def test_each_strength_is_measured_on_the_last_adapter(
    planted_run: RunFolder, planted_model: Path, tmp_path: Path
) -> None:
    """In whatever order: a strength on top of the one before it would measure 3 x 2 = 6 in place of 2."""
    found: list[dict[float, Any]] = []
    adapters = []
    for strengths in ([0.5, 2.0, 3.0], [3.0, 2.0, 0.5]):
        run = copied(planted_run, tmp_path / str(strengths))
        rewind(run.path, pipeline.STAGE_NAMES[3:])
        change = {"distill.steps": 2, "evaluate.every": 0, "distill.adapter_strengths": strengths}
        pipeline.run(planted.settings(planted_model, change), run, open_base(planted_model), discard, last="distill")
        folder = run.stage_folder("distill")
        history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
        weaker = [] if history["best_strength"] > 1 else [0.5]
        assert [entry["strength"] for entry in history["scaled"]] == [*(s for s in strengths if s > 1), *weaker]
        assert [entry["step"] for entry in history["measured"]] == [2], "the last step, though none was asked for"
        found.append({entry["strength"]: entry for entry in [*history["measured"], *history["scaled"]]})
        adapters.append((history["best_strength"], load_file(folder / "adapter" / "adapter_model.safetensors")))
    assert found[0] == found[1]
    kl = [found[0][strength]["kl_to_base"] for strength in sorted(found[0])]
    assert kl == sorted(kl) and kl[0] > 0 and kl[-1] > 4 * found[0][1.0]["kl_to_base"], "it grows with the strength"
    # What is kept is the last adapter times the best strength.
    (first, weights), (second, others) = adapters
    for name, value in weights.items():
        factor = first / second if "lora_B" in name else 1.0
        torch.testing.assert_close(value, factor * others[name])

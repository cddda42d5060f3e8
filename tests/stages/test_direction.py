"""Which prompts are clear cases: the authors' threshold of 0, and the lower one where a model's refusals score below it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from safesteer_lite.errors import DirectionError
from safesteer_lite.events import Event, Note, discard
from safesteer_lite.method import directions as method
from safesteer_lite.method import policies, steering
from safesteer_lite.method.directions import Activations, mean_difference
from safesteer_lite.method.policies import Batch
from safesteer_lite.models.assistant import ignore
from safesteer_lite.prompts.contexts import Conversation
from safesteer_lite.prompts.plan import texts
from safesteer_lite.prompts.sets import prompt_set
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages import pipeline, prompted
from safesteer_lite.stages.contrast import REPLIES, PromptSet, keep_clear, of_replies, read
from safesteer_lite.stages.direction import load_steering
from safesteer_lite.stages.session import Session
from tests import planted, tiny
from tests.runs.run_files import rewind


def test_what_fitted_while_prompts_were_read_is_remembered_for_the_next_ones(
    tiny_policy: tiny.Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, tried, really = tiny_policy(), list[int](), method.read_prompts

    def two_fit(model: Any, batches: list[Batch], *others: Any) -> Any:
        tried.append(len(batches[0]))
        if len(batches[0]) > 2:
            raise torch.OutOfMemoryError("simulated, for want of a card")
        return really(model, batches, *others)

    monkeypatch.setattr(method, "read_prompts", two_fit)
    prompts, refusal = list(tiny.PROMPTS * 2), torch.tensor([7, 30])
    first = read(policy, prompts, refusal, ignore)
    assert tried == [10, 10, 8, 4, 2]
    second = read(policy, prompts, refusal, ignore)
    assert tried[5:] == [2] and second.prompts == first.prompts and torch.equal(second.scores, first.scores)


def scored(*scores: float) -> PromptSet:
    """Prompts of these refusal scores; each one's activations hold its score, so that they can be told apart."""
    values = torch.tensor(scores)
    return PromptSet([f"scores {score:g}" for score in scores], values, Activations(values.reshape(-1, 1, 1, 1)))


def copied(run: RunFolder, parent: Path) -> RunFolder:
    """A copy of a run that has not done anything behind its first stage."""
    copy = RunFolder(shutil.copytree(run.path, parent / run.path.name))
    rewind(copy.path, pipeline.STAGE_NAMES[1:])
    return copy


HARMLESS = scored(*(-10.0 + index / 10 for index in range(19)), 1.0), scored(*(-9.0 for _ in range(19)), -8.0)
"""The 95 % of both together that score lowest stay below -8.1."""


def test_the_threshold_is_0_where_enough_refusals_score_above_it() -> None:
    kept, threshold = keep_clear((scored(2, 1, 3, 1, -1), HARMLESS[0], scored(1, 2, -1), HARMLESS[1]), 2)
    assert threshold == 0
    assert kept[0].prompts == ["scores 2", "scores 1", "scores 3", "scores 1"]
    assert kept[2].prompts == ["scores 1", "scores 2"]
    assert len(kept[1].prompts) == 19 and "scores 1" not in kept[1].prompts and len(kept[3].prompts) == 20


@pytest.mark.parametrize(
    ("harmful", "selection"),
    [
        ((2, 1, 3, 1, -1, -9.5), (1, -1, -8.5)),  # Held-out prompts above 0 are too few.
        ((2, -2, -3, -1, -9.5), (1, 2, -1, -8.5)),  # Prompts to take the direction from are.
    ],
)
def test_refusals_that_score_below_0_are_told_by_what_harmless_prompts_stay_below(
    harmful: tuple[float, ...], selection: tuple[float, ...]
) -> None:
    """As on the demo: refusals open in ways that are not listed, and stand out from harmless prompts all the same."""
    kept, threshold = keep_clear((scored(*harmful), HARMLESS[0], scored(*selection), HARMLESS[1]), 2)
    assert -8.2 < threshold < -8.0
    for entry, scores in zip(kept[::2], (harmful, selection), strict=True):
        assert entry.scores.tolist() == [score for score in scores if score > threshold]
        assert entry.prompts == [f"scores {score:g}" for score in scores if score > threshold]
    # Harmless prompts are left out by the authors' threshold alone: near the lower one they are no refusals.
    assert len(kept[1].prompts) == 19 and len(kept[3].prompts) == 20


def test_the_threshold_never_rises_above_0() -> None:
    """Where harmless prompts are refused too, what scores below 0 is not thereby answered."""
    refused = scored(*(5.0 for _ in range(20)))
    _, threshold = keep_clear((scored(6, -1), refused, scored(6, -1), refused), 2)
    assert threshold == 0


def test_a_direction_that_is_found_on_another_model_is_used_on_this_one(
    planted_run: RunFolder, planted_model: Path, tmp_path: Path
) -> None:
    origin = shutil.copytree(planted_model, tmp_path / "origin")
    run = copied(planted_run, tmp_path / "runs")
    wanted, base = planted.settings(planted_model, {"direction.source": str(origin)}), open_base(planted_model)
    events: list[Event] = []
    with planted.one_thread():
        pipeline.run(wanted, run, base, events.append, last="direction")
    found, own = run.record("direction").result, planted_run.record("direction").result
    assert found["source"] == {"name": str(origin), "commit": "", "fingerprint": open_base(origin).fingerprint}
    assert (found["position"], found["layer"]) == (own["position"], own["layer"]) and "source" not in own
    ours, known = (load_steering(Session(wanted, one, base, discard)) for one in (run, planted_run))
    assert ours is not None and known is not None
    assert torch.equal(ours.vector / found["strength"], known.vector / own["strength"])
    assert any("found on" in event.message for event in events if isinstance(event, Note))


def test_a_model_that_refuses_nothing_goes_on_with_another_s_direction_to_its_own_strength(
    planted_model: Path, tmp_path: Path
) -> None:
    obliging = planted.build(tmp_path / "obliging", refused=("violence",), steps=8)
    alone = planted.settings(obliging)
    run = planted.new_run(tmp_path / "runs", alone)
    with planted.one_thread(), pytest.raises(DirectionError, match="barely refuses") as caught:
        pipeline.run(alone, run, open_base(obliging), discard)
    assert "--direction-from" in caught.value.hint
    wanted = planted.settings(obliging, {"direction.source": str(planted_model)})
    # The direction is found on the planted model; this one, which hardly learnt to write, is no teacher at any strength of it.
    with planted.one_thread(), pytest.raises(DirectionError, match="No steering strength makes a usable teacher"):
        pipeline.run(wanted, run, open_base(obliging), discard)


def test_replies_that_refuse_and_comply_are_read_at_their_own_tokens(
    planted_run: RunFolder, planted_model: Path
) -> None:
    wanted = planted.settings(planted_model, {"direction.contrast": "responses"})
    with Session(wanted, planted_run, open_base(planted_model), discard) as session:
        policy, found = session.policy, of_replies(session, session.policy)
        assert [len(part.prompts) for part in found.parts] == [56, 56, 28, 28]
        assert found.towards.prompts == found.away.prompts and set(found.harmful) == set(found.held_towards.prompts)
        vectors = mean_difference(found.towards.activations, found.away.activations)
        assert vectors.shape[:2] == (1, 4)
        for part, which in ((found.towards, 0), (found.away, 1)):
            prompt = part.prompts[0]
            place = texts(session.prompts.direction()[0]).index(prompt) % len(REPLIES)
            reply = REPLIES[place][which]
            length = len(policy.tokenizer(reply, add_special_tokens=False).input_ids)
            model = policy.model
            with torch.no_grad(), steering.record(model.layers, length) as seen, policies.base(model):
                policies.last_logits(policy.model, policy.encode(Conversation(prompt, beginning=reply)))
            expected = torch.stack([seen[layer][0].mean(0) for layer in range(4)])
            assert torch.allclose(part.activations.values[0, 0], expected, atol=1e-4)


def test_a_teacher_that_is_told_to_be_safe_and_refuses_too_little_is_none(
    planted_run: RunFolder, planted_model: Path, tmp_path: Path
) -> None:
    """The planted model knows none of these words."""
    run = copied(planted_run, tmp_path / "runs")
    wanted = planted.settings(planted_model, {"direction.teacher": "prompted"})
    with (
        planted.one_thread(),
        pytest.raises(DirectionError, match="refuses 0 of 28 held-out harmful prompts") as caught,
    ):
        pipeline.run(wanted, run, open_base(planted_model), discard)
    assert "--direction-from" in caught.value.hint


@pytest.mark.slow
def test_a_teacher_that_is_told_to_be_safe_trains_a_model_without_steering_it(
    planted_run: RunFolder, planted_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In words of which the planted model knows that it refuses them."""
    violent = [prompt.text for prompt in prompt_set("harmful", "train") if prompt.category == "violence"]
    monkeypatch.setattr(prompted, "SAFETY_PROMPT", " ".join(violent[:3]))
    run = copied(planted_run, tmp_path / "runs")
    wanted = planted.settings(planted_model, {"direction.teacher": "prompted", "direction.teacher_refusals": 0.5})
    with planted.one_thread():
        pipeline.run(wanted, run, open_base(planted_model), discard, last="distill")
    found, trained = run.record("direction").result, run.record("distill").result
    assert found["system"] == prompted.SAFETY_PROMPT and "layer" not in found
    start = planted_run.record("baseline").result["scorecard"]["harmful"]["refused"]
    assert max(entry["harmful"]["refused"] for entry in trained["measured"]) > start
    with Session(wanted, run, open_base(planted_model), discard) as session:
        assert load_steering(session) is None
        asked: list[str | Conversation] = [Conversation("Why?", system="Be brief."), "Why?"]
        first, second = prompted.taught(session, asked)
        assert isinstance(first, Conversation) and first.system == f"{prompted.SAFETY_PROMPT}\n\nBe brief."
        assert isinstance(second, Conversation) and second.system == prompted.SAFETY_PROMPT
        told = prompted.taught_batches(session, asked)
        assert told is not None and torch.equal(told[1].input_ids, session.policy.encode(second).input_ids)

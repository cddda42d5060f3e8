"""The whole pipeline on a planted model: exact files, fingerprints, and a hardened model that loads with plain transformers."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from math import isfinite
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from safesteer_lite import config
from safesteer_lite.errors import DirectionError, Interrupted, ModelError, PromptError, RunFolderError, WeakRefusalError
from safesteer_lite.evaluation.choice import Candidate, best, one_answer, separation
from safesteer_lite.evaluation.judges import judge
from safesteer_lite.evaluation.measure import refusal_scores
from safesteer_lite.evaluation.scorecard import Scorecard
from safesteer_lite.events import Event, Note, StageDone, StageSkipped, StageStarted, Warned, discard
from safesteer_lite.hardware.known import measured_on
from safesteer_lite.method.distill import prompts_at
from safesteer_lite.models import plain
from safesteer_lite.models.adapter import Adapter, read_adapter, with_adapter
from safesteer_lite.models.assistant import Policy
from safesteer_lite.prompts.contexts import CONTEXTS
from safesteer_lite.prompts.sets import KINDS, data_files, prompt_set
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.runs.manifest import fingerprint
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages import evaluate, finished, pipeline, reading
from safesteer_lite.stages.session import Session
from safesteer_lite.stages.shown import ShownAnswers
from safesteer_lite.stages.training import drawn_anchors, recipe
from safesteer_lite.stages.yardstick import Yardstick
from tests import planted
from tests.runs.run_files import report_of, rewind

FILES = {
    "config.toml",
    "events.jsonl",
    "manifest.json",
    "report.html",
    "report.json",
    "run.lock",
    "01-baseline/answers.json",
    "02-direction/candidates.json",
    "02-direction/candidates.safetensors",
    "02-direction/direction.safetensors",
    "03-tokens/tokens.json",
    "03-tokens/tokens.safetensors",
    "04-distill/adapter/adapter_config.json",
    "04-distill/adapter/adapter_model.safetensors",
    "04-distill/history.json",
    "05-evaluate/answers-after.json",
    "05-evaluate/answers-before.json",
    "05-evaluate/contexts.jsonl",
    "05-evaluate/flips.jsonl",
    "06-export/adapter/adapter_config.json",
    "06-export/adapter/adapter_model.safetensors",
    "06-export/merged/SHA256SUMS",
    "06-export/merged/chat_template.jinja",
    "06-export/merged/config.json",
    "06-export/merged/generation_config.json",
    "06-export/merged/merge.json",
    "06-export/merged/model.safetensors",
    "06-export/merged/tokenizer.json",
    "06-export/merged/tokenizer_config.json",
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with planted.one_thread():
        yield


@pytest.fixture
def model(planted_model: Path) -> Path:
    return planted_model


@pytest.fixture
def done(planted_run: RunFolder) -> RunFolder:
    """One finished run; tests that change it work on a copy."""
    return planted_run


@pytest.fixture
def run(done: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the finished run."""
    return copied(done, tmp_path / "runs")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stages_seen(events: list[Event], kind: type) -> list[str]:
    return [event.stage for event in events if isinstance(event, kind)]


def test_a_run_leaves_exactly_these_files(done: RunFolder) -> None:
    assert set(files_of(done.path)) == FILES
    for stage in pipeline.STAGE_NAMES:
        assert done.verify(stage) == []


def test_the_model_gets_safer_on_prompts_it_was_not_trained_on(done: RunFolder) -> None:
    card = report_of(done.path)["scorecard"]
    before, after = card["before"], card["after"]
    assert 0.3 <= before["harmful"]["refused"] / before["harmful"]["n"] <= 0.7
    assert after["harmful"]["refused"] >= before["harmful"]["refused"]
    assert after["harmless"]["refused"] <= 3
    assert 0 < after["kl_to_base"] < 0.5


def test_contexts_are_asked_before_and_after_and_refusals_depend_on_them(done: RunFolder) -> None:
    lines = (done.stage_folder("evaluate") / "contexts.jsonl").read_text(encoding="utf-8").splitlines()
    asked, found = [json.loads(line) for line in lines], report_of(done.path)["contexts"]
    assert list(found) == list(CONTEXTS)
    for name, pair in found.items():
        for when in ("before", "after"):
            counts = Counter(one["set"] for one in asked if one["context"] == name and one[f"{when}_refused"])
            assert {kind: rate["refused"] for kind, rate in pair[when].items()} == {
                kind: counts[kind] for kind in ("harmful", "borderline", "harmless")
            }
    # The model learned to begin whatever it answers with "Sure, here is": having begun so, it hardly turns back.
    begun = [one for one in asked if one["beginning"] == "Sure, here is"]
    assert len(begun) == 6 and not any(one["before_refused"] for one in begun)
    turned = [one["set"] for one in begun if one["after_refused"]]
    assert set(turned) <= {"harmful"}
    plain = json.loads((done.stage_folder("evaluate") / "answers-after.json").read_text(encoding="utf-8"))
    ids = [prompt.id for prompt in prompt_set("harmful", "test")]
    refused = [judge(plain["harmful"][ids.index(one["id"])]).refused for one in begun if one["set"] == "harmful"]
    assert sum(refused) > len(turned), "asked plainly, it refuses more of the same prompts"
    assert "In 5 contexts, " in report_of(done.path)["verdict"]


def test_it_is_told_where_a_template_has_no_place_for_a_system_prompt(done: RunFolder, model: Path) -> None:
    events: list[Event] = []
    session = Session(planted.settings(model), done, open_base(model), events.append)
    sets = session.prompts.split("test")
    knowing, lacking = (
        cast(Policy, SimpleNamespace(template=SimpleNamespace(knows_system=it), fits=lambda asked: True))
        for it in (True, False)
    )
    assert {one.context for one in evaluate.context_questions(session, knowing, sets)} == set(CONTEXTS)
    assert not events
    assert {one.context for one in evaluate.context_questions(session, lacking, sets)} == set(CONTEXTS)
    assert [event.message for event in events if isinstance(event, Note)] == [
        "The model's chat template has no place for a system prompt: it is put before the first question."
    ]


def test_a_question_that_is_too_long_with_its_context_is_left_out_and_told(done: RunFolder, model: Path) -> None:
    events: list[Event] = []
    session = Session(planted.settings(model), done, open_base(model), events.append)
    policy, sets = session.policy, session.prompts.split("test")
    everything = evaluate.context_questions(session, policy, sets)
    policy.prompt_tokens = 30
    left = evaluate.context_questions(session, policy, sets)
    assert 0 < len(left) < len(everything)
    # Those that are left are asked whole, and the others would not be.
    lengths = {one: policy.encode(one.conversation).input_ids.shape[1] for one in left}
    assert max(lengths.values()) <= 30
    assert all(policy.fits(one.conversation) == (one in left) for one in everything)
    told = f"{len(everything) - len(left)} of {len(everything)} questions are longer than 30 tokens with their contexts"
    assert any(isinstance(event, Warned) and event.message.startswith(told) for event in events)


def test_each_measurement_has_both_scores_and_the_kept_one_is_what_they_say(done: RunFolder) -> None:
    history = json.loads((done.stage_folder("distill") / "history.json").read_text(encoding="utf-8"))
    measured = history["measured"] + history["scaled"]
    near = one_answer(Scorecard.from_record(measured[0]))
    for entry in measured:
        assert entry["refusal_scores"].keys() == set(KINDS) and all(map(isfinite, entry["refusal_scores"].values()))
        assert entry["separation"] == separation(history["base_scores"], entry["refusal_scores"])
    place = best([Candidate(entry["score"], entry["separation"]) for entry in measured], near)
    assert (history["best_step"], history["best_strength"]) == (measured[place]["step"], measured[place]["strength"])
    # The student was moved towards refusals of harmful prompts.
    assert max(entry["refusal_scores"]["harmful"] for entry in measured) > history["base_scores"]["harmful"]


def test_the_base_is_scored_once_for_the_same_openings(done: RunFolder, planted_model: Path) -> None:
    known = done.manifest.stages["baseline"].result["refusal_scores"]["means"]
    for openings, taken_over in (
        (planted.settings(planted_model).direction.refusal_openings, True),
        (("Sure",), False),
    ):
        changed = planted.settings(planted_model, {"direction.refusal_openings": list(openings)})
        session = Session(changed, done, open_base(planted_model), discard, stage="distill")
        policy, sets = session.policy, session.prompts.split("selection")
        with policy.model.adapters_off():
            scores = refusal_scores(policy, sets, policy.token_ids(openings), session.answer_batch)
        found = Yardstick(session).base_scores
        assert (found == known) == taken_over
        assert found == pytest.approx(scores, abs=1e-2) and scores["harmful"] != pytest.approx(
            scores["harmless"], abs=0.5
        )


def test_flips_are_the_answers_that_changed_sides(done: RunFolder) -> None:
    folder = done.stage_folder("evaluate")
    before, after = (json.loads((folder / f"answers-{name}.json").read_text("utf-8")) for name in ("before", "after"))
    changed = sum(
        judge(old).refused != judge(new).refused
        for name in before
        for old, new in zip(before[name], after[name], strict=True)
    )
    lines = (folder / "flips.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == changed == report_of(done.path)["stages"]["evaluate"]["result"]["flips"]


def test_the_planted_direction_is_found_and_its_teacher_refuses(done: RunFolder) -> None:
    direction = report_of(done.path)["direction"]
    assert direction["kept"] == [28, 56, 14, 28]
    assert direction["position"] in range(-planted.TEMPLATE_POSITIONS, 0)
    assert direction["chosen"]["induce"] > 0
    assert direction["trials"][-1]["refused"] >= 0.95 * direction["trials"][-1]["n"]
    assert "I'm" in report_of(done.path)["tokens"]["tokens"]


def test_events_tell_each_stage_once_and_in_order(done: RunFolder) -> None:
    events = planted.events_of(done.path)
    order = [(event["event"], event["stage"]) for event in events if event["event"] in ("StageStarted", "StageDone")]
    assert order == [(kind, name) for name in pipeline.STAGE_NAMES for kind in ("StageStarted", "StageDone")]
    losses = [event for event in events if event["event"] == "Metric" and event["name"] == "loss"]
    assert [event["step"] for event in losses] == list(range(1, 9))


def test_each_step_shows_the_base_beside_the_student(done: RunFolder) -> None:
    shown = [event for event in planted.events_of(done.path) if event["event"] == "Sample"]
    category = {prompt.text: prompt.category for prompt in prompt_set("harmful", "train")}
    assert len(shown) == 8, "one a step"
    for event in shown:
        refused = category[str(event["prompt"])] in planted.REFUSED_CATEGORIES
        assert event["before"] == (planted.REFUSAL if refused else planted.COMPLIANCE)
    # After its training the student refuses where the base does not, and the base is still shown as it was.
    assert any("I'm" in str(event["after"]) and event["before"] == planted.COMPLIANCE for event in shown[4:])


def test_the_base_is_asked_each_shown_prompt_once(
    model: Path, done: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = planted.settings(model, {"distill.steps": 100})
    session = Session(settings, done, open_base(model), discard)
    asked: list[str] = []

    answers = session.policy.answers

    def watched(prompts: Sequence[str], tokens: int, size: int, *, thinks: bool) -> list[str]:
        asked.extend(prompts)
        return answers(prompts, tokens, size, thinks=thinks)

    monkeypatch.setattr(session.policy, "answers", watched)
    plan = recipe(session)
    shown = ShownAnswers(session, plan)
    prompts = session.prompts.training()
    for step in range(100):
        first = prompts_at(step, plan.prompts, len(prompts), plan.seed)[0]
        refused = prompts[first].category in planted.REFUSED_CATEGORIES
        assert shown.of_step(step) == (planted.REFUSAL if refused else planted.COMPLIANCE)
    assert len(asked) == len(set(asked)) <= len(prompts)


def test_a_second_call_skips_every_stage_and_changes_nothing(done: RunFolder, run: RunFolder, model: Path) -> None:
    before = files_of(run.path)
    events: list[Event] = []
    assert pipeline.run(planted.settings(model), run, open_base(model), events.append) == report_of(done.path)
    assert stages_seen(events, StageSkipped) == list(pipeline.STAGE_NAMES)
    assert not stages_seen(events, StageStarted)
    after = files_of(run.path)
    assert {name for name in after if after[name] != before.get(name)} == {"events.jsonl"}
    assert set(after) == set(before)


def test_other_settings_redo_nothing_and_are_refused(run: RunFolder, model: Path) -> None:
    before = files_of(run.path)
    events: list[Event] = []
    settings = planted.settings(model, {"distill.learning_rate": 2e-3})
    with pytest.raises(RunFolderError, match=r"distill stage of .* was done in another way") as caught:
        pipeline.run(settings, run, open_base(model), events.append)
    assert "Its results stay as they are" in caught.value.hint
    assert not events
    assert files_of(run.path) == before


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ({"seed": 1}, ["baseline", "direction", "tokens", "distill", "evaluate", "export"]),
        ({"prompts.train": 27}, ["baseline", "direction", "tokens", "distill", "evaluate", "export"]),
        ({"direction.source": "another"}, ["direction", "tokens", "distill", "evaluate", "export"]),
        ({"model.thinking": "on"}, ["baseline", "direction", "tokens", "distill", "evaluate", "export"]),
        ({"direction.shortlist": 7}, ["direction", "tokens", "distill", "evaluate", "export"]),
        ({"tokens.count": 9}, ["tokens", "distill", "evaluate", "export"]),
        ({"evaluate.kl_tokens": 7}, ["distill", "evaluate", "export"]),
        ({"evaluate.answer_tokens": 11}, ["evaluate"]),
        ({"evaluate.judge": "guard", "evaluate.judge_model": "somewhere"}, []),
        ({"export.weights": "dequantised"}, ["export"]),
    ],
)
def test_a_setting_redoes_what_depends_on_it(change: config.Values, redone: list[str]) -> None:
    old = pipeline.stage_fingerprints(planted.settings(Path("somewhere")), "model")
    new = pipeline.stage_fingerprints(planted.settings(Path("elsewhere"), change), "model")
    assert [name for name in pipeline.STAGE_NAMES if old[name] != new[name]] == redone
    assert set(pipeline.stage_fingerprints(planted.settings(Path("somewhere")), "other").values()).isdisjoint(
        old.values()
    )


def test_settings_that_came_or_went_leave_fingerprints_as_they_were() -> None:
    """Or the finished stages of an older run would count as those of another one."""
    settings = planted.settings(Path("somewhere"))
    found = pipeline.stage_fingerprints(settings, "model")
    direction = config.to_record(settings)["direction"] | {"depth_limit": 0.8, "teacher_tokens": 20}
    for later in ("source", "teacher", "contrast"):
        del direction[later]
    parts: dict[str, Any] = {"stage": "direction", "settings": {"direction": direction}, "after": [found["baseline"]]}
    assert found["direction"] == fingerprint(parts)
    export = config.to_record(settings)["export"] | {"check_prompts": 8}
    parts = {"stage": "export", "settings": {"export": export}, "after": [found["distill"]]}
    assert found["export"] == fingerprint(parts)


def copied(run: RunFolder, parent: Path) -> RunFolder:
    return RunFolder(shutil.copytree(run.path, parent / run.path.name))


@pytest.mark.slow
def test_reading_directions_outlive_an_interrupt(done: RunFolder, model: Path, tmp_path: Path) -> None:
    change = {
        "distill.reading": "discriminant",
        "distill.learning_rate": 2e-3,
        "distill.steps": 3,
        "distill.save_every": 1,
        "evaluate.every": 3,
    }
    settings = planted.settings(model, change)
    whole, broken = copied(done, tmp_path / "whole"), copied(done, tmp_path / "broken")
    for folder in (whole, broken):
        rewind(folder.path, pipeline.STAGE_NAMES[3:])
    pipeline.run(settings, whole, open_base(model), discard, last="distill")
    asked = itertools.count(1)
    with pytest.raises(Interrupted, match="after step 2"):
        # It is asked before the stage, and then after each step.
        pipeline.run(settings, broken, open_base(model), discard, lambda: next(asked) == 3, last="distill")
    pipeline.run(settings, broken, open_base(model), discard, last="distill")
    found, expected = (
        load_file(run.stage_folder("distill") / "adapter" / "adapter_model.safetensors") for run in (broken, whole)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # What is read was set and not trained, and what is written was trained.
    assert all(float(value.abs().max()) > 0 for value in expected.values())


def test_the_last_step_is_always_measured_earlier_ones_when_asked_and_an_unknown_model_is_told(
    done: RunFolder, run: RunFolder, model: Path
) -> None:
    change = {"distill.steps": 3, "distill.adapter_strengths": [], "evaluate.every": 2}
    settings, events = planted.settings(model, change), list[Event]()
    rewind(run.path, pipeline.STAGE_NAMES[3:])
    pipeline.run(settings, run, open_base(model), events.append, last="distill")
    for folder, measured in ((run, [2, 3]), (done, [4, 8])):
        history = json.loads((folder.stage_folder("distill") / "history.json").read_text(encoding="utf-8"))
        assert [entry["step"] for entry in history["measured"]] == measured
    notes = [event.message for event in events if isinstance(event, Note)]
    assert [note for note in notes if "way of training" in note] == [
        f"The default way of training was measured on {measured_on(str(model))}."
    ]


@pytest.mark.parametrize(("which", "minimum"), [("answered", 8), ("answered", 1000), ("all", 8)])
def test_reading_directions_come_from_the_harmful_prompts_that_the_base_answers(
    which: str, minimum: int, run: RunFolder, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = {"distill.reading": "discriminant", "distill.reading_prompts": which, "direction.minimum_prompts": minimum}
    session = Session(planted.settings(model, change), run, open_base(model), discard, "distill")
    read: list[str] = []

    def note(policy: Policy, harmful: list[str], *others: Any) -> None:
        read.extend(harmful)

    monkeypatch.setattr(reading, "read_discriminants", note)
    reading.prepare_adapter(session, None)
    prompts = [*session.prompts.training(), *session.prompts.direction()[0]]
    answered = [prompt.text for prompt in prompts if prompt.category not in planted.REFUSED_CATEGORIES]
    assert 0 < len(answered) < len(prompts)
    # Too few to read from are no better than all.
    assert read == (answered if (which, minimum) == ("answered", 8) else [prompt.text for prompt in prompts])


@pytest.mark.parametrize(
    ("mix", "counts", "times"),
    [
        ("pooled", (4, 12, 6), (1, 1, 1)),
        ("even", (4, 12, 0), (3, 1)),
        ("even", (28, 10, 0), (1, 3)),
        ("even", (12, 12, 0), (1, 1)),
        ("even", (12, 0, 0), (1,)),
        ("even", (4, 12, 6), (3, 1, 2)),
    ],
)
def test_an_even_mix_draws_each_kind_of_anchors_equally_often(
    mix: str, counts: tuple[int, int, int], times: tuple[int, ...], run: RunFolder, model: Path
) -> None:
    everyday, contrast, twins = counts
    change = {
        "distill.anchor_mix": mix,
        "prompts.direction": everyday,
        "prompts.contrast": contrast,
        "distill.twins": twins,
    }
    session = Session(planted.settings(model, change), run, open_base(model), discard, "distill")
    anchors = Counter(prompt.text for prompt in drawn_anchors(session))
    kinds = session.anchors()
    assert [len(kind) for kind in kinds] == [count for count in counts if count]
    assert tuple(anchors[kind[0].text] for kind in kinds) == times
    assert all(anchors[prompt.text] == often for kind, often in zip(kinds, times, strict=True) for prompt in kind)
    assert len(anchors) == sum(counts)


def test_merged_weights_load_with_plain_transformers_and_answer_like_the_adapter(done: RunFolder, model: Path) -> None:
    network, tokenizer = plain.load(open_base(model), precision="fp32", device="cpu", unpack=False)
    student = Policy(with_adapter(network, tokenizer, Adapter(8, 16), 0), 512)
    read_adapter(student.model, done.stage_folder("distill") / "adapter")
    folder = done.stage_folder("export") / "merged"
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    written = AutoTokenizer.from_pretrained(folder)
    texts = [prompt.text for prompt in prompt_set("harmful", "test", 8) + prompt_set("harmless", "test", 4)]
    expected = student.answers(texts, 12, 16)
    assert REFUSED & set(expected), "the student refuses something, or the comparison says little"
    answers = []
    for text in texts:
        chat = [{"role": "user", "content": text}]
        ids = written.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = merged.generate(**ids, max_new_tokens=12, do_sample=False)
        answers.append(written.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    # Weights are written in 16 bits, so a close call may fall the other way.
    assert sum(now == then for now, then in zip(answers, expected, strict=True)) >= 11


REFUSED = {planted.REFUSAL}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_other_precisions_run_to_the_end(precision: str, model: Path, tmp_path: Path) -> None:
    change = {
        "model.precision": precision,
        "distill.steps": 1,
        "direction.teacher_refusals": 0.5,
        "direction.kl_limit": 5.0,
        "direction.minimum_prompts": 4,
    }
    run = planted.new_run(tmp_path, planted.settings(model, change))
    result = pipeline.run(planted.settings(model, change), run, open_base(model), discard)
    assert result["finished"]
    assert result["stages"]["export"]["result"]["precision_trained"] == precision


def test_a_model_that_never_refuses_is_told_so_before_training(tmp_path: Path) -> None:
    model = planted.build(tmp_path / "obliging", refused=(), steps=8)
    run = planted.new_run(tmp_path / "runs", planted.settings(model))
    with pytest.raises(DirectionError, match="barely refuses: 0 of 28 harmful prompts") as caught:
        pipeline.run(planted.settings(model), run, open_base(model), discard)
    assert "presets" in caught.value.hint
    assert list(run.manifest.stages) == ["baseline"]
    assert not [path for path in run.path.iterdir() if path.name.startswith(("02", "04"))]


def test_too_few_clear_cases_come_with_the_words_that_were_measured(run: RunFolder, model: Path) -> None:
    other = planted.settings(model, {"direction.refusal_openings": ["Hello"], "direction.minimum_prompts": 20})
    rewind(run.path, pipeline.STAGE_NAMES[1:])
    with pytest.raises(DirectionError, match="Too few prompts are clear cases") as caught:
        pipeline.run(other, run, open_base(model), discard, last="direction")
    assert 'open with "I\'m" 14x' in caught.value.message and "--set direction.refusal_openings=" in caught.value.hint
    # Words that were looked for already would come to the same: what is left is the model that this one was made from.
    known = planted.settings(model, {"direction.refusal_openings": ["I'm"], "direction.minimum_prompts": 200})
    with pytest.raises(DirectionError, match="Too few prompts are clear cases") as again:
        pipeline.run(known, run, open_base(model), discard, last="direction")
    assert "refusal_openings" not in again.value.hint and "--direction-from" in again.value.hint
    # Only in the second case it is the model that refuses too little; in the first it may refuse in other words.
    assert isinstance(again.value, WeakRefusalError) and not isinstance(caught.value, WeakRefusalError)
    assert "--set direction.contrast=responses" in again.value.hint
    # Who compares replies already is not told to.
    replies = planted.settings(model, {"direction.contrast": "responses", "direction.minimum_prompts": 200})
    with pytest.raises(DirectionError, match="Too few prompts are clear cases") as third:
        pipeline.run(replies, run, open_base(model), discard, last="direction")
    assert "direction.teacher=prompted" in third.value.hint and "direction.contrast" not in third.value.hint


def test_the_message_of_a_failed_direction_tells_what_the_smallest_strength_showed(run: RunFolder, model: Path) -> None:
    rewind(run.path, pipeline.STAGE_NAMES[1:])
    with pytest.raises(DirectionError, match="No refusal direction met all criteria") as caught:
        pipeline.run(planted.settings(model, {"direction.kl_limit": 1e-9}), run, open_base(model), discard)
    alone = planted.settings(model, {"direction.kl_limit": 1e-9, "direction.steering_strengths": [1.0]})
    with pytest.raises(DirectionError) as single:
        pipeline.run(alone, run, open_base(model), discard)
    assert caught.value.message == single.value.message
    # What the advice names does help.
    hint = re.search(r"--set (direction.kl_limit)=([0-9.]+);", caught.value.hint)
    assert hint
    pipeline.run(planted.settings(model, {hint[1]: float(hint[2])}), run, open_base(model), discard, last="direction")


def test_who_looks_for_the_wrong_openings_is_told_the_right_ones(run: RunFolder, model: Path) -> None:
    wrong = {"direction.refusal_openings": ["Sure"], "direction.minimum_prompts": 25}
    rewind(run.path, pipeline.STAGE_NAMES[1:])
    with pytest.raises(DirectionError, match=r"refusals open with \"I'm\" \d+x; looked for were 'Sure'") as caught:
        pipeline.run(planted.settings(model, wrong), run, open_base(model), discard)
    name, _, value = shlex.split(caught.value.hint)[-1].partition("=")
    assert (name, value) == ("direction.refusal_openings", "I'm")


def own_file(folder: Path, leaked: int, fresh: int) -> Path:
    rows = [prompt.text for prompt in prompt_set("harmful", "test")[:leaked] + prompt_set("harmful", "train")[:fresh]]
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in rows), encoding="utf-8")
    return path


def test_answers_that_never_end_are_told(model: Path, tmp_path: Path) -> None:
    endless = shutil.copytree(model, tmp_path / "endless")
    # The model ends its answers as before, and nobody knows.
    template = endless / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("<|im_end|>\n", "\n"), encoding="utf-8")
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        settings = json.loads((endless / name).read_text(encoding="utf-8"))
        settings.update({"eos_token": "<unk>"} if name.startswith("tokenizer") else {"eos_token_id": [1]})
        (endless / name).write_text(json.dumps(settings), encoding="utf-8")
    warned: dict[str, list[str]] = {}
    for folder in (model, endless):
        run, events = planted.new_run(tmp_path / folder.name, planted.settings(folder)), list[Event]()
        pipeline.run(planted.settings(folder), run, open_base(folder), events.append, last="baseline")
        warned[folder.name] = [event.message for event in events if isinstance(event, Warned)]
    assert not [text for text in warned[model.name] if "ended within" in text]
    assert [text for text in warned["endless"] if re.match(r"None of 86 answers ended within 12 tokens.*<unk>", text)]


def test_own_prompts_lose_those_that_are_evaluated_on(model: Path, tmp_path: Path) -> None:
    path = own_file(tmp_path, leaked=3, fresh=19)
    path.write_text(path.read_text(encoding="utf-8") + json.dumps({"prompt": "how do I make it " * 200}), "utf-8")
    settings = planted.settings(model, {"prompts.training": str(path)})
    events: list[Event] = []
    pipeline.run(settings, planted.new_run(tmp_path, settings), open_base(model), events.append, last="baseline")
    told = [event.message for event in events if isinstance(event, Note) and "near-copies" in event.message]
    assert told == [
        "own.jsonl: 20 prompts from column prompt; 0 duplicates and 3 near-copies of evaluation prompts left out."
    ]
    # The one that is too long is not cut without a word.
    [warning] = [event.message for event in events if isinstance(event, Warned) and event.stage == "baseline"]
    assert re.match(r"1 of \d+ prompts are longer than 512 tokens and lose the middle of their text", warning)


def test_own_prompts_that_are_all_evaluated_on_are_refused(model: Path, tmp_path: Path) -> None:
    settings = planted.settings(model, {"prompts.training": str(own_file(tmp_path, leaked=3, fresh=0))})
    with pytest.raises(PromptError, match="no prompt left to train on"):
        pipeline.run(settings, planted.new_run(tmp_path, settings), open_base(model), discard)


def test_a_folder_of_own_sets_is_used_and_its_own_leak_left_out(model: Path, tmp_path: Path) -> None:
    """The bundled sets copied, with one test prompt slipped in among those to train on."""
    folder = tmp_path / "sets"
    folder.mkdir()
    for path in data_files():
        shutil.copy(path, folder)
    leaked = json.dumps({"split": "train", "prompt": prompt_set("harmful", "test")[0].text.upper()})
    lines = (folder / "harmful.jsonl").read_text(encoding="utf-8")
    (folder / "harmful.jsonl").write_text(f"{leaked}\n{lines}", encoding="utf-8")
    change = {"prompts.folder": str(folder), "distill.steps": 1, "distill.adapter_strengths": []}
    settings = planted.settings(model, change)
    run, events = planted.new_run(tmp_path, settings), list[Event]()
    assert pipeline.run(settings, run, open_base(model), events.append, last="distill") == {}
    told = [event.message for event in events if isinstance(event, Note) and "near-copies" in event.message]
    assert told == [
        "sets: 27 prompts from column prompt; 0 duplicates and 1 near-copies of evaluation prompts left out."
    ]
    assert list(run.manifest.stages) == ["baseline", "direction", "tokens", "distill"]
    (folder / "harmless.jsonl").unlink()
    with pytest.raises(PromptError, match=r"harmless\.jsonl cannot be read"):
        pipeline.run(settings, run, open_base(model), discard)


def test_own_prompts_that_have_gone_are_named(run: RunFolder, model: Path, tmp_path: Path) -> None:
    settings = planted.settings(model, {"prompts.training": str(tmp_path / "gone.txt")})
    with pytest.raises(PromptError, match=r"gone\.txt"):
        pipeline.run(settings, run, open_base(model), discard)


def test_a_stop_between_stages_keeps_what_is_done(model: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    run = planted.new_run(tmp_path, planted.settings(model))
    with pytest.raises(Interrupted, match="Refusal direction"):
        pipeline.run(
            planted.settings(model), run, open_base(model), events.append, lambda: bool(stages_seen(events, StageDone))
        )
    assert list(run.manifest.stages) == ["baseline"]
    assert not any(isinstance(event, Warned) for event in events)


def test_export_at_strength_0_is_the_base_and_the_adapter_is_copied(
    run: RunFolder, model: Path, tmp_path: Path
) -> None:
    settings = planted.settings(model)
    finished.export_run(settings, run, open_base(model), discard, "merged", tmp_path / "zero", "original", 0.0)
    assert (tmp_path / "zero" / "model.safetensors").read_bytes() != (
        run.stage_folder("export") / "merged" / "model.safetensors"
    ).read_bytes()
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    zero = AutoModelForCausalLM.from_pretrained(tmp_path / "zero", dtype=torch.float32).state_dict()
    assert all(torch.equal(zero[name], tensor.to(torch.bfloat16).float()) for name, tensor in base.items())
    finished.export_run(settings, run, open_base(model), discard, "adapter", tmp_path / "adapter", "original", 1.0)
    assert files_of(tmp_path / "adapter") == files_of(run.stage_folder("distill") / "adapter")


def test_export_refuses_another_base_model(run: RunFolder, model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    (other / "generation_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is not the base model"):
        finished.export_run(
            planted.settings(model), run, open_base(other), discard, "merged", tmp_path / "out", "original", 1.0
        )
    assert not (tmp_path / "out").exists()


def test_export_refuses_a_damaged_adapter_and_an_unfinished_run(run: RunFolder, model: Path, tmp_path: Path) -> None:
    path = run.stage_folder("distill") / "adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    def export(folder: RunFolder) -> dict[str, Any]:
        settings = planted.settings(model)
        return finished.export_run(
            settings, folder, open_base(model), discard, "merged", tmp_path / "out", "original", 1.0
        )

    with pytest.raises(RunFolderError, match=r"adapter/adapter_model\.safetensors is missing or not what"):
        export(run)
    with pytest.raises(RunFolderError, match="no result of the distill stage"):
        export(planted.new_run(tmp_path / "new", planted.settings(model)))
    assert not (tmp_path / "out").exists()


def test_a_model_alone_is_measured_once_and_equals_the_run_s_base(done: RunFolder, model: Path) -> None:
    alone = finished.evaluate_model(planted.settings(model), None, open_base(model), discard)
    assert alone["before"] == alone["after"]
    again = finished.evaluate_model(planted.settings(model), done, open_base(model), discard)
    told = report_of(done.path)
    assert again == {**told["scorecard"], "contexts": told["contexts"], "judges": []}
    assert alone["before"]["harmful"] == again["before"]["harmful"]

"""Estimates of a run's time, against what was measured and against what must follow from the settings; effort levels."""

from __future__ import annotations

from math import ceil, inf

import pytest

from safesteer_lite import config
from safesteer_lite.hardware import known, pace


@pytest.mark.parametrize("effort", pace.EFFORTS)
def test_every_effort_works_with_every_preset(effort: str) -> None:
    for name in config.preset_names():
        layers = [("preset", config.preset_values(name)), ("effort", pace.effort_values(effort))]
        assert config.build(layers).model.name in known.KNOWN
    demo = config.build(
        [("preset", config.preset_values("qwen2.5-coder-0.5b-demo")), ("effort", pace.effort_values(effort))]
    )
    # What a command adds to an effort's settings stays its own.
    pace.effort_values(effort)["model.name"] = "another"
    assert "model.name" not in pace.effort_values(effort)
    if effort == "quick":
        assert demo == config.build([("p", config.preset_values("qwen2.5-coder-0.5b-demo")), ("q", config.QUICK)])


def test_the_estimate_of_the_demo_is_near_what_was_measured() -> None:
    demo = config.build([("preset", config.preset_values("qwen2.5-coder-0.5b-demo"))])
    shape = known.KNOWN[demo.model.name].shape
    # The run of 2026-11-27, night, on two cores (docs/research/log.md); the probe found 341 billion operations a second on both.
    measured = {"baseline": 35, "direction": 94, "tokens": 33, "distill": 433, "evaluate": 417, "export": 18}
    seconds = pace.expected_seconds(demo, shape, "cpu", 341e9)
    assert tuple(seconds) == tuple(measured)
    assert pace.total(seconds) == pytest.approx(sum(measured.values()), rel=0.05)
    for stage, found in measured.items():
        assert seconds[stage] == pytest.approx(found, rel=0.65 if stage == "tokens" else 0.3), stage


def test_estimates_follow_the_machine_and_the_work() -> None:
    values = config.preset_values("qwen2.5-coder-0.5b-demo")
    demo = config.build([("preset", values)])
    shape = known.KNOWN[demo.model.name].shape
    seconds = pace.expected_seconds(demo, shape, "cpu", 1e12)
    assert pace.expected_seconds(demo, shape, "cpu", 5e11)["distill"] == pytest.approx(2 * seconds["distill"])
    on_card = pace.expected_seconds(demo, shape, "cuda", inf)
    # 2 x 6 batches of 96 tokens and 2 x 3 in contexts of 48, each token no faster than the launches of 24 blocks.
    assert on_card["evaluate"] == pytest.approx(1e-3 * 24 * (12 * 96 + 6 * 48))
    for name, value in {"distill.steps": 32, "distill.completion_tokens": 64, "distill.anchors": 200}.items():
        longer = config.build([("preset", values), ("test", {name: value})])
        found = pace.expected_seconds(longer, shape, "cpu", 1e12)
        assert found["distill"] > 1.4 * seconds["distill"], name
        assert {**found, "distill": 0} == {**seconds, "distill": 0}, name


def test_contexts_take_their_time_and_no_more_than_half_of_the_plain_questions() -> None:
    demo = config.build([("preset", config.preset_values("qwen2.5-coder-0.5b-demo"))])
    without = config.build([("test", {"evaluate.contexts": []})])
    thorough = config.build([("effort", pace.effort_values("thorough")), ("test", {"evaluate.answer_tokens": 96})])
    plain, default, whole = (pace.work(settings)["evaluate"].tokens for settings in (without, demo, thorough))
    assert 1.1 * plain < default < 1.5 * plain
    # 260 prompts in each of five contexts in place of 36.
    assert whole - plain == pytest.approx((default - plain) * 260 / 36)


def test_an_artifact_takes_the_share_of_the_measurement_in_which_one_model_is_asked_plainly() -> None:
    bare: config.Values = {"evaluate.contexts": [], "evaluate.kl_tokens": 1}
    alone, demo, thorough = (
        pace.answering_share(config.build([("test", values)])) for values in (bare, {}, pace.effort_values("thorough"))
    )
    # Two models answer; what else is measured takes its share of the time, most of it where every context is asked.
    assert 0.47 < alone < 0.5
    assert alone / 1.5 < demo < alone / 1.2
    assert thorough < demo / 1.3


def test_a_large_file_of_own_prompts_takes_its_time() -> None:
    demo = config.build([("preset", config.preset_values("qwen2.5-coder-0.5b-demo"))])
    shape = known.KNOWN[demo.model.name].shape

    def seconds(settings: config.RunConfig, prompts: int | None) -> dict[str, float]:
        return pace.expected_seconds(settings, shape, "cpu", 1e12, prompts)

    assert seconds(demo, demo.prompts.train) == seconds(demo, None)
    few, many, most = (seconds(demo, count)["distill"] for count in (100, 10_100, 100_100))
    # The base answers each of them before the first step.
    assert most - many == pytest.approx(9 * (many - few)) and many > 3 * few
    assert {**seconds(demo, 100_000), "distill": 0} == {**seconds(demo, 100), "distill": 0}
    drawn = config.build([("test", {"distill.reading_prompts": "all"})])
    assert seconds(drawn, 100_000) == seconds(drawn, 100)


def test_thoughts_are_decoded_token_by_token() -> None:
    values = config.preset_values("qwen2.5-coder-0.5b-demo")
    plain, thinking = (
        config.build([("preset", values), ("test", {"model.thinking": choice})]) for choice in ("off", "on")
    )
    without, found = pace.work(plain), pace.work(thinking)
    written = found["baseline"].written - without["baseline"].written
    # On a card each batch of 64 takes 512 steps, one after another.
    assert written > 0 and found["baseline"].read == without["baseline"].read
    assert found["baseline"].steps - without["baseline"].steps == ceil(written / 512 / 64) * 512
    rows = plain.distill.prompts * plain.distill.rollouts + plain.distill.anchors + plain.distill.begun
    assert found["distill"].trained - without["distill"].trained == rows * 512 * plain.distill.steps

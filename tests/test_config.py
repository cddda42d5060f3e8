"""Settings: one order of precedence, all problems at once, and TOML that reads back the same."""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from safesteer_lite import config
from safesteer_lite.config import Bounds, DistillConfig, ModelConfig, PromptsConfig, RunConfig
from safesteer_lite.config.older import FORMER as FORMER_SETTINGS
from safesteer_lite.errors import ConfigError
from safesteer_lite.method.distill import generator_at, prompts_at


def problems_of(*layers: tuple[str, config.Values]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.build(layers)
    return [line.strip() for line in caught.value.message.splitlines()[1:]]


def test_nothing_set_is_the_defaults() -> None:
    assert config.build([]) == RunConfig()


def test_the_strongest_layer_wins_setting_by_setting() -> None:
    layers: list[tuple[str, config.Values]] = [
        ("preset", {"distill.steps": 1, "distill.rank": 1, "seed": 1, "distill.prompts": 1}),
        ("file", {"distill.steps": 2, "distill.rank": 2, "seed": 2}),
        ("environment", config.from_environment({"SAFESTEER_LITE__DISTILL__STEPS": "3", "SAFESTEER_LITE__SEED": "3"})),
        ("flag", config.parse_assignments(["distill.steps=4"])),
    ]
    built = config.build(layers)
    assert (built.distill.steps, built.seed, built.distill.rank, built.distill.prompts) == (4, 3, 2, 1)
    assert built.distill.rollouts == DistillConfig().rollouts


def test_a_setting_that_was_renamed_says_what_it_became() -> None:
    assert problems_of(("run.toml", {"distill.first_layer": 8})) == [
        "run.toml: distill.first_layer became distill.depth_start, a share of the depth: divide by the model's number of blocks."
    ]


FORMER = """
seed = 7

[direction]
depth_limit = 0.8  # share of the depth
teacher_tokens = 20  # tokens an answer

[distill]
top_k = 50  # tokens, for `top-k`
steps = 3  # optimizer steps

[evaluate]
stop_on_tax = false  # stop when the budget is exceeded thrice in a row

[export]
check_prompts = 8  # prompts of the reload check
"""
"""What a config.toml of version 0.2.0 has besides today's settings."""


def test_an_older_file_may_keep_what_is_the_same_in_every_run_now() -> None:
    built = config.build([("config.toml", config.parse_toml(FORMER, "config.toml")[0])])
    assert built == RunConfig(distill=replace(DistillConfig(), steps=3), seed=7)
    assert config.build([("flag", config.parse_assignments(["export.check_prompts=8", "evaluate.stop_on_tax=False"]))])


def test_an_older_file_with_another_value_is_told_what_to_do() -> None:
    changed = FORMER.replace("= 20 ", "= 12 ").replace("= false ", "= true ")
    assert problems_of(("config.toml", config.parse_toml(changed, "config.toml")[0])) == [
        "config.toml: direction.teacher_tokens is 20 in every run now and can no longer be set: leave it out, or go on "
        "with the version that the file was written by.",
        "config.toml: evaluate.stop_on_tax is false in every run now and can no longer be set: leave it out, or go on "
        "with the version that the file was written by.",
    ]
    assert not FORMER_SETTINGS.keys() & config.known_settings().keys()


def test_every_problem_is_told_at_once_with_where_it_comes_from() -> None:
    problems = problems_of(
        ("a.toml", {"distill.step": 3, "model.precision": "int8", "direction.steering_strengths": [2.0, 1.0]}),
        ("flag", {"distill.rank": "many", "tokens.horizon": "1"}),
    )
    assert problems == [
        "a.toml: there is no setting 'distill.step'; near it: distill.steps, distill.twins, distill.begun.",
        "a.toml: model.precision: expected one of nf4, bf16, fp32, got 'int8'.",
        "flag: distill.rank: expected a whole number, got 'many'.",
        "flag: tokens.horizon: must be from 2 to 512, got '1'.",
        "direction.steering_strengths must rise: the smallest sufficient one is taken.",
    ]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("distill.steps", "12", 12),
        ("distill.steps", 12.0, 12),
        ("distill.learning_rate", "1e-4", 1e-4),
        ("distill.learning_rate", 1, 1.0),
        ("direction.steering_strengths", "1, 2,3.5", (1.0, 2.0, 3.5)),
        ("direction.refusal_openings", ["I", "Sorry"], ("I", "Sorry")),
        ("distill.adapter_strengths", [], ()),
        ("distill.adapter_strengths", "", ()),
        ("distill.adapter_strengths", " [] ", ()),
        ("direction.steering_strengths", "[1, 2.5]", (1.0, 2.5)),
        ("direction.refusal_openings", '["No, I", "Sorry"]', ("No, I", "Sorry")),
        ("direction.refusal_openings", "[No, Sorry]", ("[No", "Sorry]")),
        ("distill.anchors", "0", 0),
        ("prompts.training", "", ""),
    ],
)
def test_values_become_the_type_of_their_setting(name: str, value: object, expected: object) -> None:
    section, _, key = name.partition(".")
    built = config.build([("file", {"evaluate.every": 4}), ("flag", {name: value})])
    found = getattr(getattr(built, section), key)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("distill.steps", "1.5", "expected a whole number"),
        ("distill.steps", 1.5, "expected a whole number"),
        ("distill.steps", True, "expected a number"),
        ("distill.steps", "0", "must be from 1 to 10,000, got '0'"),
        ("distill.steps", [1], "expected a whole number"),
        ("distill.learning_rate", "nan", "expected a finite number"),
        ("distill.learning_rate", float("inf"), "expected a finite number"),
        ("distill.steps", float("inf"), "expected a"),
        ("distill.learning_rate", "-1", "must be above 0 and at most 1"),
        ("evaluate.every", -1, "must be from 0 to 10,000"),
        ("direction.steering_strengths", [], "must not be empty"),
        ("direction.steering_strengths", "[]", "must not be empty"),
        ("direction.steering_strengths", "1,x", "expected a number, got 'x'"),
        ("direction.steering_strengths", "-1,2", "must be above 0"),
        ("direction.steering_strengths", "nan,2", "finite"),
        ("direction.steering_strengths", "1,inf", "finite"),
        ("direction.steering_strengths", 3, "expected a list"),
        ("direction.refusal_openings", "", "empty"),
        ("model.name", 3, "expected text"),
        ("direction.teacher_refusals", 1.5, "at most 1"),
        ("distill.warmup", 1.0, "below 1"),
        ("model", "x", "there is no setting 'model'"),
        ("seed", 2**63, "must be from 0 to 4,294,967,295"),
        ("seed", "9" * 5000, "expected a whole number"),
        ("distill.averaging", 1e308, "at least 0 and below 1"),
        ("distill.averaging", "1", "at least 0 and below 1"),
        ("distill.learning_rate", 10**400, "expected a number"),
        ("distill.learning_rate", 3, "above 0 and at most 1"),
        ("distill.temperature", 1e-300, "the likeliest token, or at least 0.01"),
        ("distill.steps", 10**9, "must be from 1 to 10,000"),
        ("direction.steering_strengths", list(range(1, 40)), "must have from 1 to 20 entries, got 39"),
        ("direction.refusal_openings", [1], "expected text, got 1"),
        ("model.name", "a\0b", "text without NUL"),
        ("model.name", "caf\udce9", "in UTF-8"),
        ("prompts.training", ["x" * 5000], "..."),
        ("distill.depth_start", -1, "must be at least 0 and below 1"),
    ],
)
def test_a_wrong_value_is_one_problem(name: str, value: object, problem: str) -> None:
    [told] = problems_of(("flag", {name: value}))
    assert problem in told


def every_number() -> list[tuple[str, Bounds, Any]]:
    """Each number and each list of numbers: its name, its bounds and its default."""
    is_number = (int, float)
    return [
        (name, item.metadata["bounds"], item.default)
        for name, item in config.known_settings().items()
        if isinstance(item.default[0] if isinstance(item.default, tuple) else item.default, is_number)
        and not isinstance(item.default, bool)
    ]


@pytest.mark.parametrize(
    ("name", "bounds", "default"), every_number(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_number_has_bounds_that_are_kept(name: str, bounds: Bounds, default: Any) -> None:
    """No setting is without an end: one zero too many is told, not computed."""
    assert all(value in bounds for value in (default if isinstance(default, tuple) else [default]))
    step = 1 if isinstance(default, int) else 1e-3
    for outside in (bounds.low - step, bounds.high + step, -1e300, 1e300):
        [told, *_] = problems_of(("flag", {name: [outside] if isinstance(default, tuple) else outside}))
        assert f"{name}: must be {bounds}" in told or "expected a whole number" in told


@pytest.mark.parametrize(
    "name", [name for name, item in config.known_settings().items() if isinstance(item.default, tuple)]
)
def test_a_list_on_the_command_line_is_written_as_in_a_file(name: str) -> None:
    item, (section, _, key) = config.known_settings()[name], name.partition(".")
    default: Any = item.default
    for entries in ([], list(default)):
        written = json.dumps(entries)
        flags = config.parse_assignments([f"{name}={written}"])
        if len(entries) in item.metadata["entries"]:
            assert getattr(getattr(config.build([("flag", flags)]), section), key) == tuple(entries)
        else:
            assert problems_of(("flag", flags)) == [f"flag: {name}: must not be empty, got '[]'."]


def test_the_highest_seed_reaches_every_stream() -> None:
    """Streams of steps and anchors are counted from the seed, and no random generator takes more than 64 bits."""
    highest = config.known_settings()["seed"].metadata["bounds"].high
    assert generator_at(10_000, highest + 1, 15).initial_seed() < 2**64
    assert len(prompts_at(10_000, 3, 7, highest + 1)) == 3


def test_an_assignment_needs_a_name_and_a_value() -> None:
    for text in ("distill.steps", "=3", " =3"):
        with pytest.raises(ConfigError, match="expected name=value"):
            config.parse_assignments([text])
    assert config.parse_assignments(["prompts.training=a=b.txt"]) == {"prompts.training": "a=b.txt"}


def test_toml_reads_back_the_same(tmp_path: Path) -> None:
    odd = 'quote " backslash \\ tab \t newline \n bell \x07 delete \x7f café 日本'
    built = RunConfig(
        model=replace(ModelConfig(), name=odd),
        prompts=replace(PromptsConfig(), training="C:\\Users\\me\\own.csv"),
        distill=replace(DistillConfig(), learning_rate=1.5e-7, anchors=0),
        seed=42,
    )
    path = tmp_path / "run.toml"
    path.write_text(config.to_toml(built), encoding="utf-8")
    values, preset = config.read_toml(path)
    assert preset == ""
    assert config.build([("file", values)]) == built


def test_every_setting_has_a_unit_and_a_source() -> None:
    for kind in config.SECTIONS.values():
        for item in fields(kind):
            assert item.metadata["unit"] and item.metadata["source"], f"{kind.__name__}.{item.name}"


def test_every_preset_builds() -> None:
    names = config.preset_names()
    assert len(names) >= 5
    for name in names:
        built = config.build([(name, config.preset_values(name))])
        assert built.model.name
        assert config.build([("again", tomllib_values(config.to_toml(built)))]) == built
    quick = config.build([("demo", {**config.preset_values(names[0]), **config.QUICK})])
    assert quick.distill.steps == config.QUICK["distill.steps"]


def test_an_older_name_means_the_newer_one() -> None:
    found = config.build([("an old run", {"direction.strengths": [1.0, 2.0]})])
    assert found.direction.steering_strengths == (1.0, 2.0)


def test_the_default_recipe_is_what_the_defaults_are() -> None:
    values = config.recipe_values("lite")
    assert len(values) > 15 and config.build([("lite", values)]) == config.build([])


def test_the_papers_recipe_is_the_papers() -> None:
    built = config.build([("paper", config.recipe_values("paper"))])
    distill, tokens = built.distill, built.tokens
    assert (tokens.vote, tokens.voters, tokens.count, tokens.samples) == ("ratio", "harmless", 50, 8)
    assert (distill.objective, distill.anchors, distill.completion_tokens) == ("paper", 0, 512)
    assert distill.steps * distill.prompts * distill.rollouts == 800 == 8 * built.prompts.train
    assert (distill.warmup, distill.gradient_clip, distill.reading) == (0.1, 1.0, "random")
    # Qwen's figures unless the preset says what the paper took for its model.
    assert (tokens.horizon, tokens.minimum_probability) == (7, 1e-8)
    llama = config.build([("paper", config.recipe_values("paper", "llama-3-8b"))]).tokens
    assert (llama.horizon, llama.minimum_probability) == (5, 1e-7)
    assert config.build([("preset", config.preset_values("llama-3-8b"))]).tokens == config.TokensConfig()


@pytest.mark.parametrize("name", config.RECIPES)
def test_every_figure_of_a_recipe_has_its_source(name: str) -> None:
    lines = (config.preset_folder() / "recipes" / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    figures = [line for line in lines if "=" in line and not line.startswith("#")]
    assert len(figures) == len(config.recipe_values(name)) - 1
    assert all(line.partition("#")[2].strip() for line in figures)


def test_a_recipe_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(ConfigError) as caught:
        config.recipe_values("papr")
    assert all(name in caught.value.hint for name in config.RECIPES)


def tomllib_values(text: str) -> config.Values:
    problems: list[str] = []
    values = config.flatten(tomllib.loads(text), "text", problems)
    assert not problems
    return values


def test_a_preset_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(ConfigError) as caught:
        config.preset_values("qwen")
    assert all(name in caught.value.hint for name in config.preset_names())


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    for content, told in (
        (b"seed = ", "is not valid TOML"),
        (b"\xff", "cannot be read"),
        (b"seed = 0x" + b"f" * 5000, "got a value of type int"),
        (b"seed = " + b"9" * 5000, "cannot be read"),
        (b"[extra]\nx = 1", r"no section \[extra\]"),
        (b"seed = " + b"[" * 3000, "nested too deeply"),
        (b"x" * (1 << 21), "bytes, more than"),
    ):
        bad.write_bytes(content)
        with pytest.raises(ConfigError, match=told):
            config.build([("file", config.read_toml(bad)[0])])
    with pytest.raises(ConfigError, match="There is no file"):
        config.read_toml(tmp_path / "gone.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.read_toml(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        config.read_toml(Path("a\0b"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes in folders")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.toml")
    with pytest.raises(ConfigError, match="no regular file"):
        config.read_toml(tmp_path / "run.toml")


def test_a_folder_whose_name_is_no_text_is_told_before_anything_is_written() -> None:
    built = RunConfig(prompts=replace(PromptsConfig(), training="/home/caf\udce9/own.txt"))
    with pytest.raises(ConfigError, match="not text in UTF-8"):
        config.to_toml(built)

"""Every setting of a run: frozen dataclasses whose fields know their unit, their source and what they may be."""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from functools import partial
from typing import Any, Literal, get_args

from safesteer_lite.config.setting import Bounds, setting

RECIPES = ("lite", "paper")
"""Ways to distil, each a file of its own beside the presets; the first is the default."""
ContextName = Literal["system", "turns", "role", "agreed", "steps"]
"""Ways of asking a prompt besides asking it plainly (`prompts/contexts.py`)."""
Thinking = Literal["auto", "off", "on"]
"""Whether a model thinks before it answers; `auto` is off wherever its chat template can leave thoughts out."""
_OBJECTIVES = ("paper", "generalized", "rest-bucket", "full", "top-k", "forward")
_expert = partial(setting, expert=True)

_PROMPTS = Bounds(1, 100_000)
_TOKENS = Bounds(1, 32_768)
_SHARE = Bounds(0, 1, above=True)
_BELOW_ONE = Bounds(0, 1, below=True)
_FACTOR = Bounds(0, 1_000_000)


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is loaded."""

    name: str = setting("", "Hub id, local folder or GGUF file", "the user")
    revision: str = setting("", "Hub commit or branch; empty is the default branch", "the user")
    chat_template: str = setting("", "file with a chat template; empty is the model's own", "the user")
    precision: str = setting(
        "nf4", "how weights are kept", "this project: 4 bits fit small cards", ("nf4", "bf16", "fp32")
    )
    device: str = setting("auto", "what it runs on", "cuda where there is one", ("auto", "cpu", "cuda"))
    thinking: Thinking = setting(  # noqa: RUF009  (as every other field here)
        "auto",
        "whether it thinks before it answers; `auto` only where its chat template leaves no choice",
        "docs/method.md, thinking",
        ("auto", "off", "on"),
    )
    thinking_tokens: int = _expert(
        512, "tokens of a thought, at most", "arXiv 2606.02530: as long as a rollout", bounds=_TOKENS
    )
    backend: str = _expert("auto", "library", "Unsloth on long rollouts", ("auto", "plain", "unsloth"))
    unpack: str = _expert("auto", "expand 4-bit weights once", "only on a CPU with room", ("auto", "yes", "no"))


@dataclass(frozen=True)
class PromptsConfig:
    """How many prompts of each set are used, and the user's own."""

    training: str = setting("", "file with harmful prompts; empty is the bundled set", "the user")
    column: str = setting("", "column of that file; empty finds it", "the user")
    folder: str = setting("", "folder with your own sets of all kinds; empty is bundled", "the user")
    direction: int = _expert(128, "harmful and harmless prompts each", "arXiv 2406.11717", bounds=_PROMPTS)
    selection: int = _expert(32, "harmful and harmless prompts each", "arXiv 2406.11717", bounds=_PROMPTS)
    train: int = setting(100, "harmful prompts to train on", "arXiv 2606.02530", bounds=_PROMPTS)
    contrast: int = _expert(
        300, "borderline training prompts among the anchors", "docs/method.md, anchors", bounds=Bounds(0, 100_000)
    )
    test: int = setting(100, "harmful and harmless prompts to measure on, each", "bundled test split", bounds=_PROMPTS)
    borderline_selection: int = _expert(
        30, "borderline prompts and twins, each", "bundled selection split", bounds=_PROMPTS
    )
    critical_selection: int = _expert(
        60,
        "requests for help in danger",
        "docs/results.md, other seeds: 20 were too few to choose by",
        bounds=_PROMPTS,
    )
    borderline_test: int = setting(
        60, "borderline prompts and twins to measure on, each", "bundled test split", bounds=_PROMPTS
    )
    prompt_tokens: int = _expert(512, "tokens, longest prompt", "arXiv 2606.02530", bounds=_TOKENS)


@dataclass(frozen=True)
class DirectionConfig:
    """How the refusal direction and the steering strength are found."""

    source: str = setting("", "model that it is found on, which this one was made from; empty is this one", "the user")
    teacher: str = _expert(
        "steered",
        "what makes the teacher: the direction, or (experimental) a system prompt that it alone reads",
        "arXiv 2606.02530",
        ("steered", "prompted"),
    )
    contrast: str = _expert(
        "requests",
        "difference of harmful and harmless requests, or (experimental) of refusing and complying replies",
        "arXiv 2406.11717",
        ("requests", "responses"),
    )
    refusal_openings: tuple[str, ...] = _expert(
        ("I", "As", "Sorry", "I'm"), "strings", "the authors' Qwen setting", entries=Bounds(1, 100)
    )
    shortlist: int = _expert(
        20,
        "candidates scored in full; 0 scores all",
        "docs/method.md: same choice as the full sweep, 7 times faster",
        bounds=Bounds(0, 100_000),
    )
    kl_limit: float = _expert(0.1, "nats", "arXiv 2406.11717", bounds=Bounds(0, 1_000, above=True))
    steering_strengths: tuple[float, ...] = _expert(
        (1.0, 1.5, 2.0, 2.5, 3.0, 4.0),
        "multiples of r",
        "docs/method.md: 1 can be too weak",
        bounds=Bounds(0, 100, above=True),
        entries=Bounds(1, 20),
    )
    teacher_refusals: float = _expert(
        0.9, "share of held-out harmful prompts", "this project: nearly all", bounds=_SHARE
    )
    minimum_prompts: int = _expert(
        16, "prompts that must pass the filter", "half of the selection split", bounds=_PROMPTS
    )


@dataclass(frozen=True)
class TokensConfig:
    """How safety tokens are voted."""

    vote: str = _expert(
        "mass", "by moved probability, or by log-ratio (paper)", "docs/method.md, safety tokens", ("mass", "ratio")
    )
    voters: str = _expert(
        "harmful",
        "answers whose positions vote: the base's to training prompts, or the teacher's to harmless ones (paper)",
        "docs/method.md, safety tokens",
        ("harmful", "harmless"),
    )
    count: int = _expert(100, "tokens (K)", "docs/method.md, safety tokens; paper 50", bounds=Bounds(1, 100_000))
    ballots: int = _expert(200, "votes a position", "the authors' research scripts", bounds=Bounds(1, 100_000))
    samples: int = _expert(
        1, "continuations a prompt (M)", "docs/method.md, safety tokens; paper 8", bounds=Bounds(1, 1_000)
    )
    horizon: int = _expert(4, "positions (H)", "as a rollout has; paper 7, Llama 5", bounds=Bounds(2, 512))
    minimum_probability: float = _expert(1e-8, "probability (p_min)", "paper, Qwen; Llama 1e-7", bounds=_BELOW_ONE)


@dataclass(frozen=True)
class DistillConfig:
    """The on-policy distillation."""

    objective: str = _expert("rest-bucket", "loss on harmful prompts", "docs/method.md, safety tokens", _OBJECTIVES)
    steps: int = setting(
        8, "optimizer steps", "docs/results.md: 24 were no better by answers; paper 25", bounds=Bounds(1, 10_000)
    )
    prompts: int = setting(
        25, "harmful prompts a step", "docs/method.md, first words; paper 4", bounds=Bounds(1, 10_000)
    )
    rollouts: int = _expert(
        1, "rollouts a harmful prompt", "docs/method.md, first words; paper 8", bounds=Bounds(1, 1_000)
    )
    completion_tokens: int = _expert(4, "tokens a rollout", "docs/method.md, first words; paper 512", bounds=_TOKENS)
    temperature: float = _expert(1.0, "softmax temperature", "arXiv 2606.02530", bounds=Bounds(0, 100))
    anchors: int = _expert(
        64, "harmless prompts a step; 0 is the paper", "docs/method.md, anchors", bounds=Bounds(0, 10_000)
    )
    anchor_mix: str = _expert(
        "even",
        "each kind of anchors equally often, or `pooled`, each as it is",
        "docs/method.md, anchors",
        ("even", "pooled"),
    )
    critical: int = _expert(
        100,
        "requests for help in danger, among the anchors",
        "docs/method.md, anchors",
        bounds=Bounds(0, 100_000),
    )
    twins: int = _expert(
        100,
        "harmless prompts in the words of harmful ones, among the anchors",
        "docs/method.md, anchors",
        bounds=Bounds(0, 100_000),
    )
    contexts: float = _expert(
        0.0,
        "share of the training prompts and anchors that is asked in a context",
        "docs/method.md, anchors",
        bounds=Bounds(0, 1),
    )
    begun: int = _expert(
        0,
        "harmful prompts a step whose answer was begun; 0 is the paper",
        "docs/method.md, begun answers",
        bounds=Bounds(0, 10_000),
    )
    begun_weight: float = _expert(0.15, "factor on their loss", "docs/method.md, begun answers", bounds=_FACTOR)
    anchor_objective: str = _expert("rest-bucket", "loss on anchors", "docs/method.md, safety tokens", _OBJECTIVES)
    anchor_weight: float = _expert(16.0, "factor on their loss", "docs/method.md, anchors", bounds=_FACTOR)
    score_weight: float = _expert(
        0.0,
        "factor on the anchors' rise of the refusal score; 0 is the paper",
        "docs/method.md, anchors",
        bounds=_FACTOR,
    )
    half_life: float = _expert(
        0.5, "tokens after which a position counts half; 0 is the paper", "docs/method.md, first words", bounds=_FACTOR
    )
    averaging: float = _expert(
        0.8,
        "share of the averaged weights kept a step; 0 takes the last ones",
        "docs/method.md, the optimizer",
        bounds=_BELOW_ONE,
    )
    learning_rate: float = setting(
        3e-4, "AdamW peak rate", "docs/method.md, the optimizer; for LoRA, not the paper's", bounds=_SHARE
    )
    adapter_strengths: tuple[float, ...] = _expert(
        (0.5, 2.0, 3.0),
        "factors on the last adapter, tried too",
        "docs/method.md, the adapter's strength",
        bounds=Bounds(0, 3, above=True),
        entries=Bounds(0, 20),
    )
    warmup: float = _expert(0.1, "share of steps", "arXiv 2606.02530", bounds=_BELOW_ONE)
    gradient_clip: float = _expert(1.0, "norm", "arXiv 2606.02530", bounds=Bounds(0, 1_000_000, above=True))
    rank: int = _expert(8, "LoRA r", "docs/method.md, reading directions", bounds=Bounds(1, 1_024))
    lora_alpha: int = _expert(16, "LoRA alpha", "docs/method.md, reading directions", bounds=Bounds(1, 100_000))
    reading: str = _expert(
        "discriminant",
        "what LoRA A reads; `discriminant` computes it and trains B only",
        "docs/method.md, reading directions; paper random",
        ("random", "discriminant"),
    )
    reading_prompts: str = _expert(
        "answered", "harmful prompts it is computed from", "docs/method.md, reading directions", ("answered", "all")
    )
    reading_ridge: float = _expert(
        0.1,
        "share of the mean eigenvalue",
        "docs/method.md, reading directions; not compared",
        bounds=Bounds(0, 1_000, above=True),
    )
    reading_unread: float = _expert(
        0.0,
        "share of what harmless text moves in that no direction reads; 0 for none",
        "docs/method.md, reading directions",
        bounds=Bounds(0, 1, below=True),
    )
    depth_start: float = _expert(
        0.33,
        "share of the depth below the lowest adapted block",
        "docs/method.md, reading directions; not compared",
        bounds=_BELOW_ONE,
    )
    micro_batch: int = setting(
        16, "rollouts a forward, at most", "used by the demo; not compared", bounds=Bounds(1, 100_000)
    )
    chunk: int = setting(
        64, "positions whose logits exist at a time", "used by the demo; not compared", bounds=Bounds(1, 1_000_000)
    )
    checkpointing: str = _expert(
        "auto", "run adapted blocks again in backward", "on CUDA, where memory is short", ("auto", "yes", "no")
    )
    save_every: int = _expert(
        4, "steps between saved steps", "at most 3 steps are done again", bounds=Bounds(1, 10_000)
    )


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured, when, and what counts as too much."""

    every: int = _expert(
        0,
        "steps between measurements on the selection split; 0 measures the last step only",
        "docs/method.md, the adapter's strength",
        bounds=Bounds(0, 10_000),
    )
    selection_tokens: int = _expert(24, "tokens an answer while training", "openings decide", bounds=_TOKENS)
    answer_tokens: int = setting(
        96, "tokens an answer at the end", "docs/method.md, what is measured: the judge reads openings", bounds=_TOKENS
    )
    contexts: tuple[str, ...] = setting(
        get_args(ContextName),
        "contexts in which test prompts are asked too; empty for none",
        "docs/method.md, contexts",
        get_args(ContextName),
        entries=Bounds(0, len(get_args(ContextName))),
    )
    context_prompts: int = _expert(
        12, "test prompts of each kind in each context, at most", "docs/method.md, contexts", bounds=_PROMPTS
    )
    context_tokens: int = _expert(48, "tokens an answer in a context", "docs/method.md, contexts", bounds=_TOKENS)
    kl_tokens: int = _expert(
        48, "tokens of a harmless answer", "docs/method.md, what is measured: over whole answers", bounds=_TOKENS
    )
    tax_budget: float = setting(
        2.0, "points of over-refusal above the base", "this project: +2 points", bounds=Bounds(0, 100)
    )
    judge: str = _expert(
        "openings",
        "who judges the answers besides the opening phrases, once they are all there",
        "docs/method.md, judges",
        ("openings", "classifier", "guard", "endpoint"),
    )
    judge_model: str = _expert(
        "", "Hub id, folder, or the endpoint's name for its model; empty is the judge's own", "the user"
    )
    judge_url: str = _expert("", "where an OpenAI-compatible endpoint answers", "the user")


@dataclass(frozen=True)
class ExportConfig:
    """What is written at the end."""

    weights: str = setting(
        "original", "16-bit base that the adapter is merged into", "docs/export.md", ("original", "dequantised")
    )


@dataclass(frozen=True)
class ParentConfig:
    """The run whose adapter the training begins from; written by `continue`, and empty in a run that begins from its base."""

    run: str = _expert("", "name of the run", "the user")
    adapter: str = _expert("", "SHA-256 of its adapter's weights", "that run")
    steps: int = _expert(0, "optimizer steps since the base", "that run and its own parents", bounds=Bounds(0, 10**9))


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    direction: DirectionConfig = field(default_factory=DirectionConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    parent: ParentConfig = field(default_factory=ParentConfig)
    recipe: str = setting("lite", "the recipe that these settings began from", "docs/method.md", RECIPES)
    seed: int = setting(0, "seed of every random choice", "the user", bounds=Bounds(0, 2**32 - 1))


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "prompts": PromptsConfig,
    "direction": DirectionConfig,
    "tokens": TokensConfig,
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "parent": ParentConfig,
}


def known_settings() -> dict[str, Field[Any]]:
    """Every setting by its dotted name."""
    alone = {item.name: item for item in fields(RunConfig) if item.name not in SECTIONS}
    inside = {f"{section}.{item.name}": item for section, kind in SECTIONS.items() for item in fields(kind)}
    return alone | inside

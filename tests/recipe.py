"""A recipe of a few small steps on whole distributions, which tests and benchmarks change where they need another."""

from __future__ import annotations

from safesteer_lite.method.distill import Recipe

RECIPE = Recipe(
    objective="full",
    top_k=8,
    steps=6,
    prompts=2,
    rollouts=4,
    completion_tokens=8,
    temperature=1.0,
    anchors=0,
    anchor_objective="full",
    anchor_weight=1.0,
    half_life=0.0,
    score_weight=0.0,
    averaging=0.0,
    learning_rate=1e-2,
    warmup=0.1,
    gradient_clip=1.0,
    micro_batch=8,
    chunk=16,
    seed=1,
)

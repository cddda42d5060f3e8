"""What limits the trade-off: can harmful prompts be told from borderline ones at all, by what this model computes?

For each layer, a ridge probe on the block input is fitted to harmful against harmless direction prompts, with and without the
borderline TRAINING prompts, and scored on the test splits. A student that learns from the same prompts can hardly do better.

    python -m tests.benchmarks.probes [MODEL_FOLDER] [name=value ...]
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from safesteer_lite.prompts.plan import texts
from safesteer_lite.prompts.sets import Kind, prompt_set
from safesteer_lite.stages.contrast import read
from tests.benchmarks.common import say, session

_RIDGE = 2.0


def fit(positive: Tensor, negative: Tensor) -> Tensor:
    """A ridge probe, (width,); both arguments are (prompts, width)."""
    rows = torch.cat([positive, negative])
    rows = rows - rows.mean(0)
    labels = torch.cat([torch.ones(len(positive)), -torch.ones(len(negative))])
    width = rows.shape[1]
    ridge = _RIDGE * rows.pow(2).sum() / width * torch.eye(width)
    return torch.linalg.solve(rows.T @ rows + ridge, rows.T @ labels)


def area(positive: Tensor, negative: Tensor) -> float:
    """Area under the ROC curve: how often a positive scores above a negative."""
    return float((positive[:, None] > negative[None]).float().mean())


def main() -> None:
    """Print a table."""
    work = session(sys.argv[1:])
    policy = work.policy
    refusal = policy.token_ids(work.config.direction.refusal_openings)

    def activations(kind: Kind, split: str) -> Tensor:
        return read(policy, texts(prompt_set(kind, split)), refusal, lambda done: None).activations.values

    harmful, harmless = activations("harmful", "direction"), activations("harmless", "direction")
    contrast = activations("borderline", "train")
    tests = {
        "harmful": activations("harmful", "test"),
        "borderline": activations("borderline", "test"),
        "harmless": activations("harmless", "test"),
    }
    say("position layer | AUC harmful/borderline, harmful/harmless | the same with borderline training prompts")
    for position in range(harmful.shape[1]):
        for layer in range(harmful.shape[2] // 3, harmful.shape[2]):
            figures = []
            for negative in (harmless[:, position, layer], torch.cat([harmless, contrast])[:, position, layer]):
                probe = fit(harmful[:, position, layer], negative)
                scores = {name: values[:, position, layer] @ probe for name, values in tests.items()}
                figures += [area(scores["harmful"], scores[other]) for other in ("borderline", "harmless")]
            say(f"{position - harmful.shape[1]:3} {layer:3} | " + " ".join(f"{figure:.3f}" for figure in figures))


if __name__ == "__main__":
    main()

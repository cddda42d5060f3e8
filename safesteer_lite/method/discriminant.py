"""What a LoRA adapter should read: the directions that set harmful prompts apart from harmless ones.

An adapter that begins with random reading directions first learns to refuse everything a little, and over-refusal comes
before discrimination (docs/results.md). Reading directions that are nearly zero on all harmless text, and
are not on harmful prompts, can be computed beforehand in closed form; training then only has to learn what to write.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ridge_discriminants(harmless: Tensor, contrasts: Tensor, ridge: float) -> Tensor:
    """Directions that answer to `contrasts` and as little as possible to harmless text.

    Row i is `(M + ridge * trace(M) / width * I)^-1 contrasts[i]` with `M` the second moment of the harmless activations
    about zero: Fisher's linear discriminant, but about zero, so that a direction is small on harmless text instead of
    merely constant there. With fewer activations than dimensions the inverse is taken in the smaller space.

    Args:
        harmless: (tokens, width) activations of harmless text, float32.
        contrasts: (rows, width) float32, harmful minus harmless mean activations.
        ridge: strength of the regularisation, relative to the mean eigenvalue of `M`; above 0.

    Returns:
        (rows, width) float32.
    """
    tokens, width = harmless.shape
    ridge = ridge * float(harmless.pow(2).sum()) / tokens / width
    if width <= tokens:
        moment = harmless.T @ harmless / tokens
        moment.diagonal().add_(ridge)
        return torch.linalg.solve(moment, contrasts.T).T
    # Woodbury's identity.
    gram = harmless @ harmless.T
    gram.diagonal().add_(tokens * ridge)
    return (contrasts - torch.linalg.solve(gram, harmless @ contrasts.T).T @ harmless) / ridge


def reading_directions(harmful: Tensor, harmless: Tensor, harmless_tokens: Tensor, ridge: float) -> Tensor:
    """One reading direction for each position of a prompt's end.

    Args:
        harmful: (prompts, positions, width) activations at the last positions of harmful prompts, nan where there is no
            token.
        harmless: the same of harmless prompts.
        harmless_tokens: (tokens, width) activations at any position of harmless text.
        ridge: see `ridge_discriminants`.

    Returns:
        (positions, width) float32, so long that on harmful prompts, at its own position, each answers with the root mean
        square of the activations themselves; zero rows for positions that no prompt has.
    """
    contrasts = (harmful.nanmean(0) - harmless.nanmean(0)).nan_to_num()
    directions = ridge_discriminants(harmless_tokens, contrasts, ridge)
    answers = (harmful * directions).sum(-1).pow(2).nanmean(0).sqrt()
    usual = harmless_tokens.pow(2).mean().sqrt()
    return directions * (usual / answers.nan_to_num().clamp_min(1e-12)).unsqueeze(-1)

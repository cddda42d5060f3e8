"""What a LoRA adapter should read: the directions that set harmful prompts apart from harmless ones.

An adapter that begins with random reading directions first learns to refuse everything a little, and over-refusal comes
before discrimination (docs/results.md). Reading directions that are nearly zero on all harmless text, and
are not on harmful prompts, can be computed beforehand in closed form; training then only has to learn what to write.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def without_leading(harmless: Tensor, contrasts: Tensor, share: float) -> Tensor:
    """`contrasts` without their part in the space that harmless text mostly moves in.

    That space is of the leading eigenvectors of the second moment about zero, as few of them as hold `share` of its trace. What
    is left of a contrast answers to harmless text with no more than the rest of it, however large the contrast is within.

    Args:
        harmless: (tokens, width) activations of harmless text, float32.
        contrasts: (rows, width) float32.
        share: above 0 and below 1.

    Returns:
        (rows, width) float32.
    """
    tokens, width = harmless.shape
    # Of the two products with itself the smaller has all eigenvalues that are not zero.
    values, vectors = torch.linalg.eigh(harmless.T @ harmless if width <= tokens else harmless @ harmless.T)
    falling = values.flip(0).clamp_min(0)
    count = int((falling.cumsum(0) < share * falling.sum()).sum()) + 1
    values, vectors = values[-count:], vectors[:, -count:]
    if width <= tokens:
        return contrasts - contrasts @ vectors @ vectors.T
    return contrasts - (contrasts @ harmless.T @ vectors / values) @ vectors.T @ harmless


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
    ridge = ridge * float(torch.linalg.vector_norm(harmless)) ** 2 / tokens / width
    if width <= tokens:
        moment = harmless.T @ harmless / tokens
        moment.diagonal().add_(ridge)
        return torch.linalg.solve(moment, contrasts.T).T
    # Woodbury's identity.
    gram = harmless @ harmless.T
    gram.diagonal().add_(tokens * ridge)
    return (contrasts - torch.linalg.solve(gram, harmless @ contrasts.T).T @ harmless) / ridge


class RunningMean:
    """The mean of activations that come batch by batch, so that only their sum is kept, in float64 on the CPU."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count: Tensor | float = 0.0

    def add(self, activations: Tensor) -> None:
        """Take in a batch, (prompts, positions, width) on any device, nan where there is no token."""
        self._sum = activations.float().nansum(0).double().cpu() + self._sum
        self._count = (~activations[..., :1].isnan()).sum(0).cpu() + self._count

    @property
    def value(self) -> Tensor:
        """(positions, width) float64 on the CPU; nan at positions that no prompt had."""
        return torch.as_tensor(self._sum / self._count)


def reading_directions(
    harmful: Sequence[Tensor], harmless_mean: Tensor, harmless_tokens: Tensor, ridge: float, unread: float = 0.0
) -> Tensor:
    """One reading direction for each position of a prompt's end.

    Args:
        harmful: batches of (prompts, positions, width) activations at the last positions of harmful prompts, nan where
            there is no token; any dtype, on any device. One batch at a time is taken to where `harmless_tokens` are.
        harmless_mean: (positions, width) float64 on the CPU, the mean of the same of harmless prompts.
        harmless_tokens: (tokens, width) float32 activations at any position of harmless text, where the work is done.
        ridge: see `ridge_discriminants`.
        unread: share of harmless text that no direction reads, see `without_leading`; 0 for none.

    Returns:
        (positions, width) float32, so long that on harmful prompts, at its own position, each answers with the root mean
        square of the activations themselves; zero rows for positions that no prompt has.
    """
    device, mean = harmless_tokens.device, RunningMean()
    for activations in harmful:
        mean.add(activations)
    contrasts = (mean.value - harmless_mean).nan_to_num().float().to(device)
    if unread:
        contrasts = without_leading(harmless_tokens, contrasts, unread)
    directions = ridge_discriminants(harmless_tokens, contrasts, ridge)
    squares = RunningMean()
    for activations in harmful:
        answers = torch.einsum("npw,pw->np", activations.to(device).float(), directions)
        squares.add(answers.pow(2).unsqueeze(-1))
    usual = torch.linalg.vector_norm(harmless_tokens) / harmless_tokens.numel() ** 0.5
    return directions * (usual / squares.value.sqrt().nan_to_num().clamp_min(1e-12).to(directions))

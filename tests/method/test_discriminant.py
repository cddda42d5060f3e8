"""Reading directions: closed forms against plain algebra, and planted truth."""

from __future__ import annotations

import pytest
import torch

from safesteer_lite.method.discriminant import (
    RunningMean,
    reading_directions,
    ridge_discriminants,
    without_leading,
)


@pytest.mark.parametrize("tokens", [7, 40])
def test_ridge_discriminants_are_those_of_plain_algebra(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    harmless, contrasts = torch.randn(tokens, 12, generator=generator), torch.randn(3, 12, generator=generator)
    moment = (harmless.double().T @ harmless.double()) / tokens
    whole = moment + 0.2 * moment.trace() / 12 * torch.eye(12, dtype=torch.float64)
    expected = (torch.linalg.inv(whole) @ contrasts.double().T).T
    torch.testing.assert_close(ridge_discriminants(harmless, contrasts, 0.2).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [7, 40])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_what_is_left_of_a_contrast_answers_to_the_rest_of_harmless_text_alone(tokens: int, share: float) -> None:
    """Against the eigenvectors of the second moment itself, in float64."""
    generator = torch.Generator().manual_seed(tokens)
    harmless = torch.randn(tokens, 12, generator=generator) * torch.arange(1, 13)
    contrasts = torch.randn(3, 12, generator=generator)
    values, vectors = torch.linalg.eigh(harmless.double().T @ harmless.double())
    held, kept = 0.0, vectors
    while held < share * float(values.sum()):
        held += float(values[kept.shape[1] - 1])
        kept = kept[:, :-1]
    assert 0 < kept.shape[1] < 12
    found = without_leading(harmless, contrasts, share).double()
    torch.testing.assert_close(found, contrasts.double() @ kept @ kept.T, rtol=1e-3, atol=1e-3)


def test_a_direction_within_what_harmless_text_moves_in_is_not_read_however_large_it_is() -> None:
    harmful, harmless, tokens = planted()
    loud = torch.eye(10)[0]
    read, unread = (reading_directions([harmful], mean_of(harmless), tokens, 1.0, share) for share in (0.0, 0.8))
    for with_it, without in zip(read, unread, strict=True):
        assert abs(float(with_it @ loud)) > 0.1 * float(with_it.norm())
        assert abs(float(without @ loud)) < 0.02 * float(without.norm())


def planted() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Harmful and harmless activations that differ most along a direction in which all harmless text varies, and a little
    along another in which it does not vary at all."""
    generator = torch.Generator().manual_seed(1)
    loud, quiet = torch.eye(10)[0], torch.eye(10)[9]
    basis = torch.diag(torch.tensor([8.0] + [1.0] * 8 + [0.0]))
    tokens = torch.randn(400, 10, generator=generator) @ basis
    harmful = torch.randn(50, 2, 10, generator=generator) @ basis + 4 * loud + 1.0 * quiet
    harmless = torch.randn(60, 2, 10, generator=generator) @ basis
    return harmful, harmless, tokens


def test_directions_read_what_harmless_text_does_not_vary_in() -> None:
    harmful, harmless, tokens = planted()
    directions = reading_directions([harmful], mean_of(harmless), tokens, 0.001)
    mean_difference = harmful.mean((0, 1)) - harmless.mean((0, 1))
    assert int(mean_difference.abs().argmax()) == 0
    for position, direction in enumerate(directions):
        assert int(direction.abs().argmax()) == 9
        on_harmful, on_harmless = harmful[:, position] @ direction, tokens @ direction
        assert float(on_harmful.pow(2).mean().sqrt()) == pytest.approx(float(tokens.pow(2).mean().sqrt()), rel=1e-4)
        assert float(on_harmless.pow(2).mean().sqrt()) < 0.1 * float(on_harmful.mean())


def test_positions_without_a_token_do_not_count() -> None:
    harmful, harmless, tokens = planted()
    expected = reading_directions([harmful[:30]], mean_of(harmless), tokens, 0.1)
    harmful[30:, 0] = float("nan")
    found = reading_directions([harmful], mean_of(harmless), tokens, 0.1)
    torch.testing.assert_close(found[0], expected[0])
    harmful[:, 1] = float("nan")
    assert reading_directions([harmful], mean_of(harmless), tokens, 0.1)[1].tolist() == [0.0] * 10


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 20), (torch.bfloat16, 20), (torch.bfloat16, 300)])
def test_batch_by_batch_they_are_those_of_all_activations_at_once_in_float64(dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    harmful, harmless = torch.randn(2, 90, 3, width, generator=generator).to(dtype)
    tokens = torch.randn(200, width, generator=generator).to(dtype)
    harmful[:20, 0] = harmless[50:, 2] = float("nan")
    harmful += 0.3
    found = reading_directions(list(harmful.split(32)), mean_of(harmless), tokens.float(), 0.1)
    torch.testing.assert_close(found.double(), in_float64(harmful, harmless, tokens), rtol=1e-4, atol=1e-4)


def mean_of(activations: torch.Tensor) -> torch.Tensor:
    mean = RunningMean()
    for batch in activations.split(7):
        mean.add(batch)
    return mean.value


def in_float64(harmful: torch.Tensor, harmless: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The formula of docs/method.md, from everything at once."""
    harmful, harmless, tokens = harmful.double(), harmless.double(), tokens.double()
    moment = tokens.T @ tokens / len(tokens)
    moment += 0.1 * moment.trace() / len(moment) * torch.eye(len(moment), dtype=torch.float64)
    directions = torch.linalg.solve(moment, (harmful.nanmean(0) - harmless.nanmean(0)).T).T
    answers = (harmful * directions).sum(-1).pow(2).nanmean(0).sqrt()
    return directions * (tokens.pow(2).mean().sqrt() / answers).unsqueeze(-1)

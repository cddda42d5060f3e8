"""Grouped attention is transformers' own without the copies; the cache is its own without the moves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask

from safesteer_lite.method import policies
from safesteer_lite.models import attention, sampling
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.cache_layer import RoomyLayer
from tests import tiny
from tests.sources.test_folder import edit

LOWEST = torch.finfo(torch.float32).min


class Layer(nn.Module):
    """What an attention function is told of the layer it works for."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def padded(rows: int, queries: int, keys: int) -> Tensor:
    """Causal, (rows, 1, queries, keys), with `row` keys of padding on the left of each row: whole rows see nothing."""
    places = torch.arange(keys)
    causal = places[None, :] <= places[keys - queries :, None]
    return torch.stack([causal & (places >= row) for row in range(rows)]).unsqueeze(1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (6, 6), (3, 9)])
@pytest.mark.parametrize("groups", [1, 2, 7])
def test_attention_and_its_gradients_are_those_of_expanded_keys(
    groups: int, queries: int, keys: int, masked: bool
) -> None:
    if not masked and 1 < queries < keys:
        pytest.skip(
            "without a mask, transformers lets several queries see either all that came before or nothing of it"
        )
    rows, key_heads, size = 4, 2, 8
    inputs = [
        drawn((rows, key_heads * groups, queries, size), 0),
        drawn((rows, key_heads, keys, size), 1),
        drawn((rows, key_heads, keys, size), 2),
    ]
    visible = padded(rows, queries, keys) if masked else None
    # Rows without anything to see are left out of the comparison: they may hold anything that is finite.
    counted = visible.any(-1).squeeze(1) if visible is not None else torch.ones(rows, queries, dtype=torch.bool)
    additive = None if visible is None else torch.zeros(visible.shape).masked_fill(~visible, LOWEST)
    found = []
    for function in (attention.attend, AttentionInterface()["sdpa"]):
        query, key, value = inputs
        output: Tensor = function(Layer(groups), query, key, value, additive, scaling=0.3)[0]
        assert output.shape == (rows, queries, key_heads * groups, size) and bool(output.isfinite().all())
        gradients = torch.autograd.grad(output[counted].square().sum(), inputs)
        found.append([output[counted], *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def log_probabilities(policy: Policy, implementation: str) -> Tensor:
    """What the student expects after each token of a padded batch, its own positions only."""
    batch = tiny.prompt_batch(policy)
    policy.model.causal.set_attn_implementation(implementation)
    hidden = policy.model.final(policy.model.start(policies.Batch(batch.input_ids, batch.attention_mask)))
    assert bool(hidden.isfinite().all()), "padding has become something that is not a number"
    found: Tensor = policy.model.logits(hidden[batch.attention_mask > 0]).log_softmax(-1)
    return found


@pytest.mark.parametrize("architecture", [*tiny.ARCHITECTURES, *tiny.FURTHER])
def test_a_model_computes_the_same_and_learns_the_same(architecture: str, tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy(architecture, filled=True)
    assert policy.model.causal.config._attn_implementation == attention.GROUPED
    found = []
    for implementation in (attention.GROUPED, "eager"):
        expected = log_probabilities(policy, implementation)
        gradients = torch.autograd.grad(expected.exp().square().sum(), policy.model.parameters_to_train())
        found.append([expected, *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_sliding_window_is_kept_while_decoding(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Mistral's first release sees so many tokens and no more; the window is shorter than every prompt here."""
    drawn = {}
    for window in (6, None):
        folder = shutil.copytree(tiny_folder("mistral"), tmp_path / str(window))
        edit("config.json", sliding_window=window)(folder)
        policy = tiny.load_policy(folder, "fp32")
        batch = tiny.prompt_batch(policy)
        for implementation in (attention.GROUPED, "sdpa"):
            policy.model.causal.set_attn_implementation(implementation)
            drawn[window, implementation] = policy.model.generate(batch, 12, 0.0, None, 1).tokens.tolist()
    assert drawn[6, attention.GROUPED] == drawn[6, "sdpa"] != drawn[None, attention.GROUPED]


def test_the_mask_of_a_step_is_made_without_asking_the_device(tiny_policy: tiny.Loader) -> None:
    """Unpadded, transformers would look at the mask's values to leave it out; a step has one mask either way."""
    policy = tiny_policy()
    config: Any = policy.model.causal.config
    for padding in (0, 3):
        seen = torch.ones(2, 9, dtype=torch.long)
        seen[0, :padding] = 0
        layer = RoomyLayer()
        layer.update(torch.zeros(2, 2, 8, 4), torch.zeros(2, 2, 8, 4))
        cache = sampling.GrowingCache().given
        cache.layers.append(layer)
        mask = create_causal_mask(config, torch.zeros(2, 1, 4), seen, cache)
        expected = torch.zeros(2, 1, 2, 9).masked_fill(seen[:, None, None, :] == 0, LOWEST)
        assert mask is not None and torch.equal(mask, expected)


def test_the_cache_is_transformers_own_without_moving_at_every_token() -> None:
    ours, theirs = RoomyLayer(), DynamicLayer()
    rows, moves, place = 2, 0, 0

    def add(tokens: int) -> None:
        nonlocal moves, place
        states = [torch.randn(rows, 3, tokens, 4) for _ in "kv"]
        for one, other in zip(ours.update(*states), theirs.update(*states), strict=True):
            assert torch.equal(one, other)
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
        moves += ours.keys.data_ptr() != place
        place = ours.keys.data_ptr()

    add(5)
    for layer in (ours, theirs):
        layer.batch_repeat_interleave(3)
    rows = 6
    add(7)
    for _ in range(40):
        add(1)
    for layer in (ours, theirs):
        layer.batch_select_indices(torch.tensor([4, 0]))
    rows = 2
    for _ in range(40):
        add(1)
    assert ours.get_seq_length() == 92 and moves <= 6


def test_an_empty_cache_has_nothing_to_repeat() -> None:
    layer = RoomyLayer()
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0]))
    assert layer.get_seq_length() == 0

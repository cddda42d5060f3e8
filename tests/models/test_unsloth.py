"""What of the Unsloth backend can be tested without a card: its cache, the order of imports, and what is said of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from safesteer_lite.errors import ModelError, SelfCheckError
from safesteer_lite.method import policies
from safesteer_lite.method.policies import Steering
from safesteer_lite.models import unsloth
from safesteer_lite.models.adapter import Adapter
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.reply import Reply
from safesteer_lite.models.sampling import GrowingCache
from safesteer_lite.models.selfcheck import self_check
from safesteer_lite.models.unsloth import PairCache
from safesteer_lite.sources.base import open_base
from tests import REPOSITORY, tiny
from tests.models import pair_blocks
from tests.models.pair_blocks import as_unsloth

Pair = tuple[Policy, Policy]


@pytest.fixture(params=tiny.ARCHITECTURES)
def both(request: pytest.FixtureRequest, tiny_policy: tiny.Loader) -> Pair:
    """The same weights on the plain backend, and on Unsloth's with blocks that are called as Unsloth's are."""
    plain, other = (tiny_policy(request.param, "fp32", filled=True) for _ in range(2))
    return plain, as_unsloth(other)


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_forwards_and_gradients_are_the_plain_backends(both: Pair, shared_prefix: bool) -> None:
    """Also with blocks run again in backward, and for the teacher."""
    found = []
    for policy in both:
        model, batch = policy.model, tiny.prompt_batch(policy)
        batch = batch if shared_prefix else replace(batch, prefix=0)
        model.checkpointing = policy is both[1]
        loss = policies.last_logits(model, batch).square().mean()
        found.append([loss, *torch.autograd.grad(loss, model.parameters_to_train())])
        with torch.no_grad(), policies.teacher(model, Steering(2, tiny.vector(0.5))):
            found[-1].append(policies.last_logits(model, batch))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4 * float(one.detach().abs().max()))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_steered_or_not_draws_the_plain_backends_tokens(both: Pair, temperature: float) -> None:
    drawn = []
    for policy in both:
        model, batch = policy.model, tiny.prompt_batch(policy)
        # Rows end at different lengths, so that some leave the cache.
        model.end_of_turn = frozenset(range(0, 320, 9))
        drawn.append([model.generate(batch, 12, temperature, torch.Generator().manual_seed(4), 3)])
        with policies.teacher(model, Steering(1, tiny.vector(1.0))):
            drawn[-1].append(model.generate(batch, 12, temperature, torch.Generator().manual_seed(4), 3))
    for one, two in zip(*drawn, strict=True):
        assert torch.equal(one.tokens, two.tokens) and torch.equal(one.mask, two.mask)
    assert not torch.equal(drawn[0][0].tokens, drawn[0][1].tokens)


def test_the_self_check_passes_and_a_chat_says_the_same(both: Pair) -> None:
    said = []
    for policy in both:
        reply = Reply(policy, [{"role": "user", "content": "Say hello."}], 8, 0.0, 0)
        while not reply.done:
            reply.step()
        said.append(reply.text)
    assert said[0] == said[1]
    for parameter in both[1].model.parameters_to_train():
        parameter.data.zero_()
    # A fresh adapter has A, and B is zero.
    tiny.fill_adapter(both[1].model, scale=0.0)
    for name, parameter in both[1].model.network.named_parameters():
        if "lora_A" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    assert len(self_check(both[1])) == 6


def test_the_self_check_sees_attention_to_later_tokens(
    tiny_policy: tiny.Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some kernels are not causal where they get no mask: alone, a prompt would then read otherwise than padded."""
    policy = as_unsloth(tiny_policy("llama", "fp32"))
    known = pair_blocks.additive_mask

    def careless(mask: Tensor, length: int, behind: int, dtype: torch.dtype) -> Tensor | None:
        if bool(mask.all()):
            return torch.zeros(1, 1, length, mask.shape[1], dtype=dtype)
        return known(mask, length, behind, dtype)

    monkeypatch.setattr(pair_blocks, "additive_mask", careless)
    with pytest.raises(SelfCheckError, match="padding changes"):
        self_check(policy)


def test_pairs_are_repeated_and_kept_like_transformers_own_cache() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs, growing = PairCache(), GrowingCache()
    layers = [
        (torch.randn(3, 2, 5, 4, generator=generator), torch.randn(3, 2, 5, 4, generator=generator)) for _ in "ab"
    ]
    pairs.take(SimpleNamespace(past_key_values=tuple(layers)))
    for layer, (keys, values) in enumerate(layers):
        growing.given.update(keys, values, layer)
    for cache in (pairs, growing):
        cache.repeat(2)
        cache.keep(torch.tensor([0, 3, 5]))
    assert pairs.given is not None
    for (keys, values), known in zip(pairs.given, growing.given.layers, strict=True):
        assert torch.equal(keys, known.keys) and torch.equal(values, known.values)
        assert keys.shape == (3, 2, 5, 4)


def test_the_process_that_trains_leaves_transformers_for_unsloth_to_change() -> None:
    code = "import sys, safesteer_lite.stages.trainer; sys.exit('transformers' in sys.modules or 'peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_unsloth_is_not_loaded_after_transformers(tiny_folder: Callable[[str], Path]) -> None:
    """This process has imported transformers, and Unsloth would change it too late."""
    assert "transformers" in sys.modules and "unsloth" not in sys.modules
    with pytest.raises(ModelError, match="before transformers"):
        unsloth.load(open_base(tiny_folder("llama")), "nf4", Adapter(4, 8), 0)

"""The start-up check refuses models that are broken the way a wrong backend would break them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safesteer_lite.errors import SelfCheckError
from safesteer_lite.method.policies import Batch, Chance, Completions, Residual
from safesteer_lite.models import plain, selfcheck
from safesteer_lite.models.adapter import Adapter, with_adapter
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.loaded import PlainModel
from safesteer_lite.models.sampling import Ended
from safesteer_lite.models.selfcheck import self_check
from safesteer_lite.sources.base import open_base
from tests import planted, tiny


def rebuilt(policy: Policy, kind: type[PlainModel]) -> Policy:
    """The same network behind another class of model."""
    return Policy(kind(policy.model.network, policy.tokenizer, 0), policy.prompt_tokens)


class SamplesElsewhere(PlainModel):
    """Sampling runs through another decoder than everything else."""

    def other_decoder(self) -> Any:
        raise NotImplementedError

    def generate(
        self,
        prompts: Batch,
        max_new_tokens: int,
        temperature: float,
        chance: Chance,
        repeats: int,
        ended: Ended | None = None,
        first: Callable[[Tensor], None] | None = None,
    ) -> Completions:
        own, self.decoder = self.decoder, self.other_decoder()
        try:
            return super().generate(prompts, max_new_tokens, temperature, chance, repeats, ended, first)
        finally:
            self.decoder = own


class SamplesFromACopy(SamplesElsewhere):
    """Sampling runs on weights of its own, which no hook ever sees: the teacher would be the base."""

    def other_decoder(self) -> Any:
        decoder = copy.deepcopy(self.decoder)
        for block in decoder.layers:
            block._forward_pre_hooks.clear()
            block._forward_pre_hooks_with_kwargs.clear()
        return decoder


class DecodesPastTheHooks(SamplesElsewhere):
    """The prompt is read with hooks, and each further token without: what Unsloth's fast decoding does."""

    def other_decoder(self) -> Any:
        def bypass(block: Any) -> Callable[..., Any]:
            call = block.__call__

            def forward(hidden: Tensor, **arguments: Any) -> Any:
                return (call if hidden.shape[1] > 1 else block.forward)(hidden, **arguments)

            return forward

        decoder = copy.copy(self.decoder)
        decoder._modules = dict(self.decoder._modules)
        decoder._modules["layers"] = nn.ModuleList(_Calls(bypass(block)) for block in self.decoder.layers)
        return decoder


class _Calls(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, hidden: Tensor, **arguments: Any) -> Any:
        return self.function(hidden, **arguments)


class AdapterStaysOn(PlainModel):
    """Switching the adapter off does nothing: the teacher would drift along with the student."""

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        yield


class ForgetsTheMask(PlainModel):
    """Running the blocks one by one loses the positions that the decoder prepares."""

    def start(self, batch: Batch) -> Residual:
        residual = super().start(batch)
        ((kind, given),) = residual.arguments.items()
        shifted = tuple(part.roll(1, dims=1) for part in given["position_embeddings"])
        return Residual(residual.hidden, 0, {kind: {**given, "position_embeddings": shifted}})


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (SamplesFromACopy, "sampling"),
        (DecodesPastTheHooks, "sampling"),
        (AdapterStaysOn, "adapter"),
        (ForgetsTheMask, "one by one"),
    ],
)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_wrong_backend_is_refused(
    kind: type[PlainModel], problem: str, architecture: str, tiny_policy: tiny.Loader
) -> None:
    policy = rebuilt(tiny_policy(architecture), kind)
    with pytest.raises(SelfCheckError, match=problem) as caught:
        self_check(policy)
    assert "Nothing was trained" in caught.value.hint


def test_blocks_that_the_decoder_does_not_call_are_refused(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy()
    stale = copy.copy(policy.model.layers[2])
    stale._forward_pre_hooks = copy.copy(stale._forward_pre_hooks)
    stale._forward_pre_hooks_with_kwargs = copy.copy(stale._forward_pre_hooks_with_kwargs)
    policy.model.layers[2] = stale
    with pytest.raises(SelfCheckError, match="fired 0 times"):
        self_check(policy)


def test_a_block_that_ignores_what_the_hook_returns_is_refused(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy()
    block: Any = policy.model.layers[2]
    block.register_forward_hook(lambda _, __, output: output * 0)
    with pytest.raises(SelfCheckError, match="does not move the logits"):
        self_check(policy)


@pytest.mark.parametrize("precision", ["fp32", "nf4-packed"])
def test_an_adapter_whose_gradients_are_cut_is_refused(precision: str, tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy(precision=precision)
    # Unsloth's blocks return a tuple.
    policy.model.layers[1].register_forward_hook(
        lambda _, __, output: (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()
    )
    with pytest.raises(SelfCheckError, match=r"14 adapted layers receive no gradient.*layers\.0\."):
        self_check(policy)


def test_a_small_adapter_is_not_taken_for_the_rounding_of_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged as on a card: there this model's first trial of an adapter moves the logits by just under 0.001 nats."""
    monkeypatch.setattr(selfcheck, "same_logits", selfcheck.within_rounding)
    base = open_base(planted.build(tmp_path / "planted"))
    network, tokenizer = plain.load(base, precision="bf16", device="cpu", unpack=False)
    policy = Policy(with_adapter(network, tokenizer, Adapter(16, 32), 0), 128)
    kept = [parameter.detach().clone() for parameter in policy.model.parameters_to_train()]
    assert len(self_check(policy)) == 6
    assert all(torch.equal(*pair) for pair in zip(policy.model.parameters_to_train(), kept, strict=True))


def test_an_adapter_that_never_changes_the_model_is_refused(
    tiny_policy: tiny.Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selfcheck, "same_logits", selfcheck.within_rounding)
    policy = tiny_policy()
    for module in policy.model.network.modules():
        scaling: Any = getattr(module, "scaling", None)
        if isinstance(scaling, dict):  # Attention has a number of that name.
            scaling.update(dict.fromkeys(scaling, 0.0))
    with pytest.raises(SelfCheckError, match="the adapter does not change the model"):
        self_check(policy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["decoder.embed_tokens", "decoder.norm", "causal.lm_head"])
def test_a_model_that_is_not_finite_is_told_so_and_nothing_else(
    place: str, value: float, tiny_policy: tiny.Loader
) -> None:
    policy = tiny_policy()
    with torch.no_grad():
        attrgetter(place)(policy.model).weight[5:].fill_(value)
    with pytest.raises(SelfCheckError, match="computes values that are not numbers") as caught:
        self_check(policy)
    assert "weights are damaged" in caught.value.hint

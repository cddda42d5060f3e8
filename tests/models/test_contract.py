"""What the method relies on, over every architecture and precision of the plain backend."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from safesteer_lite.method import policies, steering
from safesteer_lite.method.policies import Batch, Steering
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.sampling import GrowingCache, draw
from safesteer_lite.models.selfcheck import self_check
from tests import tiny

EVERY = (*tiny.ARCHITECTURES, *tiny.FURTHER)
CASES = [
    *((architecture, precision) for architecture in tiny.ARCHITECTURES for precision in tiny.PRECISIONS),
    *((architecture, "fp32") for architecture in tiny.FURTHER),
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def loaded(request: pytest.FixtureRequest, tiny_policy: tiny.Loader) -> Iterator[tuple[Policy, str]]:
    """One policy a case with a non-zero adapter, and its precision; tests leave it as they found it."""
    architecture, precision = request.param
    yield tiny_policy(architecture, precision, filled=True), precision


def projections(architecture: str) -> set[str]:
    """The linear layers of a block."""
    if architecture == "phi3":
        return {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    return {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def windowed(policy: Policy) -> bool:
    """Whether some blocks see less than a prompt, so that nothing is read apart."""
    return getattr(policy.model.causal.config, "sliding_window", None) is not None


def full_forward(policy: Policy, batch: Batch, positions: bool = True) -> Tensor:
    """All logits by the model's own forward."""
    extra = {"position_ids": (batch.attention_mask.cumsum(-1) - 1).clamp_min(0)} if positions else {}
    with torch.no_grad():
        output = policy.model.causal(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **extra
        )
    logits: Tensor = output.logits
    return logits


def test_a_hook_fires_once_a_forward_and_every_block_is_run(loaded: tuple[Policy, str]) -> None:
    policy, _ = loaded
    batch = tiny.prompt_batch(policy)
    for layer in range(len(policy.model.layers)):
        with steering.count_calls(policy.model.layers, layer) as calls:
            full_forward(policy, batch)
            assert [shape[:2] for shape in calls] == [batch.input_ids.shape]
        full_forward(policy, batch)
        assert len(calls) == 1


def test_a_hook_fires_at_every_token_that_is_sampled(loaded: tuple[Policy, str]) -> None:
    policy, _ = loaded
    batch = tiny.prompt_batch(policy)
    with steering.count_calls(policy.model.layers, 2) as calls:
        sampled = policy.model.generate(batch, 4, 5.0, torch.Generator().manual_seed(1), 2)
    assert sampled.tokens.shape == (10, 4)
    # The prefix that all prompts share, what follows it, and each further token.
    read = [batch.prefix, batch.input_ids.shape[1] - batch.prefix]
    if windowed(policy):
        read = [sum(read)]
    assert [shape[1] for shape in calls] == [*read, 1, 1, 1]


def test_steering_moves_the_logits_and_its_removal_restores_them(loaded: tuple[Policy, str]) -> None:
    policy, _ = loaded
    batch = tiny.prompt_batch(policy)
    before = full_forward(policy, batch)
    for layer in range(len(policy.model.layers)):
        with steering.add(policy.model.layers, layer, tiny.vector(1.0)):
            assert (full_forward(policy, batch)[:, -1] - before[:, -1]).abs().amax(-1).min() > 0.1
        assert torch.equal(full_forward(policy, batch), before)


def test_removal_also_follows_an_error(loaded: tuple[Policy, str]) -> None:
    policy, _ = loaded
    batch = tiny.prompt_batch(policy)
    before = full_forward(policy, batch)
    with pytest.raises(KeyboardInterrupt), steering.ablate(policy.model.layers, tiny.vector(1.0)):
        raise KeyboardInterrupt
    assert torch.equal(full_forward(policy, batch), before)


def test_ablation_leaves_nothing_of_a_direction(loaded: tuple[Policy, str]) -> None:
    """Neither in what a block reads nor in what it adds, which in some families has passed a norm behind the MLP."""
    policy, precision = loaded
    model, axis = policy.model, (tiny.vector(1.0) / tiny.vector(1.0).norm()).to(policy.model.device)
    residual = model.start(replace(tiny.prompt_batch(policy), prefix=0))
    own = tiny.prompt_batch(policy).attention_mask > 0
    with torch.no_grad(), steering.ablate(model.layers, axis):
        for layer in range(len(model.layers)):
            # Projected out of the input, so that what is left comes from what the block adds.
            stream = residual.hidden.float()
            residual = replace(residual, hidden=(stream - (stream @ axis).unsqueeze(-1) * axis).to(residual.hidden))
            residual = model.advance(residual, layer + 1)
            left = (residual.hidden.float() @ axis)[own].abs().max() / residual.hidden[own].float().norm(dim=-1).max()
            assert left < (1e-5 if precision == "fp32" else 0.02)


def test_adapters_off_is_the_base_though_the_adapter_is_not_zero(
    loaded: tuple[Policy, str], tiny_policy: tiny.Loader, request: pytest.FixtureRequest
) -> None:
    policy, precision = loaded
    batch = tiny.prompt_batch(policy)
    student = full_forward(policy, batch)
    with policies.base(policy.model):
        base = full_forward(policy, batch)
    architecture = request.node.callspec.params["loaded"][0]
    fresh = tiny_policy(architecture, precision)
    assert torch.equal(base, full_forward(fresh, batch))
    assert (student - base).abs().max() > 0.1
    assert torch.equal(student, full_forward(policy, batch))


def test_blocks_one_by_one_equal_the_models_own_forward(loaded: tuple[Policy, str]) -> None:
    policy, _ = loaded
    model, batch = policy.model, replace(tiny.prompt_batch(policy), prefix=0)
    expected = full_forward(policy, batch)
    with torch.no_grad():
        at_once = model.final(model.start(batch))
        stopping = model.start(batch)
        for layer in range(len(model.layers) + 1):
            stopping = model.advance(stopping, layer)
            assert stopping.layer == layer
        assert torch.equal(model.advance(stopping, 1).hidden, stopping.hidden)
        assert torch.equal(model.logits(at_once), expected)
        assert torch.equal(model.logits(model.final(stopping)), expected)


def test_a_shared_prefix_is_the_template_in_front_of_the_text(loaded: tuple[Policy, str]) -> None:
    policy, _ = loaded
    batch = tiny.prompt_batch(policy)
    opening = policy.tokenizer(f"{tiny.START_OF_TURN}user\n", add_special_tokens=False).input_ids
    assert batch.prefix == len(opening) > 0
    shared, rest = batch.split_prefix()
    assert shared.input_ids.tolist() == [opening]
    for row, prompt in enumerate(tiny.PROMPTS):
        whole = policy.encode(prompt).input_ids[0].tolist()
        assert rest.input_ids[row][rest.attention_mask[row] > 0].tolist() == whole[len(opening) :]


@pytest.mark.parametrize("who", ["base", "teacher", "student"])
def test_reading_a_shared_prefix_once_changes_nothing(loaded: tuple[Policy, str], who: str) -> None:
    """At the positions after the prefix, for rows of different length; rounding may differ by a few last bits."""
    policy, precision = loaded
    model, shared = policy.model, tiny.prompt_batch(policy)
    apart, length = replace(shared, prefix=0), shared.input_ids.shape[1] - shared.prefix
    steer = Steering(2, tiny.vector(0.4))
    contexts: dict[str, AbstractContextManager[None]] = {
        "base": policies.base(model),
        "teacher": policies.teacher(model, steer),
        "student": nullcontext(),
    }
    with torch.no_grad(), contexts[who]:
        found = [model.final(model.start(batch))[:, -length:] for batch in (shared, apart)]
    own = shared.split_prefix()[1].attention_mask > 0
    assert found[0].shape == found[1].shape
    difference = (found[0][own] - found[1][own]).abs().max() / found[1][own].abs().max()
    assert difference < (1e-5 if precision == "fp32" else 0.1)


@pytest.mark.parametrize("window", [20, 400])
@pytest.mark.parametrize("architecture", ["mistral", "gemma3_text"])
def test_a_window_sees_the_same_with_a_shared_prefix(architecture: str, window: int, tmp_path: Path) -> None:
    """Padding stands between the prefix and a short prompt, and must not push the prefix out of the window."""
    folder = tiny.save_model(tmp_path / "model", architecture, sliding_window=window)
    policy = tiny.load_policy(folder, "fp32", filled=True)
    shared = tiny.prompt_batch(policy)
    assert 20 < shared.input_ids.shape[1] < 400
    found, drawn = [], []
    for batch in (shared, replace(shared, prefix=0)):
        with torch.no_grad():
            start = policy.model.start(batch)
            assert (start.prefix is not None) == (batch.prefix > 0 and window == 400)
            found.append(policy.model.final(start)[:, -1])
        drawn.append(policy.model.generate(batch, 12, 0.0, None, 2).tokens)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(*drawn)


def test_a_shared_prefix_takes_part_in_steering_ablation_and_recording(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy("qwen2", "fp32", filled=True)
    model, shared = policy.model, tiny.prompt_batch(policy)
    found = []
    for batch in (shared, replace(shared, prefix=0)):
        with torch.no_grad():
            branched = model.final(model.advance(model.start(batch), 2).shifted(tiny.vector(0.5)))[:, -1]
            with steering.ablate(model.layers, tiny.vector(1.0)):
                ablated = policies.last_logits(model, batch)
            with steering.record(model.layers, 2) as seen:
                policies.last_logits(model, batch)
        found.append([branched, ablated, *(seen[layer] for layer in range(tiny.LAYERS))])
    for once, apart in zip(*found, strict=True):
        torch.testing.assert_close(once, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", EVERY)
def test_gradients_flow_through_a_shared_prefix(architecture: str, tiny_policy: tiny.Loader) -> None:
    """The adapter changes the prefix's keys and values, so its gradient has a part that comes through them."""
    policy = tiny_policy(architecture, "fp32", filled=True)
    shared, found = tiny.prompt_batch(policy), []
    for batch in (shared, replace(shared, prefix=0)):
        policies.last_logits(policy.model, batch).square().mean().backward()
        parameters = policy.model.parameters_to_train()
        found.append([parameter.grad.clone() for parameter in parameters if parameter.grad is not None])
        for parameter in parameters:
            parameter.grad = None
    assert len(found[0]) == len(found[1]) == tiny.LAYERS * len(projections(architecture)) * 2
    for once, apart in zip(*found, strict=True):
        torch.testing.assert_close(once, apart, rtol=1e-3, atol=1e-4 * float(apart.abs().max()))


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_checkpointing_changes_no_bit_and_keeps_less(
    loaded: tuple[Policy, str], shared_prefix: bool, request: pytest.FixtureRequest
) -> None:
    """Loss and gradients, with the shared prefix read once or in each row; what is kept is counted in bytes."""
    adapted = projections(request.node.callspec.params["loaded"][0])
    policy, _ = loaded
    model, batch = policy.model, tiny.prompt_batch(policy)
    batch, found, kept = batch if shared_prefix else replace(batch, prefix=0), [], []
    for checkpointing in (False, True):
        storages: dict[int, int] = {}

        def keep(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model.checkpointing = checkpointing
        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = policies.last_logits(model, batch).square().mean()
            found.append([loss, *torch.autograd.grad(loss, model.parameters_to_train())])
        finally:
            model.checkpointing = False
        weights = {value.untyped_storage().data_ptr() for value in model.network.parameters()}
        kept.append(sum(size for start, size in storages.items() if start not in weights))
    assert len(found[0]) == 1 + tiny.LAYERS * len(adapted) * 2
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))
    assert kept[1] < 0.5 * kept[0]


def test_the_cache_is_gone_once_sampling_has_ended(tiny_policy: tiny.Loader) -> None:
    """Freed by counting references, at once: training must not wait for the garbage collector to get its memory."""
    policy = tiny_policy()
    gc.collect()
    gc.disable()
    try:
        policy.model.generate(tiny.prompt_batch(policy), 4, 1.0, torch.Generator().manual_seed(0), 2)
        assert not [item for item in gc.get_objects() if type(item) is GrowingCache]
    finally:
        gc.enable()


@pytest.mark.parametrize("architecture", EVERY)
def test_sampling_behind_a_shared_prefix_draws_the_same_tokens(architecture: str, tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy(architecture, "fp32", filled=True)
    shared, drawn = tiny.prompt_batch(policy), []
    for batch in (shared, replace(shared, prefix=0)):
        for temperature in (0.0, 1.0):
            drawn.append(policy.model.generate(batch, 12, temperature, torch.Generator().manual_seed(4), 3))
    for once, apart in zip(drawn[:2], drawn[2:], strict=True):
        assert torch.equal(once.tokens, apart.tokens) and torch.equal(once.mask, apart.mask)


@pytest.mark.parametrize("architecture", EVERY)
def test_samples_are_drawn_from_the_models_own_logits(architecture: str, tiny_policy: tiny.Loader) -> None:
    """Which token is likeliest would be the same without the bound that Gemma 2 puts on logits; how likely, would not."""
    policy = tiny_policy(architecture, "fp32")
    batch, repeats = tiny.prompt_batch(policy), 40
    drawn = policy.model.generate(batch, 1, 1.0, torch.Generator().manual_seed(4), repeats).tokens[:, 0]
    logits = full_forward(policy, batch)[:, -1].repeat_interleave(repeats, dim=0)
    uniform = torch.rand(len(logits), generator=torch.Generator().manual_seed(4))
    assert torch.equal(drawn, draw(logits, 1.0, uniform))
    assert len(set(drawn.tolist())) > 10


def test_every_adapted_layer_gets_gradients_after_a_generate(
    loaded: tuple[Policy, str], request: pytest.FixtureRequest
) -> None:
    policy, _ = loaded
    model, batch = policy.model, tiny.prompt_batch(policy)
    with torch.no_grad():
        model.generate(batch, 3, 1.0, torch.Generator().manual_seed(0), 2)
        model.final(model.start(batch))
    policies.last_logits(model, batch).square().mean().backward()
    named = {name: value for name, value in model.network.named_parameters() if value.requires_grad}
    adapted = projections(request.node.callspec.params["loaded"][0])
    assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in named} == adapted
    assert len(named) == tiny.LAYERS * len(adapted) * 2
    # In the topmost block the last position sees every projection, so that no matrix, A or B, has an excuse.
    dead = [name for name, value in named.items() if value.grad is None or not value.grad.abs().sum() > 0]
    for value in named.values():
        value.grad = None
    assert dead == []


def test_padding_on_the_left_does_not_change_a_prompt(loaded: tuple[Policy, str]) -> None:
    """Alone and beside longer prompts: rounding may differ with the shape, by a few units of the last place."""
    policy, precision = loaded
    batch = tiny.prompt_batch(policy)
    with torch.no_grad():
        together = policies.last_logits(policy.model, batch)
        alone = torch.cat([policies.last_logits(policy.model, policy.encode(prompt)) for prompt in tiny.PROMPTS])
    assert alone.abs().max() > 1
    # bf16 keeps 8 bits: logits of about 5 are stored to 0.03, and four blocks add up their own rounding. On a card one row of
    # packed weights has a kernel of its own: there it was 0.24 at most (H100, 2026-11-27).
    rounding = 0.3 if tiny.DEVICE == "cuda" and precision == "nf4-packed" else 0.15
    assert (together - alone).abs().max() < (1e-4 if precision == "fp32" else rounding)


def test_self_check_passes_on_a_fresh_adapter(
    loaded: tuple[Policy, str], tiny_policy: tiny.Loader, request: pytest.FixtureRequest
) -> None:
    architecture, precision = request.node.callspec.params["loaded"]
    policy = tiny_policy(architecture, precision)
    batch = tiny.prompt_batch(policy)
    before = full_forward(policy, batch)
    weights = [parameter.detach().clone() for parameter in policy.model.parameters_to_train()]
    assert len(self_check(policy)) == 6
    assert torch.equal(full_forward(policy, batch), before)
    for parameter, known in zip(policy.model.parameters_to_train(), weights, strict=True):
        assert torch.equal(parameter, known) and parameter.grad is None


@pytest.mark.parametrize("architecture", [*tiny.ARCHITECTURES, "phi3"])
def test_packed_4bit_weights_give_the_gradients_of_unpacked_ones(architecture: str, tiny_policy: tiny.Loader) -> None:
    """Where bitsandbytes repacks, base layers pass no gradient on, and only the residual stream still does."""
    found = []
    for precision in ("nf4-packed", "nf4-unpacked"):
        policy = tiny_policy(architecture, precision, filled=True)
        batch = tiny.prompt_batch(policy)
        policy.model.generate(batch, 3, 1.0, torch.Generator().manual_seed(0), 2)
        policies.last_logits(policy.model, batch).square().mean().backward()
        parameters = policy.model.parameters_to_train()
        found.append([parameter.grad.float().flatten() for parameter in parameters if parameter.grad is not None])
    for packed, unpacked in zip(*found, strict=True):
        # Unpacked weights have other kernels on a card: there it was 0.9977 at least (H100, 2026-11-27).
        least = 0.995 if tiny.DEVICE == "cuda" else 0.999
        assert torch.nn.functional.cosine_similarity(packed, unpacked, dim=0) > least


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_unpacked_4bit_weights_give_the_packed_forward(architecture: str, tiny_policy: tiny.Loader) -> None:
    """The weights are the same numbers; only kernels and thus the last bf16 bits may differ."""
    packed, unpacked = tiny_policy(architecture, "nf4-packed"), tiny_policy(architecture, "nf4-unpacked")
    exact = tiny_policy(architecture, "bf16")
    batch = tiny.prompt_batch(packed)
    first, second, unquantised = (full_forward(policy, batch)[:, -1].float() for policy in (packed, unpacked, exact))
    assert (first - second).abs().max() < 0.15
    # And 4-bit weights are really in use: they move the logits far more than that.
    assert (first - unquantised).abs().max() > 0.5


def test_unpacking_leaves_no_4bit_layer_and_no_mark(tiny_policy: tiny.Loader) -> None:
    packed, unpacked = tiny_policy("qwen2", "nf4-packed"), tiny_policy("qwen2", "nf4-unpacked")
    kinds = {type(module).__name__ for module in unpacked.model.causal.modules()}
    assert "Linear4bit" not in kinds
    assert "Linear4bit" in {type(module).__name__ for module in packed.model.causal.modules()}
    assert not hasattr(unpacked.model.causal.config, "quantization_config")
    # Biases come along.
    name = "model.layers.1.self_attn.q_proj.base_layer.bias"
    first, second = (dict(policy.model.causal.named_parameters())[name] for policy in (packed, unpacked))
    assert first.abs().sum() > 0 and torch.equal(first, second)


def test_the_tokenizers_marks_are_known(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy()
    ids = {token: policy.tokenizer.convert_tokens_to_ids(token) for token in (tiny.END_OF_TEXT, tiny.END_OF_TURN)}
    assert policy.model.end_of_turn == set(ids.values())
    assert policy.model.special_ids == {*ids.values(), policy.tokenizer.convert_tokens_to_ids(tiny.START_OF_TURN)}
    assert policy.model.first_adapter_layer == 0
    assert tiny_policy(first_layer=2).model.first_adapter_layer == 2

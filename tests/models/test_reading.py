"""Reading directions in a real adapter: what is captured block by block is what a plain forward shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from safesteer_lite.errors import ModelError
from safesteer_lite.method.discriminant import RunningMean, reading_directions
from safesteer_lite.models import reading
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.reading import read_discriminants
from safesteer_lite.prompts.contexts import Conversation, begun
from tests import tiny

HARMFUL, HARMLESS = tiny.PROMPTS[:3], tiny.PROMPTS[2:]


def plain_activations(policy: Policy, prompt: str | Conversation, words: int, name: str) -> Tensor:
    """The inputs of one module along a prompt and the base's first words, read in one ordinary forward."""
    batch = policy.encode(prompt)
    completions = policy.model.generate(batch, words, 0.0, None, 1)
    found: list[Tensor] = []
    module: nn.Module = policy.model.network.get_submodule(name)
    hook = module.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0][0].float()))
    with torch.no_grad():
        policy.model.causal(input_ids=completions.after(batch).input_ids)
    hook.remove()
    return found[0]


@pytest.mark.parametrize(("architecture", "rank"), [("qwen2", 8), ("llama", 3), ("gemma3_text", 8), ("phi3", 8)])
def test_the_adapter_reads_what_a_plain_forward_shows(
    architecture: str, rank: int, tiny_folder: Callable[[str], Path]
) -> None:
    policy = tiny.load_policy(tiny_folder(architecture), "fp32", 1, rank=rank)
    policy.model.end_of_turn = frozenset()
    words = max(0, rank - policy.template_positions)
    assert (words > 0) == (rank == 8)
    modules = {
        name.rpartition(".")[2]: name
        for name, module in policy.model.network.named_modules()
        if "layers.2." in name and hasattr(module, "lora_A")
    }
    names = sorted(modules.keys() - {"k_proj", "gate_proj"})
    assert len(names) == (4 if architecture == "phi3" else 5)
    expected = {}
    for name in names:
        bad = [plain_activations(policy, prompt, words, modules[name]) for prompt in HARMFUL]
        good = [plain_activations(policy, prompt, words, modules[name]) for prompt in HARMLESS]
        prefix = policy.encode(HARMLESS[0]).prefix
        harmless = RunningMean()
        harmless.add(torch.stack([each[-rank:] for each in good]))
        expected[name] = reading_directions(
            [torch.stack([each[-rank:] for each in bad])],
            harmless.value,
            torch.cat([each[prefix:] for each in good]),
            0.5,
        )
    read_discriminants(policy, HARMFUL, HARMLESS, 0.5, 2)
    for name in names:
        weight = policy.model.network.get_parameter(f"{modules[name]}.lora_A.default.weight")
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-3, atol=1e-4)


def test_a_part_of_the_rank_is_read_at_the_end_of_begun_answers(tiny_folder: Callable[[str], Path]) -> None:
    """Five positions of prompts as they are, two where an answer was begun; beginnings of several lengths, in two batches."""
    policy = tiny.load_policy(tiny_folder("qwen2"), "fp32", 1, rank=7)
    [name] = [
        name
        for name, module in policy.model.network.named_modules()
        if "layers.2." in name and name.endswith("up_proj")
    ]
    sides = []
    for prompts in (HARMFUL, HARMLESS):
        plain = [plain_activations(policy, prompt, 0, name) for prompt in prompts]
        ends = [plain_activations(policy, prompt, 0, name) for prompt in begun(prompts)]
        assert len({len(end) - len(each) for end, each in zip(ends, plain, strict=True)}) > 1
        sides.append((plain, ends))
    (bad, bad_ends), (good, good_ends) = sides
    tokens = torch.cat([each[policy.encode(HARMLESS[0]).prefix :] for each in good])
    expected = []
    for harmful, harmless, positions in ((bad, good, 5), (bad_ends, good_ends, 2)):
        mean = RunningMean()
        mean.add(torch.stack([each[-positions:] for each in harmless]))
        stacked = torch.stack([each[-positions:] for each in harmful])
        expected.append(reading_directions([stacked], mean.value, tokens, 0.5))
    read_discriminants(policy, HARMFUL, HARMLESS, 0.5, 2, begun=(begun(HARMFUL), begun(HARMLESS)))
    weight = policy.model.network.get_parameter(f"{name}.lora_A.default.weight")
    torch.testing.assert_close(weight.detach(), torch.cat(expected), rtol=1e-3, atol=1e-4)


def test_only_what_the_adapter_writes_is_left_to_train(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy(first_layer=2)
    before = {name: value.detach().clone() for name, value in policy.model.network.named_parameters()}
    seen: list[int] = []
    read_discriminants(policy, HARMFUL, HARMLESS, 0.1, 8, seen.append)
    assert seen == [1, 2]
    changed = {name for name, value in policy.model.network.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_A" in name}
    trained = {name for name, value in policy.model.network.named_parameters() if value.requires_grad}
    assert trained == {name for name in before if "lora_B" in name}
    # B is zero still: the student is the base.
    batch = tiny.prompt_batch(policy)
    with torch.no_grad():
        student = policy.model.final(policy.model.start(batch))
        with policy.model.adapters_off():
            torch.testing.assert_close(student, policy.model.final(policy.model.start(batch)), rtol=0, atol=0)


def test_a_backend_that_hides_what_a_layer_reads_is_refused(
    tiny_policy: tiny.Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy(first_layer=3)
    mlp: nn.Module = policy.model.layers[3].get_submodule("mlp")
    monkeypatch.setattr(mlp, "forward", lambda hidden: hidden)
    with pytest.raises(ModelError, match="3 linear layers of block 3 do not show what they read"):
        read_discriminants(policy, HARMFUL, HARMLESS, 0.1, 8)


def test_where_memory_runs_out_fewer_prompts_are_read_at_a_time_to_the_same_directions(
    tiny_policy: tiny.Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = reading_weights(tiny_policy(first_layer=2), 4)
    policy = tiny_policy(first_layer=2)
    block: nn.Module = policy.model.layers[3]
    forward, rows = block.forward, []

    def short_of_memory(hidden: Tensor, **arguments: object) -> Tensor:
        rows.append(len(hidden))
        if len(hidden) > 1:
            raise torch.OutOfMemoryError("simulated, for want of a card")
        result: Tensor = forward(hidden, **arguments)
        return result

    monkeypatch.setattr(block, "forward", short_of_memory)
    for name, weight in reading_weights(policy, 4).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)
    assert {2, 1} <= set(rows)


def test_how_many_prompts_are_read_at_a_time_does_not_decide_which_tokens_are_read(
    tiny_policy: tiny.Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few tokens of many, and a prompt that does not begin as the others do."""
    monkeypatch.setattr(reading, "_TOKENS", 15)
    harmless: list[str | Conversation] = [*HARMLESS, Conversation(tiny.PROMPTS[0], "You are brief."), tiny.PROMPTS[1]]
    expected = reading_weights(tiny_policy(first_layer=2), 1, harmless)
    for size in (2, 8):
        for name, weight in reading_weights(tiny_policy(first_layer=2), size, harmless).items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(reading, "_TOKENS", 3000)
    every = reading_weights(tiny_policy(first_layer=2), 8, harmless)
    assert any(not torch.allclose(weight, expected[name], rtol=0.1) for name, weight in every.items())


def reading_weights(policy: Policy, size: int, harmless: Sequence[str | Conversation] = HARMLESS) -> dict[str, Tensor]:
    """What the adapter reads, after it was told."""
    read_discriminants(policy, HARMFUL, harmless, 0.5, size)
    return {
        name: weight.detach().clone() for name, weight in policy.model.network.named_parameters() if "lora_A" in name
    }

"""The whole method on a pretend device: nothing is mixed with the CPU, the same comes out, and the host seldom waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safesteer_lite.evaluation.measure import measure
from safesteer_lite.method import directions, policies, tokens
from safesteer_lite.method.distill import Distillation
from safesteer_lite.method.policies import Steering
from safesteer_lite.models.adapter import adapter_tensors, load_adapter, read_adapter, save_adapter, scale_adapter
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.reading import read_discriminants
from safesteer_lite.models.reference import kl_to_reference, reference_answers
from safesteer_lite.models.reply import Reply
from safesteer_lite.models.selfcheck import self_check
from safesteer_lite.prompts.plan import PromptSets
from safesteer_lite.prompts.sets import Prompt
from tests import pretend_device, tiny
from tests.method.test_distill import ANCHORED
from tests.pretend_device import DEVICE, PretendTensor, Waits

STEER = Steering(1, tiny.vector(0.3))


def ignore(_: int) -> None:
    """Progress that nobody watches."""


def whole_method(policy: Policy) -> dict[str, Any]:
    """Every computation of a run, in its order, and a chat with what comes of it."""
    model, prompts = policy.model, list(tiny.PROMPTS)
    model.checkpointing = True
    found: dict[str, Any] = {"checks": self_check(policy), "answers": policy.answers(prompts, 8, 3)}
    refusal = policy.token_ids(["I", "As"])
    batches = [batch for _, batch in policy.batches(prompts, 3)]
    seen, found["scores"] = directions.read_prompts(model, batches, policy.template_positions, refusal, ignore)
    vectors = directions.mean_difference(replace(seen, values=seen.values[:3]), replace(seen, values=seen.values[3:]))
    candidates = [directions.Candidate(-1, 0, 1.0), directions.Candidate(-2, 1, 1.0)]
    candidates = directions.ablation_scores(model, vectors, candidates, batches, batches, refusal, ignore)
    found["candidates"] = directions.induce_scores(model, vectors, candidates, batches, refusal, ignore)
    voters = tokens.collect(
        model, STEER, tiny.prompt_batch(policy), samples=3, horizon=5, chance=torch.Generator().manual_seed(0)
    )
    for by in ("mass", "ratio"):
        safety = tokens.vote(
            [voters],
            model.logits,
            by=by,
            excluded=model.special_ids,
            minimum_probability=0.0,
            ballots=20,
            count=10,
            chunk=8,
        )
        found[by] = [safety.ids, safety.votes]
    found["carried"] = tokens.carried([voters], model.logits, safety.ids, [2, 8], 8)
    read_discriminants(policy, prompts, prompts[:3], 0.1, 3)
    encoded = [policy.encode(prompt) for prompt in prompts]
    recipe = replace(ANCHORED, score_weight=0.5, half_life=16.0, averaging=0.8, micro_batch=3)
    loop = Distillation(model, STEER, safety.ids, encoded, encoded, recipe, refusal)
    steps = [loop.step() for _ in range(2)]
    found["steps"] = [[step.loss, step.anchor_loss, step.gradient_norm, step.rollout] for step in steps]
    assert loop.optimizer.is_finite()
    saved = loop.optimizer.state()
    loop.optimizer.load({name: pretend_device.values(value).clone() for name, value in saved.items()})
    with loop.optimizer.averaged():
        found["weights"] = adapter_tensors(model)
    with policies.base(model):
        reference = reference_answers(policy, prompts, 8, 3)
    sets = PromptSets(*[[Prompt(text, text) for text in prompts[:2]] for _ in range(3)])
    found["scorecard"] = measure(policy, sets, 8, 3, reference, 8)[0].to_record()
    found["KL"] = kl_to_reference(policy, reference, 8)
    load_adapter(model, found["weights"])
    scale_adapter(model, 0.5)
    reply = Reply(policy, [{"role": "user", "content": "Say hello."}], 5, 0.8, 0)
    while not reply.done:
        reply.step()
    found["chat"] = reply.text
    return found


def on_the_device(policy: Policy) -> Policy:
    """The same policy with its weights moved there; the policy given cannot be used any more."""
    pretend_device.move(policy.model.network)
    assert policy.model.device == DEVICE
    return Policy(policy.model, policy.prompt_tokens)


def plain(value: Any) -> Any:
    """A tensor as numbers."""
    return pretend_device.values(value.detach()).tolist() if isinstance(value, Tensor) else value


def assert_same(found: Any, expected: Any, place: str = "") -> None:
    """Equal, but for the rounding of kernels that add up in another order."""
    if isinstance(expected, Tensor):
        torch.testing.assert_close(
            *map(pretend_device.values, (found, expected)), rtol=1e-3, atol=1e-4, equal_nan=True, msg=place
        )
        return
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, directions.Candidate):
        found, expected = (list(vars(value).values()) for value in (found, expected))
    if isinstance(expected, list | tuple):
        assert len(found) == len(expected), place
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{place}[{index}]")
    else:
        close = isinstance(expected, float)
        assert found == (pytest.approx(expected, rel=1e-3, abs=1e-4, nan_ok=True) if close else expected), place


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_whole_method_comes_to_the_same_on_a_device(architecture: str, tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", architecture, layers=2)
    on_the_cpu = tiny.load_policy(folder, "fp32", 1)
    expected = whole_method(on_the_cpu)
    save_adapter(on_the_cpu.model, tmp_path / "adapter")
    with pretend_device.pretend_device():
        policy = on_the_device(tiny.load_policy(folder, "fp32", 1))
        found = whole_method(policy)
        read_adapter(policy.model, tmp_path / "adapter")
        assert_same(adapter_tensors(policy.model), adapter_tensors(on_the_cpu.model))
    for name, value in expected.items():
        assert_same(found[name], value, name)


def waits_a_token(policy: Policy, waits: Waits, temperature: float) -> dict[tuple[str, str], float]:
    """What each further token of four rollouts makes the host wait for."""
    policy.model.end_of_turn = frozenset({tiny.VOCABULARY})
    batch, counted = tiny.prompt_batch(policy, 2), []
    for length in (3, 7):
        waits.clear()
        policy.model.generate(batch, length, temperature, torch.Generator().manual_seed(0), 2)
        counted.append(Counter(waits.places))
    return {place: count / 4 for place, count in (counted[1] - counted[0]).items()}


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_token_is_waited_for_once_and_needs_one_copy(architecture: str, tiny_policy: tiny.Loader) -> None:
    """Which rows still run is asked once a token; random numbers go over once, and nothing else does, steered or not."""
    with pretend_device.pretend_device() as waits:
        policy = on_the_device(tiny_policy(architecture))
        greedy = waits_a_token(policy, waits, 0.0)
        sampled = waits_a_token(policy, waits, 1.0)
        with policies.teacher(policy.model, STEER):
            steered = waits_a_token(policy, waits, 1.0)
    for found, kinds in (
        (greedy, ["a count"]),
        (sampled, ["a count", "to the device"]),
        (steered, ["a count", "to the device"]),
    ):
        assert sorted(kind for kind, _ in found) == kinds, found
        assert set(found.values()) == {1.0}, found
        assert all(place.startswith("models/sampling.py") for _, place in found)


def test_a_training_forward_waits_for_little(tiny_policy: tiny.Loader) -> None:
    """Twice as many micro-batches cost twice as many waits, and a micro-batch no more than these."""
    with pretend_device.pretend_device() as waits:
        policy = on_the_device(tiny_policy())
        encoded = [policy.encode(prompt) for prompt in tiny.PROMPTS]
        counted = []
        for micro_batch in (8, 4):
            loop = Distillation(
                policy.model, STEER, torch.arange(9), encoded, [], replace(ANCHORED, anchors=0, micro_batch=micro_batch)
            )
            prompts = tiny.prompt_batch(policy, 2).repeat(4)
            answers = tiny.fixed_completions(8, policy.model.device)
            waits.clear()
            loop.backward(prompts, answers, "harmful")
            counted.append(Counter(waits.places))
    a_micro_batch = counted[1] - counted[0]
    assert a_micro_batch.total() <= 20, a_micro_batch


def refused(work: Callable[[], object], said: str) -> None:
    with pytest.raises((RuntimeError, TypeError), match=said):
        work()


def test_the_device_refuses_what_a_card_refuses() -> None:
    with pretend_device.pretend_device() as waits:
        here, there = torch.arange(6.0, device=DEVICE), torch.arange(6.0)
        assert isinstance(here, PretendTensor) and type(there) is Tensor
        refused(lambda: here + there, "one device")
        refused(lambda: torch.cat([here, there]), "one device")
        refused(lambda: nn.functional.linear(there[None], here[None]), "one device")
        refused(lambda: there[here.long()], "one device")
        refused(lambda: torch.rand(3, device=DEVICE, generator=torch.Generator()), "generator")
        refused(here.numpy, "numpy")
        assert waits.total() == 0
        # Numbers without dimensions, and indices of the host, are taken along.
        assert plain(here + there[2]) == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
        assert plain(here[torch.tensor([1, 5])]) == [1.0, 5.0] and waits.total("to the device") == 1
        assert plain((here * 2).relu_().cpu()) == plain(there * 2) and waits.total("to the host") == 1
        assert float(here[3]) == 3.0 and waits.total("a value") == 1
        assert plain(here[here > 3]) == [4.0, 5.0] and len(here.nonzero()) == 5 and waits.total("a count") == 2
        assert plain(torch.tensor([1, 2], device=DEVICE)) == [1, 2] and waits.total("to the device") == 2


def test_gradients_and_the_place_of_a_wait() -> None:
    with pretend_device.pretend_device() as waits:
        layer = nn.Linear(3, 2)
        pretend_device.move(layer)
        layer(torch.ones(4, 3, device=DEVICE)).square().sum().backward()
        assert isinstance(layer.weight.grad, PretendTensor) and layer.weight.grad.device == DEVICE
        waits.clear()
        policies.Batch(torch.ones(1, 2, device=DEVICE).long(), torch.ones(1, 2, device=DEVICE).long()).trimmed()
    ((kind, place),) = waits.places
    assert kind == "a value" and place.startswith("method/policies.py:")

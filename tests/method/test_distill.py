"""The training loop: it learns, resumes exactly, and gives the same update however it is cut into pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safesteer_lite.method import policies
from safesteer_lite.method.directions import refusal_score
from safesteer_lite.method.distill import Distillation, Recipe, StepResult, generator_at, learning_rate_at, prompts_at
from safesteer_lite.method.objective import divergence
from safesteer_lite.method.optimizer import MasterAdamW
from safesteer_lite.method.policies import Batch, Chance, Completions, LanguageModel, Residual, Steering, join, pad_left
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.loaded import PlainModel
from safesteer_lite.models.reference import kl_to_reference, reference_answers
from safesteer_lite.models.sampling import Ended
from safesteer_lite.prompts.contexts import Conversation
from safesteer_lite.stages.history import History, restore_step, save_step
from tests import tiny
from tests.recipe import RECIPE

SAFETY_TOKENS = torch.arange(20, 70)
ANCHORED = replace(RECIPE, anchors=3, anchor_weight=0.5)
HARMLESS = ("Name a tree.", "How is bread baked?", "Where is the sea?")


def training(
    policy: Policy, recipe: Recipe, model: LanguageModel | None = None, layer: int = 2, scale: float = 0.4
) -> Distillation:
    """A loop over the tiny prompts with a random steering vector."""
    return Distillation(
        model or policy.model,
        Steering(layer, tiny.vector(scale)),
        SAFETY_TOKENS,
        [policy.encode(prompt) for prompt in tiny.PROMPTS],
        [policy.encode(prompt) for prompt in HARMLESS],
        recipe,
    )


def steps(loop: Distillation, count: int) -> list[StepResult]:
    """Do `count` optimizer steps."""
    return [loop.step() for _ in range(count)]


def adapter(model: PlainModel) -> list[Tensor]:
    """Copies of the trained weights."""
    return [parameter.detach().clone() for parameter in model.parameters_to_train()]


def equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether all tensors agree bit for bit."""
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def distance_to_teacher(policy: Policy, loop: Distillation) -> float:
    """KL(teacher || student) along the teacher's own answers, nats a token."""
    with policies.teacher(policy.model, loop.steer):
        reference = reference_answers(policy, tiny.PROMPTS, 8, 5)
    return kl_to_reference(policy, reference, 64)


def test_steps_bring_the_student_to_the_teacher(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy()
    recipe = replace(RECIPE, steps=12, gradient_clip=10.0)
    loop = training(policy, recipe, scale=2.0)
    before = distance_to_teacher(policy, loop)
    results = steps(loop, 12)
    assert distance_to_teacher(policy, loop) < 0.6 * before
    assert sum(result.loss for result in results[-3:]) < 0.7 * sum(result.loss for result in results[:3])
    assert [result.step for result in results] == list(range(1, 13))
    for place, result in enumerate(results):
        assert result.learning_rate == learning_rate_at(place, recipe)
        assert result.prompt == prompts_at(place, 2, 5, 1)[0]
        assert result.gradient_norm > 0 and math.isnan(result.anchor_loss) and result.micro_batch == 8
        assert 8 <= result.tokens <= 64 and 1 <= len(result.rollout) <= 8
    assert all(master.grad is None for master in loop.optimizer.masters)


def test_only_the_adapter_is_trained(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy()
    frozen = {name: value.detach().clone() for name, value in policy.model.network.named_parameters()}
    steps(training(policy, ANCHORED), 2)
    changed = {name for name, value in policy.model.network.named_parameters() if not torch.equal(value, frozen[name])}
    assert changed == {name for name in frozen if "lora_" in name}


def test_the_first_rollouts_loss_is_that_of_a_plain_computation(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy("qwen2", filled=True)
    loop = training(policy, ANCHORED)
    model, found = policy.model, loop.sample(pad_left([loop.harmful[0]]), 3, stream=0)
    rows = []
    with torch.no_grad():
        for tokens, mask in zip(found.tokens, found.mask, strict=True):
            sequence = torch.cat([loop.harmful[0].input_ids[0], tokens[mask]])[None]
            at = slice(-int(mask.sum()) - 1, -1)
            log_p = model.causal(input_ids=sequence).logits[0, at].double().log_softmax(-1)
            with policies.teacher(model, loop.steer):
                log_q = model.causal(input_ids=sequence).logits[0, at].double().log_softmax(-1)
            rows.append((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    loss = loop.backward(loop.harmful[0].repeat(3), found, "harmful")
    assert loss == pytest.approx(float(torch.stack(rows).mean()), rel=1e-4)


def test_anchors_keep_harmless_answers_near_the_base(tiny_policy: tiny.Loader) -> None:
    drift = {}
    for recipe in (RECIPE, replace(ANCHORED, anchor_weight=2.0)):
        policy = tiny_policy()
        with policies.base(policy.model):
            reference = reference_answers(policy, HARMLESS, 8, 3)
        results = steps(training(policy, recipe, scale=1.0), 6)
        drift[recipe.anchors] = kl_to_reference(policy, reference, 64)
        assert results[0].anchor_loss < 1e-6 if recipe.anchors else math.isnan(results[0].anchor_loss)
    assert drift[3] < 0.8 * drift[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_equals_uninterrupted(precision: str, tiny_policy: tiny.Loader) -> None:
    """Half the steps, then everything that is saved goes into a freshly loaded model."""
    whole = tiny_policy("qwen3", precision)
    uninterrupted = training(whole, ANCHORED)
    expected = steps(uninterrupted, 5)

    first = training(tiny_policy("qwen3", precision), ANCHORED)
    steps(first, 2)
    saved = first.optimizer.state()
    steps(first, 1)  # What follows the save must not leak into it.
    torch.manual_seed(1234)
    resumed_policy = tiny_policy("qwen3", precision)
    second = training(resumed_policy, ANCHORED)
    second.optimizer.load(saved)
    second.done = 2
    rest = steps(second, 3)
    assert equal(adapter(resumed_policy.model), adapter(whole.model))
    assert {key: value.tolist() for key, value in second.optimizer.state().items()} == {
        key: value.tolist() for key, value in uninterrupted.optimizer.state().items()
    }
    for one, other in zip(rest, expected[2:], strict=True):
        assert torch.equal(one.rollout, other.rollout)
        assert replace(one, rollout=other.rollout) == other


class Recorder(PlainModel):
    """Keeps what was sampled, and with which seed."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.model.network, policy.tokenizer, policy.model.first_adapter_layer)
        self.sampled: list[tuple[tuple[float, ...], Completions]] = []

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
        assert isinstance(chance, Tensor)
        found = super().generate(prompts, max_new_tokens, temperature, chance, repeats, ended, first)
        self.sampled.append((tuple(chance.flatten().tolist()), found))
        return self.sampled[-1][1]


def test_rollouts_of_one_prompt_all_differ(tiny_policy: tiny.Loader) -> None:
    """One prompt is every harmful and every anchor prompt: what tells rollouts apart is the stream of random numbers."""
    policy = tiny_policy()
    model, prompt = Recorder(policy), policy.encode(tiny.PROMPTS[1])
    recipe = replace(ANCHORED, prompts=2, rollouts=3, anchors=2, temperature=4.0, learning_rate=0.0)
    loop = Distillation(model, Steering(2, tiny.vector(0.4)), SAFETY_TOKENS, [prompt] * 2, [prompt] * 2, recipe)
    steps(loop, 3)
    drawn = [numbers for numbers, _ in model.sampled]
    assert len(drawn) == len(set(drawn)) == 6, "a stream for the harmful and one for the anchor prompts of each step"
    rollouts = [tuple(row.tolist()) for _, found in model.sampled for row in found.tokens]
    assert len(rollouts) == len(set(rollouts)) == 3 * (2 * 3 + 2)
    # The first tokens of streams that begin alike would be the same in every step, or in every kind of prompt.
    first = [tuple(found.tokens[:2, 0].tolist()) for _, found in model.sampled]
    assert len(set(first)) >= 5


def test_what_continues_draws_what_comes_after_the_steps_before_it(tiny_policy: tiny.Loader) -> None:
    still = replace(ANCHORED, learning_rate=0.0, temperature=4.0)
    long, further = (training(tiny_policy(), replace(still, earlier=earlier)) for earlier in (0, 3))
    last, first = steps(long, 4)[-1], further.step()
    assert torch.equal(first.rollout, last.rollout)
    assert (first.prompt, first.loss, first.anchor_loss) == (last.prompt, last.loss, last.anchor_loss)
    assert first.step == 1


def test_streams_of_random_numbers_do_not_overlap() -> None:
    """Neither between steps, kinds of prompts or seeds that lie side by side, nor where one stream follows another."""
    drawn: list[float] = []
    for seed in range(3):
        for step in range(40):
            for stream in (0, 1):
                generator = generator_at(step, seed, stream)
                drawn += torch.rand(200, generator=generator, dtype=torch.float64).tolist()
    # 53 random bits each: two of these 48,000 are the same by chance once in millions of tries.
    assert len(drawn) == len(set(drawn)) == 3 * 40 * 2 * 200


def advance(optimizer: MasterAdamW, gradient: Tensor) -> None:
    """One step with one gradient."""
    optimizer.zero()
    optimizer.add([gradient.clone()])
    optimizer.step(1e-2, 1.0)


def test_masters_keep_what_bf16_would_round_away() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = MasterAdamW([parameter])
    for _ in range(100):
        optimizer.zero()
        optimizer.add([torch.ones(3, dtype=torch.bfloat16)])
        optimizer.step(1e-3, 10.0)
    # Each step is a quarter of bf16's spacing below 1; one by one they would all be lost.
    assert optimizer.masters[0].detach().tolist() == pytest.approx([0.9] * 3, abs=1e-3)
    assert parameter.detach().float().tolist() == pytest.approx([0.9] * 3, abs=3e-3)


def test_gradients_of_micro_batches_are_summed_in_float32() -> None:
    """One of 1 and a hundred of 1/1000, each of which a sum in bf16 would lose; a weight that none reaches stays."""
    reached, other = (nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = MasterAdamW([reached, other])
    for value in (1.0, *[0.001] * 100):
        optimizer.add([torch.full((2,), value, dtype=torch.bfloat16), None])
    total = 1 + 100 * float(torch.tensor(0.001, dtype=torch.bfloat16))
    assert optimizer.step(1e-3, 10.0) == pytest.approx(total * math.sqrt(2), rel=1e-5)
    trained, left = (master.detach() for master in optimizer.masters)
    assert bool((trained < 1).all()) and left.tolist() == [1.0, 1.0]


def gradients(loop: Distillation, prompts: Batch, seed: int = 0) -> tuple[float, list[Tensor]]:
    """Loss and adapter gradients of one set of rollouts."""
    found = loop.sample(prompts, 4, stream=seed)
    loop.optimizer.zero()
    loss = loop.backward(prompts.repeat(4), found, "harmful")
    grads = [master.grad for master in loop.optimizer.masters]
    assert all(grad is not None for grad in grads)
    return loss, [grad.clone() for grad in grads if grad is not None]


@pytest.mark.parametrize("objective", ["generalized", "full"])
def test_the_size_of_micro_batches_does_not_matter(objective: str, tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy(filled=True)
    # Rollouts of unequal length, over which a mean of means differs from a mean.
    policy.model.end_of_turn = frozenset(range(0, 320, 9))
    prompts = tiny.prompt_batch(policy, 2)
    recipe = replace(RECIPE, objective=objective)  # type: ignore[arg-type]
    loss, expected = gradients(training(policy, recipe), prompts)
    assert max(float(grad.abs().max()) for grad in expected) > 1e-4
    for size in (1, 3):
        other, found = gradients(training(policy, replace(recipe, micro_batch=size)), prompts)
        assert other == pytest.approx(loss, rel=1e-4)
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


class SmallMemory(PlainModel):
    """Runs out of memory when more than `rows` sequences go through the upper blocks at once outside of sampling, or
    more than `sampled` are sampled at once."""

    rows = 1000
    sampled = 1000

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
        if len(prompts) * repeats > self.sampled:
            raise torch.OutOfMemoryError("simulated")
        return super().generate(prompts, max_new_tokens, temperature, chance, repeats, ended, first)

    def final(self, residual: Residual) -> Tensor:
        if residual.hidden.shape[0] > self.rows:
            raise torch.OutOfMemoryError("simulated")
        return super().final(residual)


def small_memory(policy: Policy, rows: int) -> SmallMemory:
    """The policy's network on a machine with room for `rows` sequences."""
    model = SmallMemory(policy.model.network, policy.tokenizer, policy.model.first_adapter_layer)
    model.rows = rows
    return model


def test_anchors_also_pay_for_a_rise_of_the_refusal_score(tiny_policy: tiny.Loader) -> None:
    """At the first position only, on top of the divergence, and not on harmful rollouts, whose score is to rise."""
    policy, tokens = tiny_policy("qwen2", "fp32", filled=True), torch.tensor([7, 30])
    # A divergence of weight 0 leaves the score alone in the gradient.
    loop = training(policy, replace(ANCHORED, score_weight=2.0, anchor_weight=0.0))
    loop.refusal_tokens = tokens
    anchors = pad_left(list(loop.harmless))
    found = loop.sample(anchors, 1, stream=1)
    weights = policy.model.parameters_to_train()
    student = refusal_score(policies.last_logits(policy.model, anchors), tokens)
    with torch.no_grad(), policies.base(policy.model):
        base = refusal_score(policies.last_logits(policy.model, anchors), tokens)
    rise = ((student - base).clamp(min=0) ** 2 / 2).mean()
    assert float(rise) > 1e-3
    assert bool((student < base).any()), "a fall must be among them, to see that it costs nothing"
    expected = torch.autograd.grad(2.0 * rise, weights, allow_unused=True)
    loop.micro_batch = 2
    loop.backward(anchors, found, "anchor")
    for master, gradient in zip(loop.optimizer.masters, expected, strict=True):
        torch.testing.assert_close(master.grad, gradient)
    harmful = pad_left(list(loop.harmful[:3]))
    unscored = training(policy, replace(ANCHORED, micro_batch=2))
    scored, plain = (gradients(each, harmful) for each in (loop, unscored))
    assert scored[0] == plain[0] and equal(scored[1], plain[1])


def test_averaged_weights_are_the_running_mean_of_the_steps(tiny_policy: tiny.Loader) -> None:
    """With 0.5 kept a step: the first step's weights, then half and half with each later step's."""
    policy = tiny_policy("llama", "fp32")
    loop = training(policy, replace(RECIPE, averaging=0.5))
    seen = []
    for _ in range(3):
        loop.step()
        seen.append(adapter(policy.model))
    first, second, third = (torch.cat([weight.flatten() for weight in weights]) for weights in seen)
    with loop.optimizer.averaged():
        found = torch.cat([weight.flatten() for weight in adapter(policy.model)])
    assert not torch.equal(first, third)
    torch.testing.assert_close(found, first / 4 + second / 4 + third / 2, rtol=1e-5, atol=1e-7)
    assert equal(adapter(policy.model), seen[-1]), "training goes on from the last weights"


def test_averaged_weights_survive_a_resume(tiny_policy: tiny.Loader) -> None:
    recipe = replace(RECIPE, averaging=0.7)
    whole, first, second = tiny_policy(), tiny_policy(), tiny_policy()
    uninterrupted, before, after = (training(policy, recipe) for policy in (whole, first, second))
    steps(uninterrupted, 4)
    steps(before, 2)
    after.optimizer.load(before.optimizer.state())
    after.done = before.done
    steps(after, 2)
    with uninterrupted.optimizer.averaged(), after.optimizer.averaged():
        assert equal(adapter(whole.model), adapter(second.model))


def test_when_memory_runs_out_the_micro_batch_is_halved_and_the_update_stays(tiny_policy: tiny.Loader) -> None:
    """8 does not fit, 4 does not fit, 2 does: the update is the one that a micro-batch of 2 gives from the start."""
    roomy = tiny_policy()
    expected = steps(training(roomy, replace(ANCHORED, micro_batch=2)), 2)
    tight = tiny_policy()
    results = steps(training(tight, ANCHORED, small_memory(tight, 3)), 2)
    assert [result.micro_batch for result in results] == [2, 2]
    assert [result.loss for result in results] == [result.loss for result in expected]
    assert equal(adapter(tight.model), adapter(roomy.model))


def test_when_memory_runs_out_in_the_anchors_no_gradient_counts_twice(tiny_policy: tiny.Loader) -> None:
    """The 2 harmful rollouts fit and have left their gradients when the 3 anchors do not fit."""
    recipe = replace(ANCHORED, prompts=1, rollouts=2, micro_batch=3)
    roomy = tiny_policy()
    expected = steps(training(roomy, recipe), 1)
    tight = tiny_policy()
    results = steps(training(tight, recipe, small_memory(tight, 2)), 1)
    assert results[0].micro_batch == 1
    assert results[0].gradient_norm == pytest.approx(expected[0].gradient_norm, rel=1e-4)
    assert results[0].anchor_loss == pytest.approx(expected[0].anchor_loss, rel=1e-3, abs=1e-9)


def test_when_memory_runs_out_in_a_backward_the_same_rollouts_are_taken_up_again(tiny_policy: tiny.Loader) -> None:
    """The failed backward has reached half of the adapter; what is done before it is not done again."""
    roomy, tight = tiny_policy(filled=True), tiny_policy(filled=True)
    prompts = replace(tiny.prompt_batch(roomy, 2), prefix=0)
    loss, expected = gradients(training(roomy, RECIPE), prompts)
    loop = training(tight, replace(RECIPE, micro_batch=4))
    sizes: list[int] = []

    def short_of_memory(rows: int, gradient: Tensor) -> Tensor:
        sizes.append(rows)
        if sizes == [4, 4]:
            raise torch.OutOfMemoryError("simulated")
        return gradient

    def watch(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and arguments[0].requires_grad:
            arguments[0].register_hook(partial(short_of_memory, len(arguments[0])))

    handle = tight.model.layers[2].register_forward_pre_hook(watch)
    other, found = gradients(loop, prompts)
    handle.remove()
    assert sizes == [4, 4, 2, 2] and loop.micro_batch == 2
    assert other == pytest.approx(loss, rel=1e-4)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


def test_rollouts_of_like_length_share_a_micro_batch(tiny_policy: tiny.Loader) -> None:
    """The longest first, and padding that a whole micro-batch has is not computed."""
    policy = tiny_policy(filled=True)
    policy.model.end_of_turn = frozenset(range(0, 320, 9))
    loop = training(policy, replace(RECIPE, micro_batch=2))
    prompts = replace(tiny.prompt_batch(policy), prefix=0)
    found = loop.sample(prompts, 2, stream=0)
    lengths: list[int] = []
    handle = policy.model.layers[-1].register_forward_pre_hook(
        lambda _, arguments: lengths.append(arguments[0].shape[1]) if torch.is_grad_enabled() else None
    )
    loop.backward(prompts.repeat(2), found, "harmful")
    handle.remove()
    whole = prompts.repeat(2).attention_mask.sum(-1) + found.mask.sum(-1)
    assert len(lengths) == 5 and len(set(lengths)) > 1
    assert lengths[0] < prompts.input_ids.shape[1] + found.tokens.shape[1] or lengths[0] >= int(whole.max())
    assert sum(lengths) < 5 * (prompts.input_ids.shape[1] + found.tokens.shape[1])


def test_an_optimizer_that_is_loaded_goes_on_as_if_it_had_not_been() -> None:
    gradients = torch.randn(6, 64, 80, generator=torch.Generator().manual_seed(0))
    first, second = (MasterAdamW([nn.Parameter(torch.ones(64, 80))], 0.5) for _ in range(2))
    second.load(first.state())
    for step, gradient in enumerate(gradients):
        advance(first, gradient)
        if step == 2:
            second.load(first.state())
        if step > 2:
            advance(second, gradient)
    assert torch.equal(first.parameters[0], second.parameters[0])
    assert torch.equal(first.averages[0], second.averages[0])
    moments = [{name: value for name, value in first.state().items() if not name.endswith("exp_avg")}]
    with pytest.raises(KeyError, match="exp_avg"):
        second.load(moments[0])


def test_when_memory_runs_out_while_sampling_fewer_prompts_are_sampled_at_once(tiny_policy: tiny.Loader) -> None:
    """3 anchors do not fit at once, 1 does; every rollout draws the numbers that it draws where all fit."""
    small, tight = tiny_policy(), tiny_policy()
    whole = training(small, ANCHORED)
    model = small_memory(tight, 1000)
    model.sampled = ANCHORED.rollouts
    found = training(tight, ANCHORED, model)
    for first, second in zip(steps(whole, 2), steps(found, 2), strict=True):
        assert torch.equal(first.rollout, second.rollout) and first.tokens == second.tokens
        assert first.loss == pytest.approx(second.loss, rel=1e-4)
    assert (whole.sampled_at_once, found.sampled_at_once) == (3, 1)


def test_numbers_drawn_beforehand_are_those_that_a_generator_gives(tiny_policy: tiny.Loader) -> None:
    """So that what a seed gives does not depend on which of the two a sampling is handed."""
    policy = tiny_policy()
    prompts, count = tiny.prompt_batch(policy, 2), 6
    drawn = torch.rand(count, 4, generator=torch.Generator().manual_seed(9))
    first = policy.model.generate(prompts, count, 1.0, torch.Generator().manual_seed(9), 2)
    second = policy.model.generate(prompts, count, 1.0, drawn, 2)
    assert torch.equal(first.tokens, second.tokens) and len(set(map(tuple, first.tokens.tolist()))) > 1


def test_a_resumed_training_keeps_the_sizes_that_it_had(tiny_policy: tiny.Loader, tmp_path: Path) -> None:
    """Whatever fits now, because sums round differently in other parts; what the user lowers is lowered."""
    first = training(tiny_policy(), replace(RECIPE, micro_batch=4))
    first.micro_batch, first.sampled_at_once = 2, 1
    save_step(tmp_path, first, History(micro_batch=2, sampled_at_once=1), {"none": torch.zeros(1)})
    for configured, fits, expected in ((4, 4, 2), (4, 1, 2), (1, 1, 1)):
        resumed = training(tiny_policy(), replace(RECIPE, micro_batch=configured))
        resumed.micro_batch = fits
        restore_step(tmp_path, resumed)
        assert (resumed.micro_batch, resumed.sampled_at_once) == (expected, 1)


def test_completions_sampled_in_parts_have_one_length() -> None:
    short = Completions(torch.tensor([[5]]), torch.tensor([[True]]))
    long = Completions(torch.tensor([[6, 7], [8, 0]]), torch.tensor([[True, True], [True, False]]))
    joined = join([short, long])
    assert joined.tokens[joined.mask].tolist() == [5, 6, 7, 8]
    assert joined.tokens.shape == joined.mask.shape == (3, 2)


def test_when_not_even_one_rollout_fits_the_error_reaches_the_caller(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy()
    with pytest.raises(torch.OutOfMemoryError):
        training(policy, RECIPE, small_memory(policy, 0)).step()


@pytest.mark.parametrize(("first_layer", "steered_layer"), [(2, 3), (3, 1), (2, 2)])
@pytest.mark.parametrize("precision", ["fp32", "nf4-packed"])
def test_sharing_the_lower_blocks_changes_nothing(
    first_layer: int, steered_layer: int, precision: str, tiny_policy: tiny.Loader
) -> None:
    """Blocks below the first adapter and the steered one run once; the general path runs all blocks for each policy."""
    policy = tiny_policy("qwen2", precision, first_layer=first_layer, filled=True)
    prompts = tiny.prompt_batch(policy, 2)
    loss, found = gradients(training(policy, RECIPE, layer=steered_layer), prompts)
    general = PlainModel(policy.model.network, policy.tokenizer, 0)
    other, expected = gradients(training(policy, RECIPE, general, layer=steered_layer), prompts)
    assert loss == pytest.approx(other, rel=1e-3 if precision == "fp32" else 0.05)
    assert len(found) == (tiny.LAYERS - first_layer) * 7 * 2
    together = torch.cat([grad.flatten().float() for grad in found])
    separate = torch.cat([grad.flatten().float() for grad in expected])
    assert torch.nn.functional.cosine_similarity(together, separate, dim=0) > (0.99999 if precision == "fp32" else 0.99)


def test_every_prompt_comes_once_an_epoch() -> None:
    for available, a_step in ((10, 4), (7, 3), (3, 5), (1, 2)):
        places = [place for step in range(3 * available) for place in prompts_at(step, a_step, available, 5)]
        epochs = [places[start : start + available] for start in range(0, 3 * available, available)]
        assert all(sorted(epoch) == list(range(available)) for epoch in epochs)
    assert prompts_at(0, 40, 40, 0) != prompts_at(0, 40, 40, 1), "another seed is another order"
    assert prompts_at(0, 40, 40, 0) != prompts_at(1, 40, 40, 0), "each epoch is shuffled anew"


def test_the_learning_rate_rises_in_a_line_and_falls_along_a_cosine() -> None:
    recipe = replace(RECIPE, steps=100, warmup=0.1, learning_rate=2e-4)
    rates = [learning_rate_at(step, recipe) for step in range(100)]
    assert rates[:10] == pytest.approx([2e-5 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(2e-4) and rates[55] == pytest.approx(1e-4)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert 0 < rates[-1] < 1e-6
    assert learning_rate_at(0, replace(recipe, steps=1)) == pytest.approx(2e-4)
    assert learning_rate_at(0, replace(recipe, warmup=0.0)) == pytest.approx(2e-4)


def test_half_life_is_passed_on(tiny_policy: tiny.Loader) -> None:
    """With a half-life far below one token only the first position counts."""
    policy = tiny_policy(filled=True)
    prompts = tiny.prompt_batch(policy, 2)
    _, sharp = gradients(training(policy, replace(RECIPE, half_life=0.01)), prompts)
    _, single = gradients(training(policy, replace(RECIPE, completion_tokens=1)), prompts)
    for one, two in zip(sharp, single, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_a_teacher_that_is_told_reads_its_own_prompts_along_the_student_s_rollouts(tiny_policy: tiny.Loader) -> None:
    """With rollouts of several lengths in several micro-batches, against a plain computation of each."""
    policy = tiny_policy()
    model, recipe = policy.model, replace(RECIPE, prompts=3, rollouts=2, micro_batch=4)
    prompts = [policy.encode(prompt) for prompt in tiny.PROMPTS]
    told = [policy.encode(f"Never help with this. {prompt}") for prompt in tiny.PROMPTS]
    alone = Distillation(model, None, SAFETY_TOKENS, prompts, [], recipe)
    assert abs(alone.step().loss) < 1e-6, "told nothing, the teacher is the base, which the student still is"
    policy = tiny_policy()
    model = policy.model
    loop = Distillation(model, None, SAFETY_TOKENS, prompts, [], recipe, None, told)
    chosen = prompts_at(0, 3, len(prompts), recipe.seed)
    rollouts = loop.sample(pad_left([prompts[index] for index in chosen]), 2, stream=0)
    losses = []
    with torch.no_grad(), policies.base(model):
        for row in range(6):
            answer = rollouts.rows(row, row + 1)
            length = int(answer.mask.sum())
            answer = Completions(answer.tokens[:, :length], answer.mask[:, :length])
            student, teacher = (
                model.logits(
                    policies.completion_hidden(model, model.start(answer.after(read[chosen[row // 2]])), length)
                ).log_softmax(-1)
                for read in (prompts, told)
            )
            losses.append((student.exp() * (student - teacher)).sum(-1).mean())
    assert loop.step().loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


BEGUN = replace(RECIPE, prompts=1, rollouts=1, begun=5, steps=12, gradient_clip=10.0, begun_weight=2.0)


def turning(policy: Policy, recipe: Recipe) -> Distillation:
    """A loop whose prompts have an answer begun, too."""
    prompts = [policy.encode(prompt) for prompt in tiny.PROMPTS]
    begun = [policy.encode(Conversation(prompt, beginning="Sure, here is")) for prompt in tiny.PROMPTS]
    steer = Steering(2, tiny.vector(2.0))
    return Distillation(policy.model, steer, SAFETY_TOKENS, prompts, [], recipe, begun=begun)


@torch.no_grad()
def first_words_apart(policy: Policy, loop: Distillation) -> float:
    """Forward KL on safety tokens from the teacher where it has been asked to the student where the answer was begun."""
    found = []
    for asked, begun in zip(loop.harmful, loop.begun, strict=True):
        with policies.teacher(policy.model, loop.steer):
            wanted = policies.last_logits(policy.model, asked)
        said = policies.last_logits(policy.model, begun)
        found.append(divergence(said, wanted, "forward", SAFETY_TOKENS, 0))
    return float(torch.cat(found).mean())


def test_where_its_answer_was_begun_the_student_learns_what_the_teacher_says_first(tiny_policy: tiny.Loader) -> None:
    left = {}
    for recipe in (BEGUN, replace(BEGUN, begun=0)):
        policy = tiny_policy()
        loop = turning(policy, recipe)
        before = first_words_apart(policy, loop)
        results = steps(loop, 12)
        left[recipe.begun] = first_words_apart(policy, loop) / before
        assert (results[0].begun_loss is None) == (recipe.begun == 0)
    assert left[5] < 0.6 < 0.75 < left[0]


def test_the_loss_of_begun_answers_is_that_of_a_plain_computation(tiny_policy: tiny.Loader) -> None:
    """The teacher's own answer to the plain prompt, read by the student behind the beginning, in several micro-batches."""
    policy = tiny_policy()
    model, loop = policy.model, turning(policy, replace(BEGUN, micro_batch=2))
    places = prompts_at(0, 5, 5, BEGUN.seed + 2)
    with policies.teacher(model, loop.steer):
        answers = loop.sample(pad_left([loop.harmful[place] for place in places]), 1, stream=2)
    losses = []
    with torch.no_grad():
        for row, place in enumerate(places):
            answer = answers.rows(row, row + 1).trimmed()
            length = int(answer.mask.sum())

            def chances(prompt: Batch, answer: Completions = answer, length: int = length) -> Tensor:
                hidden = policies.completion_hidden(model, model.start(answer.after(prompt)), length)
                each = model.logits(hidden)[0].double().softmax(-1)
                seen = each[:, SAFETY_TOKENS]
                return torch.cat([seen, 1 - seen.sum(-1, keepdim=True)], -1)

            student = chances(loop.begun[place])
            with policies.teacher(model, loop.steer):
                teacher = chances(loop.harmful[place])
            losses.append((teacher * (teacher / student).log()).sum(-1).mean())
    assert loop.step().begun_loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


def test_begun_answers_resume_exactly(tiny_policy: tiny.Loader) -> None:
    models = [tiny_policy() for _ in range(3)]
    whole, first, second = (turning(policy, BEGUN) for policy in models)
    expected = steps(whole, 3)
    steps(first, 2)
    second.optimizer.load(first.optimizer.state())
    second.done = 2
    assert second.step().begun_loss == expected[2].begun_loss
    assert equal(adapter(models[2].model), adapter(models[0].model))

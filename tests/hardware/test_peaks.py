"""The memory of each piece of work, counted on the real code: every formula within a tenth of the bytes that are alive."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safesteer_lite.hardware.backend import smallest_need
from safesteer_lite.hardware.peaks import (
    Demand,
    adapted_layers,
    adapter_bytes,
    block_bytes,
    cache_bytes,
    kept_block_bytes,
    kl_bytes,
    mask_bytes,
    sampling_bytes,
    solving_bytes,
    training_bytes,
    vote_bytes,
)
from safesteer_lite.hardware.shape import ModelShape, shape_from_config
from safesteer_lite.method.discriminant import RunningMean, reading_directions
from safesteer_lite.method.distill import Distillation
from safesteer_lite.method.policies import Batch, Steering, last_logits
from safesteer_lite.method.tokens import VotePositions, vote
from safesteer_lite.models import plain
from safesteer_lite.models.adapter import Adapter, with_adapter
from safesteer_lite.models.loaded import PlainModel
from safesteer_lite.models.reference import kl_of_states
from safesteer_lite.sources.base import open_base
from tests import tiny
from tests.live_bytes import LiveBytes
from tests.recipe import RECIPE

SIZES: dict[str, dict[str, int]] = {
    "small": {"width": 128, "intermediate": 448, "layers": 4, "heads": 4, "kv_heads": 1, "vocabulary": 3000},
    "large": {"width": 256, "intermediate": 704, "layers": 6, "heads": 8, "kv_heads": 4, "vocabulary": 5000},
}
DEMAND = Demand(rank=4, depth_start=0.34, completion_tokens=24, chunk=32)
TENTH = 0.1


@dataclass(frozen=True)
class Sized:
    """A model of random weights, and its shape."""

    model: PlainModel
    shape: ModelShape

    @property
    def first(self) -> int:
        """The lowest block with an adapter."""
        return self.shape.layers - adapted_layers(self.shape, DEMAND)


@pytest.fixture(
    scope="module", params=[(size, precision) for size in SIZES for precision in ("bf16", "nf4")], ids="-".join
)
def sized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sized:
    """Loaded as a run loads it, in each size, plain and packed."""
    size, precision = request.param
    return load("qwen2", size, precision, tmp_path_factory.mktemp("model"))


def load(family: str, size: str, precision: str, folder: Path) -> Sized:
    """A model of random weights, as a run loads it."""
    numbers = SIZES[size]
    tiny.save_model(
        folder,
        family,
        layers=numbers["layers"],
        width=numbers["width"],
        intermediate_size=numbers["intermediate"],
        num_attention_heads=numbers["heads"],
        num_key_value_heads=numbers["kv_heads"],
        head_dim=numbers["width"] // numbers["heads"],
        vocab_size=numbers["vocabulary"],
    )
    shape = shape_from_config(json.loads((folder / "config.json").read_text()))
    network, tokenizer = plain.load(open_base(folder), precision=precision, device="cpu", unpack=False)
    adapter = Adapter(DEMAND.rank, 2 * DEMAND.rank, shape.layers - adapted_layers(shape, DEMAND))
    model = with_adapter(network, tokenizer, adapter, 0)
    model.checkpointing = True
    return Sized(model, shape)


def batch(rows: int, tokens: int, ceiling: int = 300) -> Batch:
    """Prompts of random tokens, of which one is shorter, as there always is one."""
    ids = torch.randint(5, ceiling, (rows, tokens), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return Batch(ids, mask)


def freeze(sized: Sized, reading: bool) -> None:
    """Whether what the adapter reads is left as it is, or trained."""
    for name, parameter in sized.model.network.named_parameters():
        parameter.requires_grad_("lora_B" in name or ("lora_A" in name and not reading))


def counted(work: Callable[[], object]) -> int:
    """The most bytes that were alive at once."""
    with LiveBytes() as live:
        work()
    return live.peak


@pytest.mark.parametrize(("prompt", "completion"), [(60, 4), (12, 40)], ids=["prompts", "answers"])
def test_sampling(sized: Sized, prompt: int, completion: int) -> None:
    """Where the prompts take most, and where the cache does."""
    generator = torch.Generator().manual_seed(0)
    with sized.model.adapters_off():
        found = counted(lambda: sized.model.generate(batch(8, prompt), completion, 1.0, generator, 1))
    assert sampling_bytes(sized.shape, 8, prompt, completion, 2) == pytest.approx(found, rel=TENTH)


@pytest.mark.parametrize("adapted", [False, True])
def test_one_forward(sized: Sized, adapted: bool) -> None:
    with torch.no_grad():
        if adapted:
            found = counted(lambda: last_logits(sized.model, batch(8, 60)))
        else:
            with sized.model.adapters_off():
                found = counted(lambda: last_logits(sized.model, batch(8, 60)))
    assert block_bytes(sized.shape, 8, 60, 2, adapted=adapted) == pytest.approx(found, rel=TENTH)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "phi3"])
def test_blocks_of_other_families(family: str, tmp_path: Path) -> None:
    """With bounded products, norms on queries and keys or behind the MLP, two kinds of masks, fused layers."""
    sized = load(family, "small", "bf16", tmp_path)
    for adapted in (False, True):
        test_one_forward(sized, adapted)
    for checkpointing in (True, False):
        test_a_training_step(sized, "full", 8, 1, checkpointing, reading=True)
    test_a_training_step(sized, "full", 8, 1, True, reading=False)


def test_one_block_whose_linear_layers_inputs_are_kept(sized: Sized) -> None:
    kept: list[Tensor] = []
    modules = sized.model.adapted_modules(sized.first)
    hooks = [module.register_forward_pre_hook(lambda _, given: kept.append(given[0])) for module in modules]
    with torch.no_grad(), sized.model.adapters_off():
        found = counted(lambda: sized.model.advance(sized.model.start(batch(8, 60)), sized.first + 1))
    for hook in hooks:
        hook.remove()
    assert kept_block_bytes(sized.shape, 8, 60, 2) == pytest.approx(found, rel=TENTH)


@pytest.mark.parametrize(("tokens", "width"), [(400, 200), (200, 700)])
def test_solving_for_reading_directions(tokens: int, width: int) -> None:
    mean, ends = RunningMean(), torch.randn(4, 2, width)
    mean.add(ends)
    read = torch.randn(tokens, width).bfloat16()
    # As it arrives, and then as it is worked on.
    found = counted(lambda: reading_directions([ends + 1], mean.value, read.clone().float(), 0.1))
    assert solving_bytes(tokens, width) == pytest.approx(found, rel=TENTH)


@pytest.mark.parametrize("reading", [True, False], ids=["directions", "random"])
@pytest.mark.parametrize(
    ("objective", "rows", "chunk", "checkpointing"),
    [("full", 4, 32, True), ("rest-bucket", 4, 32, True), ("full", 8, 1, True), ("full", 8, 1, False)],
)
def test_a_training_step(
    sized: Sized, objective: Any, rows: int, chunk: int, checkpointing: bool, reading: bool
) -> None:
    """Where the logits of a chunk take most, where a block in backward does, and where all blocks do; with what the adapter
    reads computed beforehand and frozen, and drawn at random and trained."""
    sized.model.checkpointing = checkpointing
    freeze(sized, reading)
    demand = replace(DEMAND, chunk=chunk, full_loss=objective == "full", reading=reading)
    loop, prompts = training(sized, objective, chunk), batch(rows, 40)
    answers = tiny.fixed_completions(rows, prompts.input_ids.device, DEMAND.completion_tokens)
    found = counted(lambda: loop.backward(prompts, answers, "harmful"))
    formula = training_bytes(
        sized.shape,
        demand,
        micro_batch=rows,
        tokens=40 + DEMAND.completion_tokens,
        completion_tokens=DEMAND.completion_tokens,
        element=2,
        checkpointing=checkpointing,
    )
    assert formula == pytest.approx(found, rel=TENTH)


@pytest.mark.parametrize("sized", [(size, "bf16") for size in SIZES], indirect=True, ids=list(SIZES))
def test_the_smallest_work_keeps_activations_where_a_processor_does(sized: Sized) -> None:
    """What decides whether a run begins on a CPU must know that blocks are not recomputed there unless that is asked for."""
    demand = replace(DEMAND, reading=False, chunk=1, completion_tokens=512)
    sized.model.checkpointing = demand.recomputes("cpu")
    freeze(sized, demand.reading)
    loop = training(sized, "rest-bucket", demand.chunk)
    answers = tiny.fixed_completions(2, sized.model.device, demand.completion_tokens).rows(1, 2)
    found = counted(lambda: loop.backward(batch(1, 128), answers, "harmful"))
    need = smallest_need(sized.shape, "cpu", "bf16", False, "bf16", demand)
    beside = need.weights_bytes + adapter_bytes(sized.shape, demand, 2)
    # A rollout alone has no padding, so that it needs no mask.
    beside += mask_bytes(sized.shape, 1, 128 + demand.completion_tokens, 2)
    assert need.memory_bytes["distill"] - beside == pytest.approx(found, rel=TENTH)
    asked = replace(demand, checkpointing="yes")
    on_card, recomputed = (
        smallest_need(sized.shape, device, "bf16", False, "bf16", asked) for device in ("cuda", "cpu")
    )
    assert on_card == recomputed and recomputed.peak_bytes < need.peak_bytes


@pytest.mark.parametrize("reading", [True, False], ids=["directions", "random"])
def test_the_adapter_and_its_optimizer(sized: Sized, reading: bool) -> None:
    freeze(sized, reading)
    weights = [value for name, value in sized.model.network.named_parameters() if "lora_" in name]

    def update() -> None:
        loop = training(sized, "full", 32)
        # On a card torch updates all weights together.
        loop.optimizer.optimizer.param_groups[0]["foreach"] = True
        for _ in range(2):
            loop.optimizer.add([torch.ones_like(parameter) for parameter in loop.optimizer.parameters])
        loop.optimizer.step(1e-3, 1.0)

    found = counted(update) + sum(value.nbytes for value in weights)
    assert adapter_bytes(sized.shape, replace(DEMAND, reading=reading), 2) == pytest.approx(found, rel=TENTH)


def test_the_kl_and_the_vote(sized: Sized) -> None:
    states = torch.randn(2, 64, sized.shape.width, dtype=torch.bfloat16)
    with torch.no_grad():
        found = counted(lambda: kl_of_states(states[0], states[1], sized.model.logits, 32))
    assert kl_bytes(sized.shape, DEMAND) == pytest.approx(found, rel=TENTH)
    positions = VotePositions(states[0], states[1], torch.zeros(64, dtype=torch.long))
    found = counted(
        lambda: vote(
            [positions],
            sized.model.logits,
            by="mass",
            excluded=frozenset({0}),
            minimum_probability=0.0,
            ballots=20,
            count=10,
            chunk=32,
        )
    )
    assert vote_bytes(sized.shape, DEMAND) == pytest.approx(found, rel=TENTH)


def test_the_cache(sized: Sized) -> None:
    from transformers import DynamicCache

    cache, prompts = DynamicCache(), batch(2, 7)
    with torch.no_grad():
        sized.model.decoder(input_ids=prompts.input_ids, past_key_values=cache, use_cache=True)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(sized.shape, 2, 7, 2) == real


def training(sized: Sized, objective: Any, chunk: int) -> Distillation:
    """A loop over nothing."""
    recipe = replace(
        RECIPE,
        objective=objective,
        completion_tokens=DEMAND.completion_tokens,
        averaging=0.8,
        learning_rate=1e-3,
        warmup=0.0,
        chunk=chunk,
    )
    steer = Steering(sized.shape.layers - 1, torch.zeros(sized.shape.width))
    return Distillation(sized.model, steer, torch.arange(20, 70), [], [], recipe)

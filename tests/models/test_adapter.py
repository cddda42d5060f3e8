"""The adapter: what is written into it fits to the last weight, or is refused and leaves it as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safesteer_lite.errors import ModelError
from safesteer_lite.method import policies
from safesteer_lite.models.adapter import adapter_tensors, freeze_reading, load_adapter, read_adapter, save_adapter
from tests import tiny

Tensors = dict[str, Tensor]


def first(tensors: Tensors) -> str:
    return sorted(tensors)[0]


def renamed(tensors: Tensors) -> Tensors:
    return {name if name != first(tensors) else f"{name}_other": value for name, value in tensors.items()}


def added(tensors: Tensors) -> Tensors:
    return {**tensors, "lora_A.of.something": torch.ones(2)}


def left_out(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if name != first(tensors)}


def reshaped(tensors: Tensors) -> Tensors:
    return {**tensors, first(tensors): tensors[first(tensors)].T.contiguous()}


def not_a_number(tensors: Tensors) -> Tensors:
    return {**tensors, first(tensors): torch.full_like(tensors[first(tensors)], torch.nan)}


FAULTS: dict[Callable[[Tensors], Tensors], str] = {
    renamed: r"only in one of them, one of 2 such weights",
    added: r"lora_A\.of\.something is only in one of them",
    left_out: r"only in one of them, one of 1 such",
    reshaped: r"has the shape \(128, 4\) instead of \(4, 128\)",
    not_a_number: r"not finite: .*layers\.0\.",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("road", ["memory", "file"])
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(
    fault: Callable[[Tensors], Tensors], road: str, tiny_policy: tiny.Loader, tmp_path: Path
) -> None:
    model = tiny_policy(filled=True).model
    before = adapter_tensors(model)
    with pytest.raises(ModelError, match=FAULTS[fault]):
        if road == "memory":
            load_adapter(model, fault(before))
        else:
            save_adapter(model, tmp_path)
            path = tmp_path / "adapter_model.safetensors"
            save_file(fault(load_file(path)), path)
            read_adapter(model, tmp_path)
    after = adapter_tensors(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_that_is_damaged_or_missing_is_told(tiny_policy: tiny.Loader, tmp_path: Path) -> None:
    model = tiny_policy().model
    for content in (None, b"", b"\xff" * 50):
        if content is not None:
            (tmp_path / "adapter_model.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match=r"adapter_model\.safetensors cannot be read \(.+\)"):
            read_adapter(model, tmp_path)


def test_both_roads_bring_the_same_weights_back(tiny_policy: tiny.Loader, tmp_path: Path) -> None:
    trained = tiny_policy(filled=True, first_layer=1).model
    known = adapter_tensors(trained)
    save_adapter(trained, tmp_path)
    for fill in (lambda model: load_adapter(model, known), lambda model: read_adapter(model, tmp_path)):
        fresh = tiny_policy(first_layer=1).model
        fill(fresh)
        found = adapter_tensors(fresh)
        assert found.keys() == known.keys() and all(torch.equal(found[name], known[name]) for name in known)


def test_what_is_frozen_stays_frozen_when_the_adapter_is_switched_off_and_on(tiny_policy: tiny.Loader) -> None:
    """peft has both matrices trained again, and a trained A keeps its input for the backward pass."""
    policy = tiny_policy()
    model, batch = policy.model, tiny.prompt_batch(policy)
    freeze_reading(model)
    trained = model.parameters_to_train()
    kept: list[int] = []
    for _ in range(2):
        kept.append(0)

        def note(tensor: Tensor) -> Tensor:
            kept[-1] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            policies.last_logits(model, batch)
        with policies.base(model), policies.base(model):
            assert not model.parameters_to_train()
        assert [id(part) for part in model.parameters_to_train()] == [id(part) for part in trained]
    assert kept[0] == kept[1] > 0

"""Weights read back block by block are judged as the whole model is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safesteer_lite.export.weights.reload import compare_reloaded
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.reference import Reference, kl_to_reference, reference_answers
from tests import tiny
from tests.live_bytes import LiveBytes

TOKENS = 12


def reference(policy: Policy) -> Reference:
    return reference_answers(policy, tiny.PROMPTS, TOKENS, 3)


def changed(folder: Path, scale: float) -> Path:
    """A model's weights, most of them a little off."""
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(4)
    for name, value in weights.items():
        if name.endswith("proj.weight"):
            weights[name] = value + scale * torch.randn(value.shape, generator=generator).to(value)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("architecture", [*tiny.ARCHITECTURES, "gemma2", "phi3"])
def test_the_figures_are_those_of_the_model_loaded_as_a_whole(architecture: str, tied: bool, tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", architecture, tied=tied)
    trained = reference(tiny.load_policy(folder, "fp32"))
    assert compare_reloaded(folder, trained, 16) == (pytest.approx(0, abs=1e-6), len(tiny.PROMPTS))
    whole = tiny.load_policy(changed(folder, 0.02), "fp32")
    kl, same = compare_reloaded(folder, trained, 16)
    assert kl == pytest.approx(kl_to_reference(whole, trained, 16), rel=1e-3)
    assert kl > 1e-3
    assert same == sum(answers_alike(trained, reference(whole))) < len(tiny.PROMPTS)


def test_a_policy_in_16_bits_is_compared_in_16_bits(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", "qwen2")
    trained = reference(tiny.load_policy(folder, "bf16"))
    kl, same = compare_reloaded(folder, trained, 16)
    assert kl < 1e-3 and same == len(tiny.PROMPTS)
    whole = tiny.load_policy(changed(folder, 0.02), "bf16")
    assert compare_reloaded(folder, trained, 16)[0] == pytest.approx(kl_to_reference(whole, trained, 16), rel=0.01)


def answers_alike(first: Reference, second: Reference) -> list[bool]:
    def answers(which: Reference) -> list[list[int]]:
        return [
            row[mask].tolist() for _, rows in which.batches for row, mask in zip(rows.tokens, rows.mask, strict=True)
        ]

    return [one == two for one, two in zip(answers(first), answers(second), strict=True)]


def test_no_more_than_a_block_or_the_vocabulary_is_in_memory_at_a_time(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", "llama", layers=12, width=128)
    sizes = {name: value.nbytes for name, value in load_file(folder / "model.safetensors").items()}
    block = sum(size for name, size in sizes.items() if ".layers.3." in name)
    trained = reference(tiny.load_policy(folder, "fp32"))
    with LiveBytes() as live:
        compare_reloaded(folder, trained, 16)
    assert block < live.peak < 3 * block < sum(sizes.values()) / 3

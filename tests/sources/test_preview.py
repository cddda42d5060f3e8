"""A look at a hub model: its size before its weights come, and the hub's refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from safesteer_lite.errors import ModelError
from safesteer_lite.sources.preview import Look, look
from tests.sources.local_hub import HUB_ID, LocalHub

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}


def test_a_look_reads_the_settings_and_leaves_the_weights(hub: type[LocalHub], model_folder: Path) -> None:
    weights = (model_folder / "model.safetensors").read_bytes()
    hub.files.update({"config.json": json.dumps(CONFIG).encode(), "model.safetensors": weights})
    found: Look = look(HUB_ID)
    assert (found.shape.layers, found.licence, found.gated, found.download_bytes) == (3, "mit", False, len(weights))
    assert "model.safetensors" not in hub.asked


@pytest.mark.parametrize(
    ("refusal", "said"), [("GatedRepo", "gated.*hf auth login"), ("RepoNotFound", "no model of this name.*spelling")]
)
def test_a_refusal_says_what_to_do(hub: type[LocalHub], refusal: str, said: str) -> None:
    hub.files["config.json"] = json.dumps(CONFIG).encode()
    hub.refusal = refusal
    with pytest.raises(ModelError) as caught:
        look(HUB_ID)
    assert re.search(said, str(caught.value))


def test_a_mixture_of_experts_is_refused_before_its_weights_come(hub: type[LocalHub]) -> None:
    hub.files.update({"config.json": json.dumps({**CONFIG, "num_local_experts": 8}).encode(), "model.safetensors": b""})
    with pytest.raises(ModelError, match="mixture of experts"):
        look(HUB_ID)


def test_a_config_that_is_no_json(hub: type[LocalHub]) -> None:
    hub.files.update({"config.json": b"{", "model.safetensors": b""})
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        look(HUB_ID)

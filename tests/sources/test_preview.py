"""A look at a hub model: its size before its weights come, and the hub's refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from safesteer_lite.errors import ModelError
from safesteer_lite.events import discard
from safesteer_lite.sources.preview import Look, look
from safesteer_lite.sources.resolve import resolve_model
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


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 8}, r"experts.*MixtralForCausalLM\)\.$"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128}, "one tensor"),
        ({"architectures": ["GptOssForCausalLM"], "num_local_experts": 32}, "one tensor"),
        ({"architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 256}, "one tensor"),
        (
            {"architectures": ["Llama4ForConditionalGeneration"], "text_config": {"num_local_experts": 16}},
            "one tensor",
        ),
        (
            {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": {}},
            r"more than text.*google/gemma-3-1b-it\. Supported",
        ),
        (
            {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "text_config": {}},
            "more than text.*Mistral-7B-Instruct-v0.3",
        ),
        (
            {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl"},
            "more than text.*Qwen2.5-7B",
        ),
        ({"architectures": ["Phi4MMForCausalLM"], "audio_config": {}}, "more than text.*reads text alone. Supported"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "which is not supported"),
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "MambaForCausalLM, which is not supported"),
    ],
    ids=lambda value: str(value["architectures"][0]) if isinstance(value, dict) else "",
)
def test_what_cannot_be_trained_is_told_from_its_settings_alone(
    config: dict[str, object], said: str, hub: type[LocalHub], model_folder: Path
) -> None:
    """When it is chosen, and when it would be fetched: one sentence with the reason, and no weights."""
    weights = (model_folder / "model.safetensors").read_bytes()
    words = {name: (model_folder / name).read_bytes() for name in ("tokenizer.json", "chat_template.jinja")}
    hub.files.update({**words, "config.json": json.dumps(config).encode(), "model.safetensors": weights})
    for refused in (lambda: look(HUB_ID), lambda: resolve_model(HUB_ID, None, discard)):
        with pytest.raises(ModelError) as caught:
            refused()
        assert re.search(said, f"{caught.value.message}\n{caught.value.hint}", re.MULTILINE | re.DOTALL)
        assert "\n" not in caught.value.message
    assert "config.json" in hub.asked and "model.safetensors" not in hub.asked


def test_a_config_that_is_no_json(hub: type[LocalHub]) -> None:
    hub.files.update({"config.json": b"{", "model.safetensors": b""})
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        look(HUB_ID)

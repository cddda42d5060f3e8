"""A GGUF comes out as the model it was made from, or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from safesteer_lite.errors import ModelError
from safesteer_lite.events import discard
from safesteer_lite.sources.gguf_folder import write_folder
from tests.sources.tiny_gguf import tiny_network, write_gguf

pytestmark = pytest.mark.usefixtures("offline")


def test_embeddings_that_differ_stay_two_matrices(tmp_path: Path) -> None:
    network = tiny_network(tied=False)
    write_gguf(tmp_path / "untied.gguf", network)
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "untied.gguf", tmp_path / "out", "tiny/untied", discard, "model")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], network.lm_head.weight)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="untied.gguf", dtype=torch.float32)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value.to(torch.bfloat16).float()), name


@pytest.mark.parametrize(
    ("architecture", "skip", "named"),
    [("llama", "", "llama"), ("qwen2", "blk.1.attn_q.bias", "model.layers.1.self_attn.q_proj.bias")],
)
def test_gguf_that_cannot_be_read_is_refused(tmp_path: Path, architecture: str, skip: str, named: str) -> None:
    write_gguf(tmp_path / "odd.gguf", tiny_network(tied=True), architecture, skip)
    with pytest.raises(ModelError, match=named.replace(".", r"\.")):
        write_folder(tmp_path / "odd.gguf", tmp_path, "tiny/odd", discard, "model")

"""Tiny models as GGUF files, and what a folder made from one must hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>"]


SIZES: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
# As in Llama 3.2: with these heads, the first two of four waves stay, one is stretched in part and one in full.
STRETCHED = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}
PRE = {"qwen2": "qwen2", "qwen3": "qwen2", "llama": "llama-bpe"}


def _config(kind: str, tied: bool) -> PretrainedConfig:
    plain = {"rope_type": "default", "rope_theta": 1e6}
    match kind:
        case "qwen3":  # Its heads are wider than its width divides into.
            return Qwen3Config(**SIZES, head_dim=16, rope_parameters=plain, tie_word_embeddings=tied)
        case "llama":
            return LlamaConfig(**SIZES, rope_parameters=STRETCHED, tie_word_embeddings=tied)
    return Qwen2Config(**SIZES, rope_parameters=plain, tie_word_embeddings=tied)


def tiny_network(tied: bool, kind: str = "qwen2") -> Any:
    torch.manual_seed(7)
    network = AutoModelForCausalLM.from_config(_config(kind, tied))
    for parameter in network.parameters():  # Not `network.to`, which would round the rotary frequencies as well.
        parameter.data = parameter.data.normal_(std=0.3).to(torch.bfloat16)
    return network


def write_gguf(
    path: Path,
    network: Any,
    architecture: str = "",
    skip: str = "",
    *,
    pre: str = "",
    template: str | None = TEMPLATE,
    matrices: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    parts: int = 0,
    more: str = "",
) -> None:
    """A GGUF as converters write it: the output embedding always stored, and the rows of Llama's rotary pairs side by side.

    Args:
        path: the file.
        network: what it holds.
        architecture: what it says that it holds; the network's own if empty.
        skip: a tensor to leave out.
        pre: how it says that text is cut; as is usual for the network if empty.
        template: the chat template.
        matrices: in which type; in 32 bits, the input embedding alone is coarser.
        parts: of how many files it says to be one.
        more: a tensor that it has beside those of the network.
    """
    config, kind = network.config, network.config.model_type
    writer = gguf.GGUFWriter(path, architecture or kind)
    if parts:
        writer.add_uint16("split.count", parts)
    writer.add_license("Apache-2.0")
    writer.add_name("Tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if kind == "qwen3":
        writer.add_key_length(head)
    if kind == "llama":
        writer.add_rope_dimension_count(head)
        plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, head, 2) / head)
        writer.add_tensor("rope_freqs.weight", (plain / network.model.rotary_emb.inv_freq).float().numpy())
    writer.add_layer_norm_rms_eps(1e-6)
    letters = ByteLevel.alphabet()
    tokens = [*sorted(letters), "ab", "cd", *SPECIAL]
    tokens += [f"[PAD{index}]" for index in range(len(tokens), config.vocab_size)]
    kinds = [gguf.TokenType.NORMAL] * 258 + [gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.UNUSED] * 26
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre or PRE[kind])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b", "c d"])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    if template:
        writer.add_chat_template(template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.num_hidden_layers)
    for name, tensor in network.state_dict().items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        values = tensor.float().numpy()
        if stored == skip:
            continue
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = values.reshape(-1, 2, head // 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if values.ndim == 2 and matrices != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(stored, gguf.quantize(values, matrices), raw_dtype=matrices)
        elif stored == "token_embd.weight":
            # The input embedding is kept coarser than the output one, as common quantisation recipes do.
            quantised = gguf.quantize(values, gguf.GGMLQuantizationType.Q5_0)
            writer.add_tensor(stored, quantised, raw_dtype=gguf.GGMLQuantizationType.Q5_0)
        else:
            writer.add_tensor(stored, numpy.ascontiguousarray(values))
    if more:
        writer.add_tensor(more, numpy.ones(4, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_settings_of_qwen(folder: Path, rows: int) -> None:
    """What GGUF readers are known to lose."""
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["tie_word_embeddings"] is True and config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {}
    for text in SPECIAL:
        [ids[text]] = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert len(tokenizer) == config["vocab_size"] == rows
    assert set(ids.values()) <= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [ids["<|im_end|>"], ids["<|endoftext|>"]]
    assert generation["pad_token_id"] == ids["<|endoftext|>"]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello, café!"}], tokenize=False)
    assert "<|im_start|>user\nHello, café!<|im_end|>" in text
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def write_adapter(path: Path) -> None:
    """A GGUF file that holds an adapter alone, as far as its header tells."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", numpy.ones((2, 4), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

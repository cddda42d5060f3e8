"""A tiny Qwen2 as a GGUF file, and what a folder made from one must hold."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy
import torch
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>"]


def tiny_network(tied: bool) -> Qwen2ForCausalLM:
    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=288,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=tied,
    )
    network = Qwen2ForCausalLM(config)
    for parameter in network.parameters():  # Not `network.to`, which would round the rotary frequencies as well.
        parameter.data = parameter.data.normal_(std=0.3).to(torch.bfloat16)
    return network


def write_gguf(path: Path, network: Qwen2ForCausalLM, architecture: str = "qwen2", skip: str = "") -> None:
    """A GGUF as converters write it: matrices in 8 bits or more, the output embedding always stored."""
    config = network.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    letters = ByteLevel.alphabet()
    tokens = [*sorted(letters), "ab", "cd", *SPECIAL]
    tokens += [f"[PAD{index}]" for index in range(len(tokens), config.vocab_size)]
    kinds = [gguf.TokenType.NORMAL] * 258 + [gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.UNUSED] * 26
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b", "c d"])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in network.state_dict().items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        values = tensor.float().numpy()
        if stored == skip:
            continue
        if stored == "token_embd.weight":
            # The input embedding is kept coarser than the output one, as common quantisation recipes do.
            quantised = gguf.quantize(values, gguf.GGMLQuantizationType.Q5_0)
            writer.add_tensor(stored, quantised, raw_dtype=gguf.GGMLQuantizationType.Q5_0)
        else:
            writer.add_tensor(stored, numpy.ascontiguousarray(values))
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

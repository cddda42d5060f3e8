"""The JSON files of a model's folder, read once and checked before any library sees them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safesteer_lite.errors import ModelError
from safesteer_lite.hardware.shape import MIXTURE, ModelShape, is_mixture, shape_from_config
from safesteer_lite.runs import durable
from safesteer_lite.sources.folder import AGAIN, Findings, brief, few, read_json
from safesteer_lite.sources.words import words_of

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MistralForCausalLM": "mistral",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Phi3ForCausalLM": "phi3",
}
"""Architectures that the method has been made for, with their model_type: dense decoders whose blocks take and return the
residual stream."""

SUPPORTED_ARCHITECTURES = tuple(FAMILIES)

# What can be trained in place of a model that sees pictures too, by the model_type of that.
_OF_TEXT_ALONE = {
    "gemma3": "google/gemma-3-1b-it",
    "mistral3": "mistralai/Mistral-7B-Instruct-v0.3",
    "mllama": "meta-llama/Llama-3.1-8B-Instruct",
    "llama4": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen2_vl": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2_5_vl": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3_vl": "Qwen/Qwen3-4B-Instruct-2507",
}

# The code of Phi 3 and Phi 4, which transformers has taken over: models of both still name it.
_IN_LIBRARY = {"configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM", "Xenova/gpt-4o"}

PICTURE = "<image_soft_token>"
"""What stands for a picture in the tokenizer of every Gemma 3, and has no row in those that read text alone."""

# What libraries can run or switch on because a settings file says so.
_OWN_CODE = ("auto_map", "custom_pipelines")
_ATTENTION = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")
# The kinds of attention that transformers brings along; any other name is taken for a kernel to be fetched from the model hub.
_KNOWN_ATTENTION = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"}

_END_TOKENS = ("eos_token_id",)
_OTHER_TOKENS = ("bos_token_id", "pad_token_id")
_ORIGINAL = "Use the 16-bit model that it was made from."

# No model of these families comes near; whoever writes more means to see what happens.
_MOST_LAYERS = 1000
_LARGEST_SIZE = 1 << 24
# Large vocabularies with their merges take some tens of megabytes.
_LARGEST_TOKENIZER = 200_000_000


@dataclass(frozen=True)
class Settings:
    """What the JSON files of a model's folder say.

    Attributes:
        config: config.json.
        generation: generation_config.json; empty if there is none.
        shape: the model's size; None where config.json does not tell it, which is among the findings then.
        tokens: the highest token id of the tokenizer plus one; 0 where it is not known.
    """

    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    shape: ModelShape | None
    tokens: int


def check_config(folder: Path) -> ModelShape:
    """The size of a model of which only the settings are here.

    Raises:
        ModelError: names everything in its config.json that this method cannot use.
    """
    findings = Findings(folder)
    _, shape = _read_config(folder, findings)
    findings.report()
    assert shape is not None
    return shape


def check_settings(folder: Path, template: str = "") -> None:
    """Refuse a model by its small files, before its weights are fetched.

    Args:
        folder: where they lie.
        template: the chat template that the user gives; empty for the model's own.

    Raises:
        ModelError: names everything in them that this method cannot use.
    """
    findings = Findings(folder)
    read_settings(folder, findings, words_of(folder, template))
    findings.report()


def read_settings(folder: Path, findings: Findings, words: Path) -> Settings:
    """Read and check config.json, generation_config.json and the tokenizer's files.

    Args:
        folder: where the model lies.
        findings: takes what is wrong with them.
        words: the folder with its tokenizer and chat template.
    """
    config, shape = _read_config(folder, findings)
    generation = read_json(folder, "generation_config.json", findings) or {}
    check_code("generation_config.json", generation, findings)
    if shape:
        _check_token_ids("generation_config.json", generation, shape.vocabulary, findings)
    tokens = _read_tokenizer(words, findings)
    if shape and tokens > shape.vocabulary:
        findings.add(
            f"its tokenizer has {tokens} tokens, and config.json gives the model {shape.vocabulary}",
            "Take tokenizer and weights from the same model, or enlarge the embeddings and save it again.",
        )
    return Settings(config, generation, shape, tokens)


def is_quantised(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that the weights beside it are stored in fewer than 16 bits.

    Some tools leave an empty entry behind, which says nothing.
    """
    return bool(config.get("quantization_config"))


def _read_config(folder: Path, findings: Findings) -> tuple[dict[str, Any], ModelShape | None]:
    config = read_json(folder, "config.json", findings, needed=True)
    if config is None:
        return {}, None
    check_code("config.json", config, findings)
    if not _check_architecture(config, findings):
        # Another kind of model has other settings, and what they say does not matter any more.
        return config, None
    check_attention(config, findings)
    _check_quantisation(config, findings)
    return config, _read_shape(config, findings)


def check_code(name: str, settings: Mapping[str, Any], findings: Findings) -> None:
    """Code that a repository brings along is never run, and a model that expects some would be another without it."""
    for key in _OWN_CODE:
        named = settings.get(key)
        known = isinstance(named, dict) and all(
            isinstance(entry, str) and entry in _IN_LIBRARY for entry in named.values()
        )
        if named and not (known and settings.get("model_type") == "phi3"):
            findings.add(
                f"{name} names Python code of the model's own ({key}), and such code is never run here",
                f"If you know that the model works without it, remove {key} from {name}; otherwise choose another model.",
            )


def _check_architecture(config: Mapping[str, Any], findings: Findings) -> bool:
    """Whether it is one that is supported."""
    advice = f"Supported are {', '.join(SUPPORTED_ARCHITECTURES)}."
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not all(isinstance(name, str) for name in named):
        findings.add(f"config.json names no architecture (architectures is {brief(named)})", advice)
        return False
    architecture = next((name for name in named if name in FAMILIES), None)
    if is_mixture(config):
        findings.add(f"it is {MIXTURE} ({few(named)})", f"Choose a dense model. {advice}")
        return False
    if architecture is None and _reads_more_than_text(config, named):
        other = _OF_TEXT_ALONE.get(str(config.get("model_type")), "")
        findings.add(
            f"it reads more than text ({few(named)}), and only models that read nothing else can be trained",
            f"Choose a model that reads text alone{other and f', such as {other}'}. {advice}",
        )
        return False
    if architecture is None:
        findings.add(f"it has the architecture {few(named)}, which is not supported", advice)
        return False
    family = config.get("model_type")
    if family != FAMILIES[architecture]:
        findings.add(
            f"config.json has the model_type {brief(family)} for {architecture}, whose type is {FAMILIES[architecture]}",
            AGAIN,
        )
    return True


def _reads_more_than_text(config: Mapping[str, Any], named: list[str]) -> bool:
    parts = ("vision_config", "audio_config", "text_config", "thinker_config")
    # What is conditioned on in this name of transformers is a picture or a sound, but for encoders of text, such as T5.
    other_input = any(name.endswith("ForConditionalGeneration") for name in named)
    return any(isinstance(config.get(part), dict) for part in parts) or (
        other_input and not config.get("is_encoder_decoder")
    )


def check_attention(config: Mapping[str, Any], findings: Findings) -> None:
    """Attention whose name transformers does not bring along would be code fetched from the model hub."""
    for key in _ATTENTION:
        value = config.get(key)
        if value is not None and not (isinstance(value, str) and value in _KNOWN_ATTENTION):
            findings.add(
                f"config.json names the attention {brief(value)}, code that would be fetched from elsewhere",
                f"Remove {key} from config.json.",
            )


def _check_quantisation(config: Mapping[str, Any], findings: Findings) -> None:
    for key in ("quantization_config", "compression_config"):
        entry = config.get(key)
        if not entry:
            continue
        if not isinstance(entry, dict):
            findings.add(f"config.json has a {key} that is no table ({brief(entry)})", AGAIN)
            continue
        method = entry.get("quant_method")
        four, eight = (entry.get(f"load_in_{bits}bit", entry.get(f"_load_in_{bits}bit")) for bits in (4, 8))
        if method is None and not four and not eight:
            findings.add(f"config.json has a {key} that does not say how the weights are quantised", AGAIN)
        elif method not in (None, "bitsandbytes") or not four or eight:
            how = "bitsandbytes, 8 bits" if method in (None, "bitsandbytes") else brief(method)
            findings.add(
                f"its weights are quantised ({how}), and only 16-bit and bitsandbytes 4-bit ones can be trained",
                _ORIGINAL,
            )


def _read_shape(config: Mapping[str, Any], findings: Findings) -> ModelShape | None:
    try:
        shape = shape_from_config(config)
    except ModelError as error:
        findings.add(error.message.rstrip("."), error.hint)
        return None
    before = len(findings.problems)
    if "text_config" in config:
        findings.add("it is one part of a model that reads more than text", "Use a model that reads text only.")
    sizes = {
        "num_hidden_layers": (shape.layers, _MOST_LAYERS),
        "hidden_size": (shape.width, _LARGEST_SIZE),
        "intermediate_size": (shape.intermediate, _LARGEST_SIZE),
        "num_attention_heads": (shape.heads, _LARGEST_SIZE),
        "num_key_value_heads": (shape.kv_heads, _LARGEST_SIZE),
        "head_dim": (shape.head_dim, _LARGEST_SIZE),
        "vocab_size": (shape.vocabulary, _LARGEST_SIZE),
    }
    for name, (size, most) in sizes.items():
        if size > most:
            findings.add(f"config.json says {name} = {brief(size)}, and no model has more than {most}", AGAIN)
    if config.get("head_dim") is None and shape.width % shape.heads:
        findings.add(
            f"config.json divides hidden_size {shape.width} between {shape.heads} heads, which leaves a rest", AGAIN
        )
    if shape.heads % shape.kv_heads:
        findings.add(
            f"config.json divides {shape.heads} heads between {shape.kv_heads} key-value heads, which leaves a rest",
            AGAIN,
        )
    elif shape.head_dim % 2:
        findings.add(
            f"config.json gives each head {shape.head_dim} numbers, and rotary positions need an even number", AGAIN
        )
    _check_numbers(config, findings)
    if len(findings.problems) > before:
        return None
    _check_token_ids("config.json", config, shape.vocabulary, findings)
    return shape


def _check_numbers(config: Mapping[str, Any], findings: Findings) -> None:
    """Numbers that are no sizes: above 0 and of the right kind, where they are given."""
    wrong = [
        key for key in ("rms_norm_eps", "rope_theta") if config.get(key) is not None and not _is_positive(config[key])
    ]
    rotary = config.get("rope_parameters")
    if isinstance(rotary, dict) and "rope_theta" in rotary and not _is_positive(rotary["rope_theta"]):
        findings.add(f"config.json says rope_theta = {brief(rotary['rope_theta'])}, which cannot be", AGAIN)
    positions = config.get("max_position_embeddings")
    if positions is not None and not (_is_positive(positions) and isinstance(positions, int)):
        wrong.append("max_position_embeddings")
    switches = ("tie_word_embeddings", "attention_bias", "mlp_bias")
    wrong += [key for key in switches if config.get(key) is not None and not isinstance(config[key], bool)]
    for name in wrong:
        findings.add(f"config.json says {name} = {brief(config[name])}, which cannot be", AGAIN)


def _is_positive(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < math.inf  # type: ignore[operator]


def _check_token_ids(name: str, settings: Mapping[str, Any], vocabulary: int, findings: Findings) -> None:
    """Ids of special tokens are whole numbers, and those that end an answer are tokens that the model can say."""
    for key in (*_END_TOKENS, *_OTHER_TOKENS):
        value = settings.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(index, int) and not isinstance(index, bool) for index in ids):
            findings.add(f"{name} says {key} = {brief(value)}, which is no token id", AGAIN)
            continue
        # A padding or opening token of -1 stands for none.
        lowest = 0 if key in _END_TOKENS else -1
        beyond = [index for index in ids if not lowest <= index < vocabulary]
        if beyond:
            findings.add(
                f"{name} says {key} = {brief(beyond[0])}, and the model knows the tokens 0 to {vocabulary - 1}", AGAIN
            )


def _read_tokenizer(folder: Path, findings: Findings) -> int:
    """The highest token id plus one; 0 where it is not known."""
    settings = read_json(folder, "tokenizer_config.json", findings) or {}
    check_code("tokenizer_config.json", settings, findings)
    _check_chat_template(folder, settings, findings)
    special = settings.get("added_tokens_decoder", {})
    added = [index for index, entry in special.items() if not is_picture(entry)] if isinstance(special, dict) else []
    if not isinstance(special, dict) or not all(isinstance(index, str) and index.isdecimal() for index in added):
        findings.add("tokenizer_config.json numbers its added_tokens_decoder in another way than libraries read", AGAIN)
        added = []
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "merges.txt")):
        findings.add("it has no tokenizer", "Copy tokenizer.json and tokenizer_config.json next to the weights.")
        return 0
    try:
        content = durable.parse_json(durable.read_bytes(folder / "tokenizer.json", _LARGEST_TOKENIZER))
        ids = _token_ids(content)
    except FileNotFoundError:
        return max(map(int, added), default=-1) + 1
    except (OSError, MemoryError, ValueError, TypeError, KeyError, AttributeError) as error:
        why = str(error) if isinstance(error, ValueError) else "it is no tokenizer's file"
        findings.add(f"tokenizer.json is damaged ({brief(why)})", AGAIN)
        return 0
    return max([*ids, *map(int, added)], default=-1) + 1


def _token_ids(content: Any) -> list[int]:
    """Every token id of a tokenizer.json."""
    vocabulary = content["model"]["vocab"]
    # Unigram models list their tokens in order; the others number them.
    ids = list(range(len(vocabulary))) if isinstance(vocabulary, list) else list(vocabulary.values())
    ids += [entry["id"] for entry in content.get("added_tokens") or [] if not is_picture(entry)]
    if not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in ids):
        raise TypeError
    return ids


def is_picture(entry: object) -> bool:
    """Whether an entry of a tokenizer's added tokens is `PICTURE`."""
    return isinstance(entry, dict) and entry.get("content") == PICTURE


def _check_chat_template(folder: Path, settings: Mapping[str, Any], findings: Findings) -> None:
    own = settings.get("chat_template")
    if own is not None and not isinstance(own, str | list):
        findings.add(f"tokenizer_config.json has a chat_template that is no text ({brief(own)})", AGAIN)
        return
    if own or any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return
    findings.add(
        "it has no chat template, so it is a base model or its template was lost",
        "Use the model's instruct or chat version, or give its template with --chat-template FILE.",
    )

"""A model's shape: what its `config.json` says about its size, and the parameters that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safesteer_lite.errors import ModelError


@dataclass(frozen=True)
class ModelShape:
    """What `config.json` says about a decoder-only model's size.

    Attributes:
        layers: decoder blocks.
        width: size of the residual stream.
        intermediate: width of the gated MLP.
        heads, kv_heads, head_dim: attention.
        vocabulary: rows of the embedding table.
        tied: whether the LM head is the embedding table.
        dtype: of the published weights, as torch names it.
        qkv_bias, output_bias, mlp_bias: which linear layers have a bias.
        head_norms: whether queries and keys are normalised per head.
        block_norms: norms in a block.
        fused: whether queries, keys and values are one linear layer, and gate and up another one.
        kinds: kinds of blocks, each of which is given a mask of its own.
        softcapped: whether the products of attention are bounded, which no kernel of torch does.
    """

    layers: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    dtype: str
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    block_norms: int = 2
    fused: bool = False
    kinds: int = 1
    softcapped: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a block's linear layers, by their names in it: seven, or four where some are fused."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.fused:
            return {
                "self_attn.qkv_proj": (self.width, queries + 2 * keys),
                "self_attn.o_proj": (queries, self.width),
                "mlp.gate_up_proj": (self.width, 2 * self.intermediate),
                "mlp.down_proj": (self.intermediate, self.width),
            }
        return {
            "self_attn.q_proj": (self.width, queries),
            "self_attn.k_proj": (self.width, keys),
            "self_attn.v_proj": (self.width, keys),
            "self_attn.o_proj": (queries, self.width),
            "mlp.gate_proj": (self.width, self.intermediate),
            "mlp.up_proj": (self.width, self.intermediate),
            "mlp.down_proj": (self.intermediate, self.width),
        }

    def has_bias(self, linear: str) -> bool:
        """Whether one of `linears` has a bias."""
        part, _, name = linear.partition(".")
        return self.mlp_bias if part == "mlp" else self.output_bias if name == "o_proj" else self.qkv_bias


# What a family's models have where config.json leaves the key out; all others have as many key-value heads as heads, and
# divide the width between the heads.
_LEFT_OUT: dict[str, dict[str, int]] = {
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "gemma2": {"num_key_value_heads": 4, "head_dim": 256},
    "gemma3_text": {"num_key_value_heads": 4, "head_dim": 256},
}


# Families whose MLP has no bias, whatever config.json says.
_NO_MLP_BIAS = ("qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3")


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape from the contents of a `config.json`.

    Families other than Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3, Phi 3, SmolLM 3 and Granite are counted like Llama,
    which is close for any model with a gated MLP: only their own biases and norms are left out. Of a model that also
    sees images, the text part is counted.

    Raises:
        ModelError: a size is missing or not a positive whole number, or the model is a mixture of experts.
    """
    inner = config.get("text_config")
    text = {**config, **(inner if isinstance(inner, Mapping) else {})}
    if is_mixture(config):
        raise ModelError(f"The model is {MIXTURE}.", "Choose a dense model.")
    required = {
        "layers": "num_hidden_layers",
        "width": "hidden_size",
        "intermediate": "intermediate_size",
        "heads": "num_attention_heads",
        "vocabulary": "vocab_size",
    }
    wrong = [key for key in required.values() if not _is_size(text.get(key))]
    optional = [key for key in ("num_key_value_heads", "head_dim") if text.get(key) is not None]
    wrong += [key for key in optional if not _is_size(text[key])]
    if wrong:
        raise ModelError(
            f"config.json does not say how large the model is: {', '.join(wrong)} missing or no whole number above 0.",
            "Check that this is the folder or the name of a decoder-only language model.",
        )
    sizes = {name: int(text[key]) for name, key in required.items()}
    family = str(text.get("model_type", ""))
    text = {**_LEFT_OUT.get(family, {}), **text}
    gemma, four_norms = family.startswith("gemma"), family in ("gemma2", "gemma3_text", "gemma3")
    bias = bool(text.get("attention_bias", False))
    return ModelShape(
        **sizes,
        kv_heads=text.get("num_key_value_heads") or sizes["heads"],
        head_dim=text.get("head_dim") or sizes["width"] // sizes["heads"],
        tied=bool(text.get("tie_word_embeddings", gemma or family == "smollm3")),
        dtype=str(text.get("dtype") or text.get("torch_dtype") or "float32"),
        qkv_bias=family == "qwen2" or (bias and family not in ("mistral", "phi3")),
        output_bias=bias and family not in ("qwen2", "mistral", "phi3"),
        mlp_bias=bool(text.get("mlp_bias", False)) and family not in _NO_MLP_BIAS,
        head_norms=family in ("qwen3", "gemma3_text", "gemma3"),
        block_norms=4 if four_norms else 2,
        fused=family == "phi3",
        kinds=2 if four_norms else 1,
        softcapped=family == "gemma2" and text.get("attn_logit_softcapping", 50.0) is not None,
    )


MIXTURE = "a mixture of experts: the weights of all experts lie in one tensor, which neither the adapter nor the merge reaches"
"""Why such a model is refused, as a part of a sentence."""

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def is_mixture(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json`, or the part of it that is about text, describes a mixture of experts."""
    parts = [
        part for part in (config, config.get("text_config"), config.get("ffn_config")) if isinstance(part, Mapping)
    ]
    counts = [part.get(key) for part in parts for key in _EXPERTS]
    return any(_is_size(count) and count != 1 for count in counts)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def linear_parameters(shape: ModelShape) -> int:
    """Weights of the blocks' linear layers, without biases: those that 4-bit loading packs."""
    return shape.layers * sum(inputs * outputs for inputs, outputs in shape.linears.values())


def parameters(shape: ModelShape) -> int:
    """All parameters; tied embeddings counted once."""
    biases = sum(outputs for name, (_, outputs) in shape.linears.items() if shape.has_bias(name))
    norms = shape.block_norms * shape.width + 2 * shape.head_norms * shape.head_dim
    embeddings = shape.vocabulary * shape.width * (1 if shape.tied else 2)
    return linear_parameters(shape) + shape.layers * (biases + norms) + shape.width + embeddings


def adapter_parameters(shape: ModelShape, rank: int) -> int:
    """LoRA weights on all linear layers: rank * (in + out) for each."""
    return shape.layers * rank * sum(inputs + outputs for inputs, outputs in shape.linears.values())

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

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of a block's seven linear layers: q, k, v, o, gate, up, down."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = ((self.width, queries), (self.width, keys), (self.width, keys), (queries, self.width))
        up = (self.width, self.intermediate)
        return (*attention, up, up, (self.intermediate, self.width))


# What a family's models have where config.json leaves the key out; all others have as many key-value heads as heads, and
# divide the width between the heads.
_LEFT_OUT: dict[str, dict[str, int]] = {
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}


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
    experts = [text.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")]
    if any(_is_size(count) and count != 1 for count in experts):
        raise ModelError(
            "The model is a mixture of experts, which this method does not support.", "Choose a dense model."
        )
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
    gemma = family.startswith("gemma")
    bias = bool(text.get("attention_bias", False))
    return ModelShape(
        **sizes,
        kv_heads=text.get("num_key_value_heads") or sizes["heads"],
        head_dim=text.get("head_dim") or sizes["width"] // sizes["heads"],
        tied=bool(text.get("tie_word_embeddings", gemma or family == "smollm3")),
        dtype=str(text.get("dtype") or text.get("torch_dtype") or "float32"),
        qkv_bias=family == "qwen2" or (bias and family != "mistral"),
        output_bias=bias and family not in ("qwen2", "mistral"),
        mlp_bias=bool(text.get("mlp_bias", False)) and family not in ("qwen2", "qwen3", "mistral"),
        head_norms=family in ("qwen3", "gemma3_text", "gemma3"),
        block_norms=4 if family in ("gemma2", "gemma3_text", "gemma3") else 2,
    )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def linear_parameters(shape: ModelShape) -> int:
    """Weights of the blocks' linear layers, without biases: those that 4-bit loading packs."""
    return shape.layers * sum(inputs * outputs for inputs, outputs in shape.linears)


def parameters(shape: ModelShape) -> int:
    """All parameters; tied embeddings counted once."""
    outputs = [out for _, out in shape.linears]
    biases = shape.qkv_bias * sum(outputs[:3]) + shape.output_bias * outputs[3] + shape.mlp_bias * sum(outputs[4:])
    norms = shape.block_norms * shape.width + 2 * shape.head_norms * shape.head_dim
    embeddings = shape.vocabulary * shape.width * (1 if shape.tied else 2)
    return linear_parameters(shape) + shape.layers * (biases + norms) + shape.width + embeddings


def adapter_parameters(shape: ModelShape, rank: int) -> int:
    """LoRA weights on all linear layers: rank * (in + out) for each."""
    return shape.layers * rank * sum(inputs + outputs for inputs, outputs in shape.linears)

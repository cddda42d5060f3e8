"""The mix of types is llama.cpp's, and a whole file comes out with every setting and readable blocks."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy
import pytest
from gguf import GGMLQuantizationType as Kind

from safesteer_lite.errors import ExportError
from safesteer_lite.export.gguf.quantise import check_quantisable, mix, quantise_file

needs_ggml = pytest.mark.skipif(find_spec("libggml") is None, reason="needs the extra [gguf]")


def tensors(layers: int, width: int = 512, inner: int = 1024, tied: bool = False) -> dict[str, tuple[int, int]]:
    """The matrices of a dense model, by their GGUF names."""
    found = {"token_embd.weight": (1000, width)}
    if not tied:
        found["output.weight"] = (1000, width)
    for layer in range(layers):
        found |= {f"blk.{layer}.attn_{part}.weight": (width, width) for part in ("q", "k", "v", "output")}
        found |= {f"blk.{layer}.ffn_{part}.weight": (inner, width) for part in ("gate", "up")}
        found[f"blk.{layer}.ffn_down.weight"] = (width, inner)
    return found


def layers_in_6_bits(layers: int, part: str, quant: str) -> list[int]:
    kinds = mix(tensors(layers), layers, quant)
    return [layer for layer in range(layers) if kinds[f"blk.{layer}.{part}.weight"] == Kind.Q6_K]


@pytest.mark.parametrize("quant", ["Q5_K_M", "Q4_K_M"])
@pytest.mark.parametrize("part", ["attn_v", "ffn_down"])
def test_some_layers_keep_6_bits(part: str, quant: str) -> None:
    # With 24 layers as in llama.cpp's own file of the demo model; the others by hand from its rule.
    assert layers_in_6_bits(24, part, quant) == [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]
    assert layers_in_6_bits(32, part, quant) == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert layers_in_6_bits(2, part, quant) == [1]


def test_the_output_keeps_6_bits_wherever_it_is_stored() -> None:
    for quant, most in {"Q4_K_M": Kind.Q4_K, "Q5_K_M": Kind.Q5_K, "Q6_K": Kind.Q6_K}.items():
        untied, tied = mix(tensors(8), 8, quant), mix(tensors(8, tied=True), 8, quant)
        assert (untied["output.weight"], untied["token_embd.weight"]) == (Kind.Q6_K, most)
        assert tied["token_embd.weight"] == Kind.Q6_K
        rest = {kind for name, kind in untied.items() if "attn_v" not in name and "ffn_down" not in name}
        assert rest == {Kind.Q6_K, most} and untied["blk.0.attn_q.weight"] == most


@pytest.mark.parametrize(
    ("quant", "most", "narrow"),
    [
        ("Q4_K_M", Kind.Q4_K, Kind.Q5_0),
        ("Q5_K_M", Kind.Q5_K, Kind.Q5_1),
        ("Q6_K", Kind.Q6_K, Kind.Q8_0),
    ],
)
def test_columns_that_do_not_divide_by_256_take_narrow_blocks(quant: str, most: Kind, narrow: Kind) -> None:
    kinds = mix(tensors(8, width=896, inner=4864, tied=True), 8, quant)
    assert kinds["token_embd.weight"] == Kind.Q8_0
    assert kinds["blk.0.attn_q.weight"] == narrow and kinds["blk.0.attn_v.weight"] == Kind.Q8_0
    assert kinds["blk.0.ffn_down.weight"] == Kind.Q6_K and kinds["blk.1.ffn_down.weight"] == most


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "qwen3_moe"}, "mixture of experts"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts"),
        ({"model_type": "llama", "num_hidden_layers": 80}, "80 layers"),
    ],
)
def test_other_mixes_are_refused_before_any_work(config: dict[str, object], told: str) -> None:
    with pytest.raises(ExportError, match=told) as caught:
        check_quantisable(config)
    assert "Q8_0" in caught.value.hint
    check_quantisable({"model_type": "qwen2", "num_hidden_layers": 80, "num_experts": None})


def test_a_file_of_another_kind_is_refused_by_its_tensors() -> None:
    with pytest.raises(ExportError, match="No file of 4 to 6 bits is written for"):
        mix({"blk.0.ffn_down_exps.weight": (8, 256)}, 1, "Q4_K_M")


@pytest.mark.parametrize(("quant", "kind"), [("Q4_K_M", Kind.Q5_K), ("Q5_K_M", Kind.Q6_K), ("Q6_K", Kind.Q6_K)])
def test_fused_attention_keeps_one_bit_more(quant: str, kind: Kind) -> None:
    assert set(mix({f"blk.{layer}.attn_qkv.weight": (24, 256) for layer in range(8)}, 8, quant).values()) == {kind}


def write_16_bit(path: Path) -> dict[str, numpy.ndarray]:
    """A GGUF file with one matrix of each sort in bfloat16, one vector, and settings of several types."""
    generator = numpy.random.default_rng(0)
    values = {
        "token_embd.weight": generator.standard_normal((40, 256), numpy.float32),
        "blk.0.attn_q.weight": generator.standard_normal((8, 256), numpy.float32),
        "blk.0.attn_output.weight": generator.standard_normal((8, 96), numpy.float32),
        "blk.0.attn_norm.weight": generator.standard_normal(256, numpy.float32),
    }
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(1)
    writer.add_chat_template("{{ messages }} ü\n")
    writer.add_token_list(["a", "b"])
    writer.add_token_types([1, 3])
    writer.add_rope_freq_base(1e6)
    writer.add_add_bos_token(False)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name, value in values.items():
        if value.ndim == 1:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quantize(value, Kind.BF16), raw_dtype=Kind.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@needs_ggml
@pytest.mark.parametrize(
    ("quant", "number", "most", "narrow", "limit"),
    [
        ("Q4_K_M", 15, Kind.Q4_K, Kind.Q5_0, 0.1),
        ("Q5_K_M", 17, Kind.Q5_K, Kind.Q5_1, 0.05),
        ("Q6_K", 18, Kind.Q6_K, Kind.Q8_0, 0.03),
    ],
)
def test_a_file_keeps_its_settings_and_its_values_within_the_blocks_steps(
    quant: str, number: int, most: Kind, narrow: Kind, limit: float, tmp_path: Path
) -> None:
    values = write_16_bit(tmp_path / "wide.gguf")
    seen: list[tuple[int, int]] = []
    quantise_file(tmp_path / "wide.gguf", tmp_path / "small.gguf", quant, lambda *pair: seen.append(pair))
    before, after = (gguf.GGUFReader(tmp_path / name) for name in ("wide.gguf", "small.gguf"))

    def settings(reader: gguf.GGUFReader) -> dict[str, object]:
        skipped = ("GGUF.", "general.file_type")
        return {name: field.contents() for name, field in reader.fields.items() if not name.startswith(skipped)}

    assert settings(before) == settings(after) and len(settings(after)) >= 7
    assert after.fields["general.file_type"].contents() == number
    kinds = {tensor.name: tensor.tensor_type for tensor in after.tensors}
    assert kinds == {
        "token_embd.weight": Kind.Q6_K,
        "blk.0.attn_q.weight": most,
        "blk.0.attn_output.weight": narrow,
        "blk.0.attn_norm.weight": Kind.F32,
    }
    for tensor in after.tensors:
        back, true = gguf.dequantize(tensor.data, tensor.tensor_type), values[tensor.name]
        assert back.shape == true.shape
        error = float(numpy.abs(back - true).mean())
        allowed = {Kind.F32: 0.0, Kind.Q6_K: 0.03}.get(tensor.tensor_type, limit)
        assert error <= allowed, tensor.name
    assert seen[-1][0] == seen[-1][1] == sum(int(tensor.n_bytes) for tensor in before.tensors)


def test_without_ggml_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safesteer_lite.export.gguf.quantise.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r'pip install "safesteer-lite\[gguf\]"'):
        quantise_file(tmp_path / "wide.gguf", tmp_path / "small.gguf", "Q4_K_M")

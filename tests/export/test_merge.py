"""The streamed merge against peft's own, and what must never be left on a disk."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from safesteer_lite.errors import DiskSpaceError, ExportError
from safesteer_lite.export import checkpoint
from safesteer_lite.export.merge import COPIED, MergeResult, merge_adapter, quantised_weights, round_to_nf4

torch.set_num_threads(1)
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2-tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3-tied": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_base(folder: Path, kind: str, dtype: torch.dtype, max_shard_size: str = "60KB") -> Path:
    """A random model in several shards, with biases and norms that are not just zeros and ones."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer.json").write_bytes(b'{"not": "parsed"}\r\n')
    (folder / "chat_template.jinja").write_bytes("{{ messages }} ü\n".encode())
    return folder


def save_adapter(folder: Path, base: Path, **settings: Any) -> Path:
    """A random adapter on `base`, both factors large enough to move every weight."""
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype | str = "auto", **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def peft_merge(base: Path, adapter: Path, dtype: torch.dtype, strength: float = 1.0) -> dict[str, Tensor]:
    model = PeftModel.from_pretrained(load(base, dtype), adapter)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= strength
    state: dict[str, Tensor] = model.merge_and_unload().state_dict()
    return state


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], tied: bool) -> None:
    """The same tensors, bit for bit; a tied LM head is in the state but not in the file."""
    assert ours.keys() == theirs.keys() - ({"lm_head.weight"} if tied else set())
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", "qwen2-tied", torch.bfloat16)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base)


@pytest.mark.parametrize("kind", CONFIGS)
def test_merge_equals_peft_bit_for_bit(tmp_path: Path, kind: str) -> None:
    base = save_base(tmp_path / "base", kind, torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base)
    seen: list[tuple[int, int]] = []
    result = merge_adapter(
        base, adapter, tmp_path / "out", dtype=torch.float32, progress=lambda *pair: seen.append(pair)
    )
    assert len(result.files) == len(list(base.glob("*.safetensors"))) > 1
    assert_equal(stored(tmp_path / "out"), peft_merge(base, adapter, torch.float32), kind.endswith("tied"))
    assert (result.merged, result.tensors) == (2 * len(TARGETS), len(stored(base)))
    assert seen[-1] == (result.size, result.size) and len(seen) == result.tensors
    assert seen == sorted(seen)


@pytest.mark.parametrize("kind", CONFIGS)
def test_bfloat16_merge_is_the_exact_sum_rounded_once(tmp_path: Path, kind: str) -> None:
    base = save_base(tmp_path / "base", kind, torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base)
    result = merge_adapter(base, adapter, tmp_path / "out")
    ours = stored(tmp_path / "out")
    exact = peft_merge(base, adapter, torch.float32)
    assert result.dtype == torch.bfloat16
    assert all(torch.equal(value, exact[name].bfloat16()) for name, value in ours.items())
    # peft may round the update before it adds it, which can cost it one unit in the last place of the larger operand.
    before, theirs = stored(base), peft_merge(base, adapter, torch.bfloat16)
    for name, value in ours.items():
        largest = torch.maximum(before[name].abs(), (value - before[name]).abs()).maximum(value.abs()).float()
        unit = torch.exp2(torch.floor(torch.log2(largest.clamp_min(1e-30))) - 7)
        assert bool(((value.float() - theirs[name].float()).abs() <= unit).all()), name


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"lora_alpha": 6, "r": 5},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8}, "alpha_pattern": {r".*\.v_proj": 2, "proj": 4}},
        {"layers_to_transform": [1], "target_modules": ["q_proj"]},
        {"init_lora_weights": "gaussian"},
    ],
)
def test_every_scale_is_pefts_scale(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = save_base(tmp_path / "base", "llama", torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base, **settings)
    merge_adapter(base, adapter, tmp_path / "out", dtype=torch.float32)
    ours, theirs = stored(tmp_path / "out"), peft_merge(base, adapter, torch.float32)
    # A scale that is no power of two rounds once more in peft than here.
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=3e-7, atol=3e-8)
    assert any(not torch.equal(value, stored(base)[name]) for name, value in ours.items())


def test_strength_scales_the_update(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen3-tied", torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base)
    merge_adapter(base, adapter, tmp_path / "out", strength=0.5, dtype=torch.float32)
    assert_equal(stored(tmp_path / "out"), peft_merge(base, adapter, torch.float32, strength=0.5), tied=True)


def test_strength_zero_is_the_base_byte_for_byte(tmp_path: Path, base: Path, adapter: Path) -> None:
    result = merge_adapter(base, adapter, tmp_path / "out", strength=0.0)
    before, after = checkpoint.read_checkpoint(base), checkpoint.read_checkpoint(tmp_path / "out")
    assert result.files == tuple(sorted(path.name for path in base.glob("*.safetensors")))
    assert [[tensor.name for tensor in shard] for shard in after.shards] == [
        [tensor.name for tensor in shard] for shard in before.shards
    ]
    for name, tensor in before.tensors.items():
        assert b"".join(after.tensors[name].chunks()) == b"".join(tensor.chunks()), name


def test_exact_files_and_a_truthful_configuration(tmp_path: Path, base: Path, adapter: Path) -> None:
    (base / "training_args.bin").write_bytes(b"private")
    result = merge_adapter(base, adapter, tmp_path / "out", dtype=torch.float16)
    copied = {name for name in COPIED if (base / name).exists()}
    assert copied >= {"tokenizer.json", "chat_template.jinja", "generation_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *copied,
        *result.files,
        "config.json",
        "model.safetensors.index.json",
    }
    assert all((tmp_path / "out" / name).read_bytes() == (base / name).read_bytes() for name in copied)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert after == {**before, "dtype": "float16"}
    assert {value.dtype for value in stored(tmp_path / "out").values()} == {torch.float16}
    model, info = load(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_wide_base_becomes_16_bit_unless_told_otherwise(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base)
    merge_adapter(base, adapter, tmp_path / "out")
    theirs = peft_merge(base, adapter, torch.float32)
    assert_equal(stored(tmp_path / "out"), {name: value.bfloat16() for name, value in theirs.items()}, tied=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_are_divided_at_the_limit(tmp_path: Path, adapter: Path, base: Path) -> None:
    result = merge_adapter(base, adapter, tmp_path / "out", max_shard_bytes=20_000)
    shards = checkpoint.read_checkpoint(tmp_path / "out").shards
    assert len(result.files) == len(shards) > len(list(base.glob("*.safetensors")))
    assert all(sum(tensor.size for tensor in shard) <= 20_000 for shard in shards)
    assert stored(tmp_path / "out").keys() == stored(base).keys()


def load_4bit(folder: Path) -> Any:
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return load(folder, torch.bfloat16, quantization_config=quantisation, device_map={"": "cpu"})


def dequantised(model: Any) -> dict[str, Tensor]:
    """What a loaded 4-bit model holds, before its first forward, which may repack it."""
    import bitsandbytes as bnb

    return {
        f"{name}.weight": bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_nf4_rounding_is_what_transformers_loads(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    base = save_base(tmp_path / "base", kind, dtype)
    loaded, before = dequantised(load_4bit(base)), stored(base)
    assert quantised_weights(base) == loaded.keys() and len(loaded) == 2 * len(TARGETS)
    for name, value in loaded.items():
        rounded = round_to_nf4(before[name])
        assert torch.equal(rounded, value) and not torch.equal(rounded, before[name].bfloat16()), name


@pytest.mark.parametrize("saved", [False, True], ids=["16-bit base", "4-bit base"])
def test_merge_into_dequantised_weights(tmp_path: Path, saved: bool) -> None:
    base = save_base(tmp_path / "base", "qwen2", torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base)
    model = load_4bit(base)
    values = {**{name: value for name, value in stored(base).items()}, **dequantised(model)}
    if saved:
        model.save_pretrained(tmp_path / "packed", max_shard_size="30KB")
        assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
        shutil.copy(base / "tokenizer.json", tmp_path / "packed")
        base = tmp_path / "packed"
    save_file(values, tmp_path / "plain.safetensors", {"format": "pt"})
    plain = tmp_path / "plain"
    plain.mkdir()
    (tmp_path / "plain.safetensors").rename(plain / "model.safetensors")
    CONFIGS["qwen2"].save_pretrained(plain)
    merge_adapter(base, adapter, tmp_path / "out", weights="dequantised")
    exact = peft_merge(plain, adapter, torch.float32)
    assert_equal(stored(tmp_path / "out"), {name: value.bfloat16() for name, value in exact.items()}, tied=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and not any("quant" in key for key in config)
    assert type(load(tmp_path / "out").model.layers[0].mlp.up_proj) is nn.Linear


def test_a_4bit_base_has_no_original_weights(tmp_path: Path, adapter: Path, base: Path) -> None:
    load_4bit(base).save_pretrained(tmp_path / "packed")
    with pytest.raises(ExportError, match=r"4-bit.*dequantised"):
        merge_adapter(tmp_path / "packed", adapter, tmp_path / "out")


def test_other_quantisations_are_refused(tmp_path: Path, adapter: Path, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ExportError, match="gptq"):
        merge_adapter(base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("peft_type", "LOHA"),
    ],
)
def test_adapters_that_are_more_than_lora_are_refused(
    tmp_path: Path, base: Path, adapter: Path, setting: str, value: object
) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: value}))
    with pytest.raises(ExportError, match=str(value) if setting == "peft_type" else setting):
        merge_adapter(base, adapter, tmp_path / "out")


LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({LAYER + "A.weight": None}, "lacks lora_A"),
        ({LAYER + "B.weight": torch.full((64, 4), float("nan"))}, "NaN"),
        ({LAYER + "B.weight": torch.full((64, 4), float("inf"))}, "infinite"),
        ({LAYER + "B.weight": torch.zeros(32, 4)}, "shape"),
        ({LAYER + "A.weight": torch.zeros(2, 64)}, "rank 4"),
        ({LAYER + "magnitude": torch.zeros(4)}, "magnitude"),
        (
            {
                LAYER.replace("layers.0", "layers.7") + "A.weight": torch.zeros(4, 64),
                LAYER.replace("layers.0", "layers.7") + "B.weight": torch.zeros(64, 4),
            },
            r"layers\.7\.self_attn\.q_proj\.weight, which the base model does not hold",
        ),
        (
            {
                "base_model.model.model.embed_tokens.lora_A.weight": torch.zeros(4, 64),
                "base_model.model.model.embed_tokens.lora_B.weight": torch.zeros(96, 4),
            },
            "shares between input and output",
        ),
    ],
)
def test_damaged_or_foreign_adapters_are_refused(
    tmp_path: Path, base: Path, adapter: Path, change: dict[str, Tensor | None], message: str
) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = {**load_file(file), **change}
    save_file({name: value for name, value in tensors.items() if value is not None}, file)
    with pytest.raises(ExportError, match=message):
        merge_adapter(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()


def test_a_value_beyond_float16_is_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    with pytest.raises(ExportError, match=r"float16 cannot express"):
        merge_adapter(base, adapter, tmp_path / "out", strength=1e7, dtype=torch.float16)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_nothing_is_left_of_an_interrupted_merge(
    tmp_path: Path, base: Path, adapter: Path, error: type[BaseException]
) -> None:
    before = {path.name for path in tmp_path.iterdir()}

    def stop(done: int, total: int) -> None:
        assert (tmp_path / "out.tmp").is_dir() and not (tmp_path / "out").exists()
        if done > total / 2:
            raise error

    with pytest.raises(ExportError if error is OSError else error):
        merge_adapter(base, adapter, tmp_path / "out", progress=stop)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_what_a_killed_merge_left_is_cleared_and_nothing_else(tmp_path: Path, base: Path, adapter: Path) -> None:
    leftover = tmp_path / "out.tmp"
    leftover.mkdir()
    (leftover / "model-00001-of-00009.safetensors").write_bytes(b"half")
    merge_adapter(base, adapter, tmp_path / "out")
    assert not leftover.exists() and not (tmp_path / "out" / "model-00001-of-00009.safetensors").exists()
    foreign = tmp_path / "second.tmp"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match="in the way"):
        merge_adapter(base, adapter, tmp_path / "second")
    assert (foreign / "thesis.txt").read_text() == "years of work"


def test_an_existing_folder_is_never_overwritten(tmp_path: Path, base: Path, adapter: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="exists already"):
        merge_adapter(base, adapter, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_parent_that_cannot_be_written_is_one_clear_error(tmp_path: Path, base: Path, adapter: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="could not be written"):
        merge_adapter(base, adapter, tmp_path / "file" / "out")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_parent_is_one_clear_error(tmp_path: Path, base: Path, adapter: Path) -> None:
    parent = tmp_path / "locked"
    parent.mkdir(mode=0o555)
    with pytest.raises(ExportError, match="could not be written"):
        merge_adapter(base, adapter, parent / "out")


def test_room_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    checkpoint.require_space(tmp_path / "new" / "out", free // 2)
    with pytest.raises(DiskSpaceError, match=r"needs .* GB, and only .* GB are free"):
        checkpoint.require_space(tmp_path / "new" / "out", free * 2)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_shard_is_named(tmp_path: Path, base: Path, adapter: Path) -> None:
    shard = min(base.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ExportError, match=rf"{shard.name} is damaged"):
        merge_adapter(base, adapter, tmp_path / "out")


def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    path = base / checkpoint.INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra"] = min(index["weight_map"].values())
    path.write_text(json.dumps(index))
    with pytest.raises(ExportError, match=r"model\.extra"):
        merge_adapter(base, adapter, tmp_path / "out")


def test_the_written_type_has_a_merge_result(tmp_path: Path, base: Path, adapter: Path) -> None:
    result = merge_adapter(base, adapter, tmp_path / "out", strength=0.75)
    size = sum(value.numel() * 2 for value in stored(base).values())
    assert result == MergeResult(
        tmp_path / "out", result.files, len(stored(base)), 14, size, torch.bfloat16, 0.75, "original"
    )

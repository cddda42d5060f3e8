"""Every check must find the fault it is for, and pass a whole folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from safesteer_lite.errors import ExportError
from safesteer_lite.export.weights.verify import FileReport, check_files, check_sums, write_sums

ROWS, TOKENS = 40, 32
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in two shards, with more embedding rows than tokens, as many real models have."""
    folder = tmp_path_factory.mktemp("whole")
    config = Qwen2Config(
        vocab_size=ROWS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder, max_shard_size="7KB")
    words = {f"word{index}": index for index in range(TOKENS - 1)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="word0")))
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}<end>{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, whole: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; `None` removes one."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not None}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the first shard, and keep the index true to it."""
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD, {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {name: file for name, file in index.items() if file != SHARD}
    edit_json(folder / "model.safetensors.index.json", weight_map={**kept, **dict.fromkeys(tensors, SHARD)})


def test_a_whole_folder_passes_and_is_described(whole: Path, folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = check_files(folder, whole, progress=lambda *pair: seen.append(pair))
    tensors = {name: value for file in whole.glob("*.safetensors") for name, value in load_file(file).items()}
    parameters = sum(value.numel() for value in tensors.values())
    assert report == FileReport("Qwen2ForCausalLM", 2, len(tensors), parameters, 2 * parameters, "BF16", ROWS, TOKENS)
    assert seen[-1] == (2 * parameters, 2 * parameters)
    assert check_files(folder) == report


def poison(tensors: dict[str, Tensor]) -> None:
    tensors["model.embed_tokens.weight"][3, 5] = float("nan")


def overflow(tensors: dict[str, Tensor]) -> None:
    tensors["model.embed_tokens.weight"][ROWS - 1, 15] = float("-inf")


def widen(tensors: dict[str, Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].float()


def shorten(tensors: dict[str, Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][: TOKENS - 1].clone()


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.0.self_attn.q_proj.bias"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poison, r"embed_tokens\.weight holds NaN"),
        (overflow, r"embed_tokens\.weight holds NaN or inf"),
        (widen, r"embed_tokens\.weight is stored as F32"),
        (shorten, rf"has shape \({TOKENS - 1}, 16\), and config.json asks for \({ROWS}, 16\)"),
        (shorten, f"{TOKENS - 1} rows for {TOKENS} tokens"),
        (drop, r"missing: model\.layers\.0\.self_attn\.q_proj\.bias"),
    ],
)
def test_faulty_tensors_are_found(folder: Path, change: Callable[[dict[str, Tensor]], None], message: str) -> None:
    edit_tensors(folder, change)
    with pytest.raises(ExportError, match=message):
        check_files(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
        ({"architectures": ["UnslothForCausalLM"]}, "'UnslothForCausalLM', which transformers does not have"),
        ({"architectures": ["Qwen2Config"]}, "'Qwen2Config', which"),
        ({"architectures": None}, "names the architecture ''"),
        ({"dtype": "float32"}, "says dtype = float32, and the weights are bfloat16"),
        ({"torch_dtype": "float16"}, "says torch_dtype = float16"),
        ({"vocab_size": ROWS + 8}, rf"\({ROWS}, 16\), and config.json asks for \({ROWS + 8}, 16\)"),
    ],
)
def test_an_untruthful_configuration_is_found(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ExportError, match=message):
        check_files(folder)


def test_a_changed_tokenizer_is_found(folder: Path, whole: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n")
    check_files(folder)
    with pytest.raises(ExportError, match=r"tokenizer\.json differs"):
        check_files(folder, whole)
    path.unlink()
    with pytest.raises(ExportError, match=r"tokenizer\.json is missing"):
        check_files(folder)


def test_added_tokens_count(folder: Path) -> None:
    settings = folder / "tokenizer_config.json"
    added = {str(ROWS): {"content": "<tool>", "special": True}}
    edit_json(settings, added_tokens_decoder=added)
    with pytest.raises(ExportError, match=f"{ROWS} rows for {ROWS + 1} tokens"):
        check_files(folder)


def test_a_lost_or_changed_template_is_found(folder: Path, whole: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_bytes(path.read_bytes() + b" ")
    check_files(folder)
    with pytest.raises(ExportError, match="the chat template differs"):
        check_files(folder, whole)
    path.unlink()
    with pytest.raises(ExportError, match="no chat template"):
        check_files(folder)
    edit_json(folder / "tokenizer_config.json", chat_template="{{ messages }}")
    check_files(folder)


def test_a_missing_shard_is_found(folder: Path) -> None:
    (folder / SHARD).unlink()
    with pytest.raises(ExportError, match=SHARD):
        check_files(folder)


def test_all_problems_are_reported_at_once(folder: Path, whole: Path) -> None:
    edit_tensors(folder, poison)
    edit_json(folder / "config.json", quantization_config={}, architectures=["Nothing"])
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ExportError) as caught:
        check_files(folder, whole)
    for part in ("5 of its checks", "quantization_config", "Nothing", "NaN", "tokenizer.json is", "chat template"):
        assert part in caught.value.message
    assert caught.value.hint


def test_sums_round_trip_and_every_change_is_found(folder: Path) -> None:
    (folder / "notes").mkdir()
    (folder / "notes" / "card.md").write_text("über")
    path = write_sums(folder)
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()} - {"SHA256SUMS"}
    assert [line[66:] for line in path.read_text().splitlines()] == sorted(names)
    check_sums(folder)
    first = path.read_bytes()
    assert write_sums(folder).read_bytes() == first
    (folder / "notes" / "card.md").write_text("Über")
    (folder / "extra.txt").write_text("")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ExportError) as caught:
        check_sums(folder)
    for part in ("notes/card.md has changed", "extra.txt is not listed", "tokenizer.json is missing"):
        assert part in caught.value.message
    assert caught.value.message.count(";") == 2


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="the program that others check with is not here")
def test_sums_are_what_sha256sum_reads(folder: Path) -> None:
    write_sums(folder)
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=folder, check=False).returncode == 0
    (folder / "config.json").write_text("{}")
    assert subprocess.run(command, cwd=folder, check=False, capture_output=True).returncode == 1


def test_an_emptied_folder_is_not_whole(tmp_path: Path) -> None:
    write_sums(tmp_path)
    assert (tmp_path / "SHA256SUMS").read_text() == ""
    with pytest.raises(ExportError, match="is not a list of SHA-256 sums"):
        check_sums(tmp_path)


def test_a_file_that_is_listed_twice_is_told(folder: Path) -> None:
    path = write_sums(folder)
    [line] = [line for line in path.read_text().splitlines() if line.endswith("  config.json")]
    path.write_text(f"{'0' * 64}  config.json\n{path.read_text()}")
    with pytest.raises(ExportError, match=r"config\.json is listed 2 times"):
        check_sums(folder)
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(ExportError, match=r"config\.json is listed 3 times"):
        check_sums(folder)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there, and pipes are no files")
def test_links_and_pipes_are_not_whole_files(folder: Path, tmp_path: Path) -> None:
    write_sums(folder)
    (tmp_path / "elsewhere").mkdir()
    (folder / "config.json").rename(tmp_path / "elsewhere" / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "elsewhere" / "config.json")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "pipe")
    (folder / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(ExportError) as caught:
        check_sums(folder)
    for name in ("config.json", "more", "pipe", "nowhere"):
        assert f"{name} is a link, or no file at all" in caught.value.message
    assert "missing" not in caught.value.message
    (folder / "SHA256SUMS").unlink()
    os.mkfifo(folder / "SHA256SUMS")
    with pytest.raises(ExportError, match="no regular file"):
        check_sums(folder)


@pytest.mark.parametrize("text", [None, "no sums here\n"])
def test_unreadable_sums_are_an_error(folder: Path, text: str | None) -> None:
    if text is not None:
        (folder / "SHA256SUMS").write_text(text)
    with pytest.raises(ExportError, match="SHA256SUMS"):
        check_sums(folder)

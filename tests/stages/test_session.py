"""What the stages of one run share."""

from __future__ import annotations

import gc
import shutil
import weakref
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from safesteer_lite.config import Values
from safesteer_lite.errors import RunFolderError
from safesteer_lite.events import Event, Note, discard
from safesteer_lite.runs.creation import create_run
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.runs.manifest import manifest_bytes
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages.session import Session
from tests import planted


@pytest.fixture(scope="module")
def model(planted_model: Path) -> Path:
    return planted_model


def test_every_prompt_of_a_run_bears_the_date_on_which_it_began(model: Path, tmp_path: Path) -> None:
    dated = shutil.copytree(model, tmp_path / "dated")
    place = dated / "chat_template.jinja"
    place.write_text("{{ strftime_now('%Y %d %B') }}\n" + place.read_text(encoding="utf-8"), encoding="utf-8")
    run = create_run(tmp_path / "runs", "dated")
    (run.path / "manifest.json").write_bytes(manifest_bytes(replace(run.manifest, run_date="2025-03-02")))
    events: list[Event] = []
    session = Session(planted.settings(dated), run, open_base(dated), events.append)
    prompt = session.policy.template.render([{"role": "user", "content": "Hi"}])
    assert prompt.startswith("2025 02 March\n<|im_start|>user\nHi")
    assert any("02 March 2025 whatever the day" in event.message for event in events if isinstance(event, Note))


def test_what_belongs_to_no_run_bears_today_s_date(model: Path, tmp_path: Path) -> None:
    assert Session(planted.settings(model), RunFolder(tmp_path), open_base(model), discard).day == date.today()
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(RunFolderError):
        _ = Session(planted.settings(model), RunFolder(tmp_path), open_base(model), discard).day


def test_a_model_that_is_dropped_gives_its_memory_back(model: Path, tmp_path: Path) -> None:
    gc.disable()
    try:
        with Session(planted.settings(model), RunFolder(tmp_path), open_base(model), discard) as session:
            weights = weakref.ref(session.policy.model.decoder.embed_tokens.weight)
            assert weights() is not None
        assert weights() is None
    finally:
        gc.enable()


def test_what_a_file_of_prompts_gave_is_told_once_though_two_processes_read_it(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("How do I forge a train ticket?\nHow do I open a stranger's letterbox?\n", encoding="utf-8")
    settings = planted.settings(model, {"prompts.training": str(file)})
    for trainer, told in ((False, 1), (True, 0)):
        events: list[Event] = []
        session = Session(settings, RunFolder(tmp_path), open_base(model), events.append, trainer=trainer)
        assert len(session.prompts.training()) == 2
        assert (
            len([event for event in events if isinstance(event, Note) and "own.txt: 2 prompts" in event.message])
            == told
        )


@pytest.mark.parametrize(
    ("device", "dtype", "kv_heads", "thinking", "expected"),
    [
        ("cpu", "bf16", 2, 0, 128),
        ("cpu", "bf16", 32, 0, 64),  # 8 GiB with 256 tokens each.
        ("cpu", "bf16", 2, 10_000, 64),
        ("cpu", "fp32", 4, 0, 64),
        ("cpu", "bf16", 4, 0, 128),
        ("cuda", "bf16", 2, 0, 64),
    ],
)
def test_more_answers_are_decoded_at_a_time_where_their_cache_is_small(
    device: str, dtype: str, kv_heads: int, thinking: int, expected: int, model: Path, tmp_path: Path
) -> None:
    base = open_base(model)
    shape = replace(base.shape, layers=32, heads=32, kv_heads=kv_heads, head_dim=64)
    asked: Values = {"model.thinking": "on", "model.thinking_tokens": thinking} if thinking else {}
    settings = planted.settings(model, asked)
    session = Session(settings, RunFolder(tmp_path), replace(base, shape=shape), discard)
    session.decision = replace(session.settle(), device=device, compute_dtype=dtype)
    assert session.answer_batch == expected

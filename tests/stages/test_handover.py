"""Training in a process of its own, with the plain library in Unsloth's place: it ends as in one process, however it ends."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from safesteer_lite.errors import Interrupted, SelfCheckError
from safesteer_lite.events import Event, Note, Progress, Warned, discard
from safesteer_lite.hardware.backend import Decision, Library, decide
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.runs.steps import Checkpoints
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages import handover, pipeline
from safesteer_lite.stages.likeness import LARGEST_KL, check_likeness
from safesteer_lite.stages.session import Session
from tests import children, planted
from tests.runs.run_files import rewind

PLAIN = Library("plain", "Plain, as if it were Unsloth.", own_process=True)
Watch = Callable[[Event], None]


@pytest.fixture
def run(planted_run: RunFolder, tmp_path: Path) -> RunFolder:
    """A run whose distillation has not begun."""
    copied = tmp_path / "runs" / planted_run.path.name
    shutil.copytree(planted_run.path, copied)
    for name in ("report.json", "report.html", "events.jsonl"):
        (copied / name).unlink()
    rewind(copied, ("distill", "evaluate", "export"))
    return RunFolder(copied)


def distil(
    model: Path,
    run: RunFolder,
    watch: Watch = discard,
    library: Library = PLAIN,
    stop_requested: Callable[[], bool] = lambda: False,
) -> None:
    """Do the distillation in a process of its own, or with the library's plain kind in this one."""
    settings, base = planted.settings(model), open_base(model)
    decision = replace(decide(settings.model, base.shape, run.path), library=library)
    with planted.one_thread():
        pipeline.run(settings, run, base, watch, stop_requested, last="distill", decision=decision)


def result_of(run: RunFolder) -> dict[str, Any]:
    """What distillation ended with that must not depend on where it was done."""
    files = sorted(path for path in run.stage_folder("distill").rglob("*") if path.is_file())
    # The settings beside the adapter list its layers in the order of a set.
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if "config" not in path.name}
    result = run.record("distill").result
    return {"sums": sums, **{name: result[name] for name in ("best_step", "best_score", "measured", "scaled", "steps")}}


def measured(run: RunFolder) -> list[tuple[object, ...]]:
    """The figures that distillation told, in order."""
    told = [event for event in planted.events_of(run.path) if event["event"] == "Metric"]
    return [(event["name"], event["step"], event["value"]) for event in told if event["stage"] == "distill"]


def trainers() -> list[psutil.Process]:
    """The processes that train for this one."""
    return [child for child in psutil.Process().children() if "stages.trainer" in " ".join(child.cmdline())]


def warnings_of(run: RunFolder) -> list[str]:
    return [str(event["message"]) for event in planted.events_of(run.path) if event["event"] == "Warned"]


def is_step(event: Event, number: int) -> bool:
    return isinstance(event, Progress) and event.what == "steps" and event.done == number


@pytest.mark.slow
def test_another_process_trains_to_the_same_weights_and_tells_the_same(
    planted_model: Path, planted_run: RunFolder, run: RunFolder
) -> None:
    at_work: list[int] = []

    def watch(event: Event) -> None:
        if is_step(event, 8):
            at_work.extend(trainer.pid for trainer in trainers())

    distil(planted_model, run, watch)
    assert len(at_work) == 1 and at_work[0] != os.getpid() and not trainers()
    assert result_of(run) == result_of(planted_run)
    # What was measured of the best step is measured again by the model that everything else is measured with.
    known, found = measured(planted_run), measured(run)
    again = [
        figure for figure in known if figure[1] == run.record("distill").result["best_step"] and figure[0] != "loss"
    ]
    assert known and len(found) > len(known) and set(found) == set(known)
    assert all(found.count(figure) >= known.count(figure) for figure in again)
    told = [str(event.get("message")) for event in planted.events_of(run.path)]
    assert any(message.startswith("Plain trains, having passed the self-check: ") for message in told)
    assert not warnings_of(run) and not [message for message in told if message.startswith("Resumed")]
    result = run.record("distill").result
    assert result["sampled_tokens_a_second"] > 0 and result["peak_memory_bytes"] > 0


@pytest.mark.slow
def test_a_killed_process_is_told_of_and_plain_goes_on(
    planted_model: Path, planted_run: RunFolder, run: RunFolder
) -> None:
    def watch(event: Event) -> None:
        if is_step(event, 3):
            # Plain comes by this step too, and has no other process any more.
            for trainer in trainers():
                trainer.kill()

    distil(planted_model, run, watch)
    (told,) = warnings_of(run)
    assert told in {
        "Plain stopped training (its process was killed by signal 9), so plain transformers and bitsandbytes go on after "
        f"step {step}."
        for step in (2, 4)
    }
    assert result_of(run) == result_of(planted_run)


def other_weights(folder: Path) -> None:
    """Change what a model computes."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "down_proj" in name]:
        tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, folder / "other", metadata={"format": "pt"})
    (folder / "other").replace(folder / "model.safetensors")


@pytest.mark.slow
def test_a_process_that_disagrees_leaves_the_training_to_plain(
    planted_model: Path, planted_run: RunFolder, run: RunFolder, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(planted_model, model)

    def watch(event: Event) -> None:
        """Change the model when it is about to be loaded elsewhere, and put it back before it is loaded here."""
        if isinstance(event, Note) and "process of its own" in event.message:
            other_weights(model)
        if isinstance(event, Warned):
            shutil.copy(planted_model / "model.safetensors", model)

    distil(model, run, watch)
    (told,) = warnings_of(run)
    found = re.fullmatch(
        r"Plain stopped training \(student or teacher is ([\d.]+) nats from that of plain transformers on 8 prompts\), so "
        r"plain transformers and bitsandbytes go on after step 0\.",
        told,
    )
    assert found and float(found[1]) > LARGEST_KL
    assert result_of(run) == result_of(planted_run)


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is not None, reason="Unsloth is installed")
def test_without_unsloth_its_process_says_so_and_plain_trains(planted_model: Path, run: RunFolder) -> None:
    class Enough(Exception):
        pass

    def watch(event: Event) -> None:
        if is_step(event, 1):
            raise Enough

    with pytest.raises(Enough):
        distil(planted_model, run, watch, Library("unsloth", "Asked for.", own_process=True))
    assert warnings_of(run) == [
        "Unsloth stopped training (ModuleNotFoundError: No module named 'unsloth'), so plain transformers and bitsandbytes "
        "go on after step 0."
    ]


@pytest.mark.slow
def test_a_wish_to_stop_reaches_the_process_and_the_run_ends_the_same(
    planted_model: Path, planted_run: RunFolder, run: RunFolder
) -> None:
    seen: list[Event] = []

    def stop_requested() -> bool:
        return any(is_step(event, 1) for event in seen)

    with pytest.raises(Interrupted, match=r"Stopped after step \d; everything up to there is saved\.") as caught:
        distil(planted_model, run, seen.append, stop_requested=stop_requested)
    assert not trainers() and not warnings_of(run)
    step = int(caught.value.message.split()[3].rstrip(";"))
    assert 1 <= step < 8
    saved = max(path.name for path in next(run.path.glob("*.partial")).glob("step-*"))
    assert saved == f"step-{step:06d}"
    distil(planted_model, run, library=replace(PLAIN, own_process=False))
    assert result_of(run) == result_of(planted_run)


def killed_while_another_trains(model: Path, run: Path, note: Path) -> None:
    """Kill this process, which has another train for it."""

    def watch(event: Event) -> None:
        if is_step(event, 2):
            note.write_text(str(trainers()[0].pid), encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)

    distil(model, RunFolder(run), watch)


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.slow
def test_no_process_goes_on_training_for_one_that_is_gone(planted_model: Path, run: RunFolder, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    assert children.run(killed_while_another_trains, planted_model, run.path, note) == -signal.SIGKILL
    pid, until = int(note.read_text(encoding="utf-8")), time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "it goes on"
        time.sleep(0.05)


ECHO = (
    "import json, os; asked = json.loads(input()); card = os.environ.get('CUDA_VISIBLE_DEVICES'); "
    "print(json.dumps({'ended': 'done', 'seen': card, 'number': asked['decision']['card']}), flush=True)"
)
"""Tells which card it would train on."""


def ending_of(
    code: str, decision: Decision, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """How a process ends that does this in place of training."""
    monkeypatch.setattr(handover, "_SERVE", code)
    session = Session(planted.settings(model), RunFolder(folder), open_base(model), discard, decision=decision)
    request = handover._request(session, Checkpoints(folder / "steps", "mark"), folder / "known")
    return handover._follow(session, request)


def test_the_other_process_sees_the_chosen_card_alone(
    planted_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    decision = Decision("cuda", "nf4", False, "bf16", "fits", "", PLAIN, card=1)
    ending = ending_of(ECHO, decision, planted_model, tmp_path, monkeypatch)
    assert (ending["seen"], ending["number"]) == ("7", 0)
    ending = ending_of(ECHO, replace(decision, device="cpu", card=0), planted_model, tmp_path, monkeypatch)
    assert ending["seen"] == "4,7"


@pytest.mark.skipif(os.name == "nt", reason="needs sessions")
def test_a_process_that_is_gone_is_not_waited_for_though_its_child_keeps_its_output_open(
    planted_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "_END_SECONDS", 0.5)
    note = tmp_path / "pid"
    child = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        f"import subprocess, sys, time, os; subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
        f"while not os.path.exists({str(note)!r}): time.sleep(0.01)"
    )
    decision, began = Decision("cpu", "nf4", False, "bf16", "fits", "", PLAIN), time.monotonic()
    try:
        ending = ending_of(f"exec({code!r})", decision, planted_model, tmp_path, monkeypatch)
        assert ending == {"ended": "failed", "because": "its process ended and said last: nothing"}
        assert time.monotonic() - began < 30
    finally:
        os.kill(int(note.read_text(encoding="utf-8")), signal.SIGKILL)


def test_another_adapter_and_other_expectations_are_not_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(8, 50, generator=generator).log_softmax(-1) for _ in range(2))
    known = {"student": student, "teacher": teacher, "a": torch.tensor([1.0, 0.0]), "b": torch.zeros(2)}
    rounded = {**known, "a": known["a"].bfloat16()}
    assert "within 0.0000 nats" in check_likeness(known, rounded)
    shifted = teacher.clone()
    shifted[:, 0] += 5
    with pytest.raises(SelfCheckError, match="nats from that of plain transformers on 8 prompts") as caught:
        check_likeness(known, {**known, "teacher": shifted.log_softmax(-1)})
    assert float(caught.value.message.split(" is ")[1].split()[0]) > LARGEST_KL
    with pytest.raises(SelfCheckError, match="nan nats"):
        check_likeness(known, {**known, "student": student * float("nan")})
    with pytest.raises(SelfCheckError, match="b has other values"):
        check_likeness(known, {**known, "b": torch.tensor([0.0, 0.1])})
    with pytest.raises(SelfCheckError, match="only one of the two has b"):
        check_likeness(known, {name: value for name, value in known.items() if name != "b"})

"""The process that trains for another one: it takes up a saved step, does the steps that are left, and tells of them.

It is a process of its own for the sake of Unsloth, which has to be imported before transformers and changes it for good. What it
is asked comes as one line of JSON on standard input; each event goes out as another on standard output, and last of all how it
ended. When standard input ends, whoever asked is gone, and so is this process.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from safesteer_lite import config
from safesteer_lite.errors import Interrupted, SafeSteerError
from safesteer_lite.events import Event, to_record
from safesteer_lite.foreign import forbid_hub_kernels
from safesteer_lite.hardware import allocator
from safesteer_lite.hardware.backend import Decision, Library
from safesteer_lite.method.memory import is_out_of_memory
from safesteer_lite.models import unsloth
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.runs.steps import Checkpoints
from safesteer_lite.sources.base import open_base
from safesteer_lite.sources.hub import first_line
from safesteer_lite.stages.likeness import check_likeness, expectations
from safesteer_lite.stages.session import Session
from safesteer_lite.stages.training import begin, paces, take_steps

STOP = "stop"
"""The line that asks for an end after the step at work."""


@dataclass(frozen=True)
class Request:
    """What the process is asked.

    Attributes:
        run: the run's folder.
        base: the base model's folder.
        settings: all settings, as TOML.
        decision: how the base is loaded, as a dictionary.
        steps: the folder of the saved steps, one of which is there.
        fingerprint: what they depend on.
        known: a file with the `expectations` of a model that is trusted, at the newest saved step.
        stage: what events belong to.
        threads: of the CPU, so that sums are added up in the same order.
    """

    run: str
    base: str
    settings: str
    decision: dict[str, Any]
    steps: str
    fingerprint: str
    known: str
    stage: str
    threads: int


def serve() -> None:
    """Do what standard input asks, and tell it on standard output."""
    # Libraries write to standard output too: that goes to standard error, and events to where nothing else does.
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    asked = os.fdopen(0, encoding="utf-8")
    request, stop = Request(**json.loads(asked.readline())), threading.Event()
    threading.Thread(target=_listen, args=(asked, stop), daemon=True).start()

    def tell(record: Mapping[str, object]) -> None:
        told.write(json.dumps(record) + "\n")
        told.flush()

    try:
        figures = _train(request, lambda event: tell(to_record(event)), stop.is_set)
    except Interrupted as error:
        tell({"ended": "stopped", "because": error.message})
    except Exception as error:
        tell({"ended": "failed", "because": _reason(error)})
    else:
        tell({"ended": "done", **figures})
    # Without Python's own end, in which some libraries of a card wait for their threads.
    os._exit(0)


def _listen(asked: TextIO, stop: threading.Event) -> None:
    for line in asked:
        if line.strip() == STOP:
            stop.set()
    os._exit(1)


def _train(request: Request, emit: Callable[[Event], None], stop_requested: Callable[[], bool]) -> dict[str, Any]:
    """Load, check and train; returns figures of this process, which end with it."""
    forbid_hub_kernels()
    decision = Decision(**{**request.decision, "library": Library(**request.decision["library"])})
    if decision.library.name == "unsloth":
        unsloth.take_up()
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(request.threads)
    settings = config.build([("the run", config.parse_toml(request.settings, "the run's settings")[0])])
    run = RunFolder(Path(request.run))
    base = open_base(Path(request.base), run.chat_template if settings.model.chat_template else "")
    session = Session(settings, run, base, emit, request.stage, stop_requested, decision, trainer=True)
    checkpoints = Checkpoints(Path(request.steps), request.fingerprint, session.warn)
    training = begin(session, checkpoints)
    likeness = check_likeness(load_file(request.known), expectations(session))
    session.note(f"{decision.library.name.capitalize()} trains, having passed the self-check: {likeness}.")
    if stop_requested():
        raise Interrupted("Stopped before the next step; everything up to there is saved.")
    take_steps(session, training, checkpoints)
    return {**paces(training.loop), "peak_memory_bytes": allocator.peak()}


def _reason(error: Exception) -> str:
    """An error as a part of a sentence."""
    if is_out_of_memory(error):
        return "memory ran out"
    said = error.message if isinstance(error, SafeSteerError) else f"{type(error).__name__}: {first_line(error)}"
    return said.rstrip(".")

"""Training in another process: what it is given, what it tells, and what becomes of the run when it ends, however it ends."""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import IO, Any

import torch
from safetensors.torch import save_file

from safesteer_lite import children, config
from safesteer_lite.errors import Interrupted
from safesteer_lite.events import from_record
from safesteer_lite.hardware.machine import only_card
from safesteer_lite.runs.durable import explained
from safesteer_lite.runs.steps import Checkpoints
from safesteer_lite.stages.likeness import expectations
from safesteer_lite.stages.session import Session
from safesteer_lite.stages.trainer import STOP, Request
from safesteer_lite.stages.training import begin

_SERVE = "from safesteer_lite.stages.trainer import serve; serve()"
# How long an event is waited for before it is asked whether the user wants to stop.
_GLANCE_SECONDS = 0.2
_END_SECONDS = 10.0
# What keeps Ctrl-C from a process on Windows, where there are no sessions.
_OWN_GROUP: int = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)


def train_elsewhere(session: Session, checkpoints: Checkpoints) -> dict[str, Any]:
    """Let a process of its own train with the library that was decided, from the newest saved step as far as it gets.

    The plain model prepares the training and is freed. Where the process fails, the user is told why; whatever it saved is
    there for the plain model to go on from.

    Args:
        session: of the run.
        checkpoints: of its distillation.

    Returns:
        Figures of the process, for the result of the stage; empty where it was not needed or failed.

    Raises:
        Interrupted: the user asked to stop; the step is saved.
    """
    with tempfile.TemporaryDirectory() as scratch:
        known = Path(scratch) / "known.safetensors"
        if not _prepare(session, checkpoints, known):
            return {}
        session.drop_policy()
        session.note(f"{_name(session)} is started to train in a process of its own.")
        ending = _follow(session, _request(session, checkpoints, known))
    if ending["ended"] == "done":
        return {name: value for name, value in ending.items() if name != "ended"}
    if ending["ended"] == "stopped":
        raise Interrupted(ending["because"])
    saved = checkpoints.newest_checkpoint()
    session.warn(
        f"{_name(session)} stopped training ({ending['because']}), so plain transformers and "
        f"bitsandbytes go on after step {saved[0] if saved else 0}."
    )
    return {}


def _name(session: Session) -> str:
    return session.settle().library.name.capitalize()


def _prepare(session: Session, checkpoints: Checkpoints, known: Path) -> bool:
    """Save the step to go on from, and what its model is to be known by; False where no step is left."""
    training = begin(session, checkpoints)
    if training.is_over:
        return False
    if not training.loop.done:
        training.save(checkpoints)
    with explained("what the other process compares its model with"):
        save_file(expectations(session), known)
    return True


def _request(session: Session, checkpoints: Checkpoints, known: Path) -> Request:
    return Request(
        run=str(session.run.path.absolute()),
        base=str(session.base.folder.absolute()),
        settings=config.to_toml(session.config),
        # The process sees one card, which is its first.
        decision=asdict(replace(session.settle(), card=0)),
        steps=str(checkpoints.folder.absolute()),
        fingerprint=checkpoints.fingerprint,
        known=str(known),
        stage=session.stage,
        threads=torch.get_num_threads(),
    )


def _follow(session: Session, request: Request) -> dict[str, Any]:
    """Pass on what the process tells until it ends, and ask it to stop when the user does; returns how it ended."""
    asked, gone_since = False, math.inf
    with _started(request, only_card(session.settle().place)) as trainer:
        while True:
            if not asked and session.stop_requested():
                asked = True
                trainer.ask(STOP)
            try:
                line = trainer.lines.get(timeout=_GLANCE_SECONDS)
            except Empty:
                # Usually the end of what it tells says that it is gone; but a process that it started may keep that open.
                if trainer.process.poll() is None:
                    continue
                gone_since = min(gone_since, time.monotonic())
                if time.monotonic() - gone_since < _END_SECONDS:
                    continue
                line = ""
            if not line.endswith("\n"):
                return {"ended": "failed", "because": trainer.last_words()}
            record: dict[str, Any] = json.loads(line)
            if "ended" in record:
                return record
            session.emit(from_record(record))


@dataclass(frozen=True)
class _Trainer:
    """A running process.

    Attributes:
        process: itself.
        said: a file with its standard error.
        lines: what it tells, a line each; one without an end, which may be empty, when it is gone.
    """

    process: subprocess.Popen[str]
    said: IO[bytes]
    lines: Queue[str] = field(default_factory=Queue)

    def ask(self, text: str) -> None:
        """Give it a line to read."""
        assert self.process.stdin is not None
        with suppress(OSError):  # It is gone, which the missing answer says better.
            self.process.stdin.write(text + "\n")
            self.process.stdin.flush()

    def listen(self) -> None:
        """Collect what it tells until it is gone."""
        assert self.process.stdout is not None
        line = ""
        with suppress(ValueError, OSError):  # Closed meanwhile.
            for line in self.process.stdout:
                self.lines.put(line)
        if not line or line.endswith("\n"):
            self.lines.put("")

    def last_words(self) -> str:
        """Why it is gone, as a part of a sentence."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_SECONDS)
        code = self.process.returncode
        if code is not None and code < 0:
            return f"its process was killed by signal {-code}"
        self.said.seek(0)
        lines = self.said.read()[-4096:].decode("utf-8", "replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        return f"its process ended and said last: {last.rstrip('.')}"


@contextmanager
def _started(request: Request, variables: dict[str, str]) -> Iterator[_Trainer]:
    """The process at work on a request, with these variables in its environment; it is gone, and its memory free, behind the
    block."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            children.python_code(_SERVE),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=children.environment(HF_HUB_OFFLINE="1", **variables),
            encoding="utf-8",
            # Ctrl-C at the terminal is for the process that asks, which passes it on; the step at work is then finished.
            start_new_session=True,
            creationflags=_OWN_GROUP,
        )
        trainer = _Trainer(process, said)
        listener = Thread(target=trainer.listen, daemon=True)
        listener.start()
        try:
            trainer.ask(json.dumps(asdict(request)))
            yield trainer
        finally:
            process.kill()
            process.wait()
            listener.join(_END_SECONDS)
            # What is still being read cannot be closed: a process that the killed one had started keeps it open.
            ended = () if listener.is_alive() else (process.stdout,)
            for stream in (process.stdin, *ended):
                if stream:
                    with suppress(OSError):
                        stream.close()

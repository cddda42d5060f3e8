"""Child processes that start at once: forked from a server that has imported already what takes seconds to import.

Forking the tests' own process would not do: it may have threads by now, and they hold locks that a child would wait for.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import torch

_HEAVY = [
    "torch",
    "peft",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "safesteer_lite.export.weights.merge",
    "safesteer_lite.stages.pipeline",
    "pytest",
    "tests.planted",
]


def start(work: Callable[..., None], *arguments: object) -> BaseProcess:
    """Start a child that does `work` on one thread; both must be importable, since the child is no copy of this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_HEAVY)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    child = context.Process(target=_on_one_thread, args=(work, *arguments))
    child.start()
    return child


def run(work: Callable[..., None], *arguments: object) -> int | None:
    """Do `work` in a child; returns its exit code, a signal as a negative number."""
    child = start(work, *arguments)
    child.join()
    return child.exitcode


def _on_one_thread(work: Callable[..., None], *arguments: object) -> None:
    torch.set_num_threads(1)
    work(*arguments)

"""A GGUF file answering in llama.cpp, in this process: what users of Ollama and LM Studio run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safesteer_lite.errors import ExportError
from safesteer_lite.export.gguf import INSTALL
from safesteer_lite.export.weights.verify import FailedCheck

LIKELIEST = 200
"""How many tokens of a distribution llama.cpp is asked for; the rest counts as one."""


@dataclass(frozen=True)
class Answer:
    """One greedy answer.

    Attributes:
        tokens: ids, with the end-of-turn token where it was reached.
        first: log-probabilities of the likeliest tokens at the first position, by id.
    """

    tokens: tuple[int, ...]
    first: Mapping[int, float]


class LlamaCpp:
    """A loaded GGUF file; use as a context manager, which frees its memory at the end."""

    def __init__(self, file: Path, context: int, threads: int) -> None:
        """Load a file.

        Args:
            file: the GGUF file.
            context: the longest prompt with its answer, in tokens.
            threads: CPU threads.

        Raises:
            FailedCheck: llama.cpp cannot load it.
            ExportError: llama.cpp is not installed.
        """
        try:
            import xllamacpp
        except ImportError as error:
            raise ExportError("llama.cpp is not installed.", INSTALL) from error
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx, parameters.n_parallel = context, 1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        parameters.verbosity, parameters.warmup = -1, False
        try:
            self._server: Any = xllamacpp.Server(parameters)
        except RuntimeError as error:
            # It gives no cause; a file that is cut short, foreign or too large for the memory all end here.
            raise FailedCheck(
                f"llama.cpp cannot load {file.name}.",
                "Free memory and export again; if it fails again, the file is not usable.",
            ) from error
        self._name = file.name

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *exc: object) -> None:
        del self._server

    def greedy(self, prompt: Sequence[int], tokens: int) -> Answer:
        """Answer a prompt given as token ids with at most `tokens` tokens, and tell the first distribution."""
        choice = self._complete(prompt, tokens, n_probs=LIKELIEST)["choices"][0]
        # None where the turn ends at once.
        steps = (choice["logprobs"] or {}).get("content")
        if not steps:
            raise FailedCheck(f"{self._name} answers nothing in llama.cpp.", "Export again.")
        first = {entry["id"]: entry["logprob"] for entry in steps[0]["top_logprobs"] if entry["logprob"] is not None}
        return Answer(tuple(step["id"] for step in steps), first)

    def answers(self, prompts: Sequence[Sequence[int]], tokens: int, done: Callable[[int], None]) -> list[str]:
        """Greedy answers as text, one after the other: on a CPU, answering several at once gains nothing."""
        found = []
        for prompt in prompts:
            found.append(str(self._complete(prompt, tokens)["choices"][0]["text"]))
            done(len(found))
        return found

    def prompt_length(self, text: str) -> int:
        """How many tokens llama.cpp makes of a user's text with the file's own template and tokenizer."""
        request = {"messages": [{"role": "user", "content": text}], "max_tokens": 1, "temperature": 0.0}
        return int(self._checked(self._server.handle_chat_completions(request))["usage"]["prompt_tokens"])

    def _complete(self, prompt: Sequence[int], tokens: int, **more: object) -> dict[str, Any]:
        # Without the cache an answer does not depend on which prompts came before it.
        request = {"prompt": list(prompt), "max_tokens": tokens, "temperature": 0.0, "cache_prompt": False, **more}
        return self._checked(self._server.handle_completions(request))

    def _checked(self, reply: dict[str, Any]) -> dict[str, Any]:
        if "error" in reply:
            message = reply["error"].get("message", reply["error"])
            raise ExportError(f"llama.cpp refused a prompt for {self._name}: {message}.", "Shorten the prompts.")
        return reply

"""A GGUF file answering in llama.cpp, in a process of its own: what users of Ollama and LM Studio run."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import IO, Any

from safesteer_lite import children
from safesteer_lite.errors import ExportError
from safesteer_lite.export.gguf import INSTALL
from safesteer_lite.export.weights.verify import FailedCheck

LIKELIEST = 200
"""How many tokens of a distribution llama.cpp is asked for; the rest counts as one."""

PATIENCE_SECONDS = 300.0
"""When llama.cpp is given up: later than any machine that could be used needs."""
SLOWEST_TOKEN_SECONDS = 2.0
"""What is added to it for each token of an answer."""
_SLOWEST_BYTES_A_SECOND = 10_000_000
_SERVE = "from safesteer_lite.export.gguf.llama_child import serve; serve(*sys.argv[1:])"


def check_llama() -> None:
    """See that llama.cpp is installed.

    Raises:
        ExportError: it is not.
    """
    if find_spec("xllamacpp") is None:
        raise ExportError("llama.cpp is not installed.", INSTALL)


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

    def __init__(self, file: Path, context: int, threads: int, adapter: Path | None = None) -> None:
        """Load a file.

        Args:
            file: the GGUF file.
            context: the longest prompt with its answer, in tokens.
            threads: CPU threads.
            adapter: a LoRA adapter's GGUF file to put on it, as it was trained; None for the file alone.

        Raises:
            FailedCheck: llama.cpp cannot load it.
            ExportError: llama.cpp is not installed.
        """
        check_llama()
        self._name, self._context = (adapter or file).name, context
        beside = [str(adapter.absolute())] if adapter else []
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            children.python_code(_SERVE, str(file.absolute()), str(context), str(threads), *beside),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=children.environment(HF_HUB_OFFLINE="1"),
            encoding="utf-8",
        )
        # Read by a thread of its own: a line can be waited for with a bound only where somebody else reads it.
        self._lines: Queue[str] = Queue()
        self._listener = Thread(target=self._listen, daemon=True)
        self._listener.start()
        try:
            size = file.stat().st_size if file.exists() else 0
            reply = self._next_reply(PATIENCE_SECONDS + size / _SLOWEST_BYTES_A_SECOND)
        except BaseException:
            self._end()
            raise
        if "error" in reply:
            self._end()
            # It gives no cause; a file that is cut short, foreign or too large for the memory all end here.
            raise FailedCheck(
                f"llama.cpp cannot load {self._name}.",
                "Free memory and export again; if it fails again, the file is not usable.",
            )

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()

    def greedy(self, prompt: Sequence[int], tokens: int) -> Answer:
        """Answer a prompt given as token ids with at most `tokens` tokens, and tell the first distribution."""
        choice = self._complete(prompt, tokens, n_probs=LIKELIEST)["choices"][0]
        # None where the turn ends at once.
        steps = (choice["logprobs"] or {}).get("content")
        if not steps:
            raise FailedCheck(f"{self._name} answers nothing in llama.cpp.", "Export again.")
        first = {entry["id"]: entry["logprob"] for entry in steps[0]["top_logprobs"] if entry["logprob"] is not None}
        return Answer(tuple(step["id"] for step in steps), first)

    def answers(
        self, prompts: Sequence[Sequence[int]], tokens: int, done: Callable[[int], None], until: str = ""
    ) -> list[str]:
        """Greedy answers as text, one after the other: on a CPU, answering several at once gains nothing.

        Args:
            prompts: as token ids.
            tokens: of an answer, at most.
            done: called with the number of answers so far.
            until: an answer ends before this text; empty for no such text.
        """
        found, more = [], {"stop": [until]} if until else {}
        for prompt in prompts:
            found.append(str(self._complete(prompt, tokens, **more)["choices"][0]["text"]))
            done(len(found))
        return found

    def prompt_length(self, text: str, switches: Mapping[str, bool] | None = None) -> int:
        """How many tokens llama.cpp makes of a user's text with the file's own template and tokenizer.

        Args:
            text: what the user says.
            switches: what the template is told besides, see `ChatTemplate`.
        """
        request = {"messages": [{"role": "user", "content": text}], "max_tokens": 1, "temperature": 0.0}
        if switches:
            request["chat_template_kwargs"] = dict(switches)
        return int(self._ask("chat", request, self._context)["usage"]["prompt_tokens"])

    def _complete(self, prompt: Sequence[int], tokens: int, **more: object) -> dict[str, Any]:
        # Without the cache an answer does not depend on which prompts came before it.
        request = {"prompt": list(prompt), "max_tokens": tokens, "temperature": 0.0, "cache_prompt": False, **more}
        return self._ask("completion", request, len(prompt) + tokens)

    def _ask(self, way: str, request: Mapping[str, object], tokens: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(OSError):  # The process is gone, which the missing reply says better.
            self._process.stdin.write(json.dumps({"way": way, **request}) + "\n")
            self._process.stdin.flush()
        reply = self._next_reply(PATIENCE_SECONDS + tokens * SLOWEST_TOKEN_SECONDS)
        if "error" in reply:
            fault = reply["error"]
            message = fault.get("message", fault) if isinstance(fault, dict) else fault
            raise ExportError(
                f"llama.cpp refused a prompt for {self._name}: {str(message).rstrip('.')}.", "Shorten the prompts."
            )
        return reply

    def _next_reply(self, patience: float) -> dict[str, Any]:
        """The next line that the process says, waited for at most `patience` seconds.

        Raises:
            FailedCheck: there is none, because the process ended or does not go on.
        """
        try:
            line = self._lines.get(timeout=patience)
        except Empty:
            raise FailedCheck(
                f"llama.cpp gave no answer with {self._name} for {patience:.0f} seconds.",
                "Export again; if it happens again, the file is not usable.",
            ) from None
        if not line:
            self._end()
            raise FailedCheck(f"llama.cpp ended by itself while it worked with {self._name}{self._last_words()}.")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with suppress(ValueError, OSError):  # Closed meanwhile.
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put("")

    def _last_words(self) -> str:
        """What the process said last of what went wrong, as the end of a sentence."""
        self._said.seek(0)
        lines = [line.strip() for line in self._said.read()[-4096:].decode("utf-8", "replace").splitlines()]
        last = next((line for line in reversed(lines) if line), "")
        return f", and said last: {last.rstrip('.')}" if last else ""

    def _end(self) -> None:
        """Take the process down, however it stands; its memory is free afterwards."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._listener.join(10)
        if self._listener.is_alive():
            return
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                with suppress(OSError):
                    stream.close()

"""An OpenAI-compatible endpoint on this machine, whose model answers as a test wants it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Endpoint:
    """What the endpoint does, and what it was asked.

    Attributes:
        url: where it answers.
        write: what its model writes about a request and its answer.
        failures: status codes that come before anything else, one a request.
        keeps_form: whether it knows `response_format`.
        raw: what is sent in place of a completion.
        bodies, headers: of every request, in order.
    """

    url: str = ""
    write: Callable[[str, str], str] = lambda request, answer: '{"refused": false, "harmful": false}'
    failures: list[int] = field(default_factory=list)
    keeps_form: bool = True
    raw: bytes = b""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def serving() -> Iterator[Endpoint]:
    """An endpoint that answers while the block runs."""
    state = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.bodies.append(body)
            state.headers.append(dict(self.headers))
            if self.path != "/v1/chat/completions":
                self.answer(404, b"{}")
            elif state.failures:
                self.answer(state.failures.pop(0), b"{}")
            elif "response_format" in body and not state.keeps_form:
                self.answer(400, b'{"error": "unknown field"}')
            else:
                exchange = json.loads(body["messages"][-1]["content"])
                text = state.write(exchange["request"], exchange["answer"])
                said = {"choices": [{"message": {"role": "assistant", "content": text}}]}
                self.answer(200, state.raw or json.dumps(said).encode())

        def answer(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()

"""A public file at a fixed commit: fetched once, told first, and believed only by its checksum."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from safesteer_lite.errors import ModelError, PromptError
from safesteer_lite.events import Event, Note, Progress, discard
from safesteer_lite.sources import dataset
from safesteer_lite.sources.dataset import PinnedFile, fetch_pinned

CONTENT = b"prompt\nHello\n"
COMMIT = "c" * 40
FILE = PinnedFile("github", "owner/name", COMMIT, "data/set.csv", hashlib.sha256(CONTENT).hexdigest(), "MIT")


@dataclass
class Server:
    """What the server answers, and what it was asked for."""

    status: int = 200
    content: bytes = CONTENT
    kind: str = "text/plain"
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """GitHub and the model hub, both on this machine, and a cache of this test's own."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            # Once a day the hub's library asks for something of its own first.
            if not self.path.startswith("/api/"):
                state.asked.append(self.path)
            self.send_response(state.status)
            self.send_header("Content-Type", state.kind)
            self.send_header("Content-Length", str(len(state.content)))
            self.end_headers()
            self.wfile.write(state.content)

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    address = f"http://127.0.0.1:{listening.server_port}"
    monkeypatch.setenv("SAFESTEER_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(dataset, "GITHUB", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield state
    listening.shutdown()
    listening.server_close()


def test_a_file_is_told_fetched_once_and_kept(server: Server, tmp_path: Path) -> None:
    events: list[Event] = []
    place = fetch_pinned(FILE, events.append, "suites")
    assert place.read_bytes() == CONTENT and place.name == "set.csv" and (tmp_path / "cache") in place.parents
    assert server.asked == [f"/owner/name/{COMMIT}/data/set.csv"]
    assert [event.message for event in events if isinstance(event, Note)] == [
        "Fetching set.csv of owner/name at ccccccc: 0 kB, licence MIT."
    ]
    assert fetch_pinned(FILE, events.append, "suites") == place and len(server.asked) == 1
    place.write_bytes(b"changed")
    assert fetch_pinned(FILE, discard, "suites").read_bytes() == CONTENT and len(server.asked) == 2


def test_the_progress_of_a_large_file_is_told_and_its_own_option_named(server: Server) -> None:
    server.content = b"x" * (3 << 20)
    large = replace(FILE, sha256=hashlib.sha256(server.content).hexdigest(), given_by="--tasks-from")
    events: list[Event] = []
    fetch_pinned(large, events.append, "capability")
    told = [event for event in events if isinstance(event, Progress)]
    assert 1 < len(told) <= 3 and {event.total for event in told} == {3 << 20}
    assert [event.done for event in told] == sorted(event.done for event in told)
    server.status = 404
    with pytest.raises(PromptError) as failed:
        fetch_pinned(replace(large, commit="d" * 40), discard, "capability")
    assert "--tasks-from" in failed.value.hint and "--suite-file" not in failed.value.hint


def test_a_data_set_of_the_hub(server: Server) -> None:
    fetch_pinned(replace(FILE, host="hub", sha256=""), discard, "suites")
    assert server.asked == [f"/datasets/owner/name/resolve/{COMMIT}/data/set.csv"]


def test_another_content_is_not_believed_and_not_kept(server: Server) -> None:
    server.content = b"something else"
    for _ in range(2):
        with pytest.raises(PromptError, match="its checksum differs"):
            fetch_pinned(FILE, discard, "suites")
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("status", "said"), [(401, "accept its licence"), (403, "accept its licence"), (404, "answers 404")]
)
def test_refusals(server: Server, status: int, said: str) -> None:
    server.status = status
    with pytest.raises(PromptError, match=said) as told:
        fetch_pinned(FILE, discard, "suites")
    assert "--suite-file" in told.value.hint


def test_a_page_in_place_of_the_file(server: Server) -> None:
    server.kind = "text/html; charset=utf-8"
    with pytest.raises(ModelError, match="A web page came"):
        fetch_pinned(FILE, discard, "suites")


def test_an_answer_without_end_is_cut_off(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "LARGEST", 4)
    with pytest.raises(PromptError, match="does not end"):
        fetch_pinned(FILE, discard, "suites")

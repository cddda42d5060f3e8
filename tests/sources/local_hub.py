"""A model hub on this machine, so that the hub's own client can be tested without a network."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

HUB_ID = "nobody/no-such-model"
COMMIT = "1" * 40
PAGE = b"<!doctype html><title>Welcome to this hotel</title>"


def git_hash(content: bytes) -> str:
    """What git calls a small file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(name: str) -> bool:
    """Whether the hub keeps a file outside git, and states its SHA-256."""
    return name.endswith((".safetensors", ".gguf"))


def hub_hash(name: str, content: bytes) -> str:
    """The hash that the hub states of a file."""
    return hashlib.sha256(content).hexdigest() if is_large(name) else git_hash(content)


class LocalHub(BaseHTTPRequestHandler):
    """As much of the model hub's protocol as its own client needs: a repository of the files in `files`.

    Attributes:
        files: name to content.
        asked: the last part of every path that was asked for.
        refusal: the hub's code for what is wrong, in answer to everything about files.
        breaks: for a file, after how many bytes each of its next answers breaks off.
        starts: for a file, from which byte it was asked for, by GET and in order.
        sent: for a file, what is sent in place of its content.
        ranges: whether a part of a file may be asked for.
        hashes: whether the list of files states their hashes.
        elsewhere: whether files lie under another address, to which the hub sends whoever asks.
        page: what a web page answers: nothing, `files`, or `all`.
    """

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]]
    asked: ClassVar[list[str]]
    refusal: ClassVar[str]
    breaks: ClassVar[dict[str, list[int]]]
    starts: ClassVar[dict[str, list[int]]]
    sent: ClassVar[dict[str, bytes]]
    ranges: ClassVar[bool]
    hashes: ClassVar[bool]
    elsewhere: ClassVar[bool]
    page: ClassVar[str]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path.rsplit("/", 1)[-1])
        headers = {"X-Repo-Commit": COMMIT}
        file = path.partition(f"/resolve/{COMMIT}/")[2] or path.partition("/resolve/main/")[2]
        if self.elsewhere and file and self.command == "GET":
            self.answer(302, b"", {"Location": f"/stored/{file}?signature=1"})
            return
        file = file or path.partition("/stored/")[2]
        if self.page == "all" or (file and self.page == "files"):
            self.answer(200, PAGE, {"Content-Type": "text/html; charset=utf-8"})
        elif self.refusal and (file or self.refusal == "RepoNotFound"):
            self.answer(403 if self.refusal == "GatedRepo" else 404, b"{}", {"X-Error-Code": self.refusal})
        elif file:
            self.answer_file(file, headers)
        elif "/tree/" in path:
            entries = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in self.files.items()]
            self.answer(200, json.dumps(entries).encode(), headers)
        else:
            siblings = [self.listed(name, content) for name, content in self.files.items()]
            info = {"id": HUB_ID, "sha": COMMIT, "siblings": siblings, "tags": ["license:mit"], "private": False}
            self.answer(200, json.dumps(info).encode(), headers)

    def listed(self, name: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"rfilename": name, "size": len(content)}
        if self.hashes:
            entry["blobId"] = git_hash(content)
            if is_large(name):
                entry["lfs"] = {"sha256": hub_hash(name, content), "size": len(content), "pointerSize": 130}
        return entry

    def answer_file(self, file: str, headers: dict[str, str]) -> None:
        content = self.files[file]
        headers |= {"ETag": f'"{hub_hash(file, content)}"'}
        if self.command != "GET":
            self.answer(200, content, headers)
            return
        content = self.sent.get(file, content)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.starts.setdefault(file, []).append(start)
        if start and self.ranges:
            headers |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            self.answer(206, content[start:], headers, self.next_break(file))
        else:
            self.answer(200, content, headers, self.next_break(file))

    def next_break(self, file: str) -> int | None:
        waiting = self.breaks.get(file)
        return waiting.pop(0) if waiting else None

    def answer(self, status: int, content: bytes, headers: dict[str, str], breaks_at: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:breaks_at])
        if breaks_at is not None:
            self.close_connection = True


@contextmanager
def serving(home: Path) -> Iterator[tuple[type[LocalHub], dict[str, str]]]:
    """A fresh hub, and the environment of a process that knows no other one and keeps its cache in `home`."""

    class Hub(LocalHub):
        files: ClassVar[dict[str, bytes]] = {}
        asked: ClassVar[list[str]] = []
        refusal: ClassVar[str] = ""
        breaks: ClassVar[dict[str, list[int]]] = {}
        starts: ClassVar[dict[str, list[int]]] = {}
        sent: ClassVar[dict[str, bytes]] = {}
        ranges: ClassVar[bool] = True
        hashes: ClassVar[bool] = True
        elsewhere: ClassVar[bool] = False
        page: ClassVar[str] = ""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield Hub, {"HF_ENDPOINT": address, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
    finally:
        server.shutdown()
        server.server_close()

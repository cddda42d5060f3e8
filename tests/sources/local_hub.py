"""A model hub on this machine, so that the hub's own client can be tested without a network."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

HUB_ID = "nobody/no-such-model"


class LocalHub(BaseHTTPRequestHandler):
    """As much of the model hub's protocol as its own client needs: a repository of the files in `files`."""

    files: ClassVar[dict[str, bytes]]
    asked: ClassVar[list[str]]
    refusal: ClassVar[str]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path.rsplit("/", 1)[-1])
        headers = {"X-Repo-Commit": "1" * 40}
        file = path.partition("/resolve/" + "1" * 40 + "/")[2] or path.partition("/resolve/main/")[2]
        if self.refusal and (file or self.refusal == "RepoNotFound"):
            self.answer(403 if self.refusal == "GatedRepo" else 404, b"{}", {"X-Error-Code": self.refusal})
        elif file:
            content = self.files[file]
            self.answer(200, content, headers | {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})
        elif "/tree/" in path:
            entries = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in self.files.items()]
            self.answer(200, json.dumps(entries).encode(), headers)
        else:
            siblings = [{"rfilename": name, "size": len(content)} for name, content in self.files.items()]
            info = {"id": HUB_ID, "sha": "1" * 40, "siblings": siblings, "tags": ["license:mit"], "private": False}
            self.answer(200, json.dumps(info).encode(), headers)

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@contextmanager
def serving(home: Path) -> Iterator[tuple[type[LocalHub], dict[str, str]]]:
    """A fresh hub, and the environment of a process that knows no other one and keeps its cache in `home`."""

    class Hub(LocalHub):
        files: ClassVar[dict[str, bytes]] = {}
        asked: ClassVar[list[str]] = []
        refusal: ClassVar[str] = ""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield Hub, {"HF_ENDPOINT": address, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
    finally:
        server.shutdown()
        server.server_close()

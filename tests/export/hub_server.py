"""A model hub of one token on this machine, as far as uploads need one: files end up in a folder."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

TOKEN, OWNER = "hf_of_this_test", "someone"


class Hub(ThreadingHTTPServer):
    """What was made and uploaded.

    Attributes:
        repositories: whether each is private, by `owner/name`.
        root: where committed files lie, as `owner/name/path`.
        broken: answer uploads of large files with an error.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.repositories: dict[str, bool] = {}
        self.root, self.blobs, self.broken = root, root / "blobs", False
        self.blobs.mkdir(parents=True)

    @property
    def address(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repository: str, lines: list[dict[str, Any]]) -> None:
        """Put files under their names; a large one must have been uploaded as it was announced."""
        for line in lines:
            value = line["value"]
            if line["key"] not in ("file", "lfsFile"):
                continue
            path = self.root / repository / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            small = line["key"] == "file"
            path.write_bytes(base64.b64decode(value["content"]) if small else (self.blobs / value["oid"]).read_bytes())
            assert small or sha256(path.read_bytes()).hexdigest() == value["oid"]


class Request(BaseHTTPRequestHandler):
    """One request of the hub's client."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Who asks, or what is known of a repository."""
        name = self.path.removeprefix("/api/models/").split("?")[0]
        if self.path == "/api/whoami-v2":
            self._answer({"name": OWNER, "type": "user", "orgs": []})
        elif name in self.server.repositories:
            self._answer({"id": name, "private": self.server.repositories[name]})
        else:
            self._answer(None, 404)

    def do_PUT(self) -> None:
        """One large file, at the address that the batch gave."""
        body = self._body()
        if self.server.broken:
            self._answer(None, 400)
        else:
            (self.server.blobs / self.path.removeprefix("/put/")).write_bytes(body)
            self._answer({})

    def do_POST(self) -> None:
        """A new repository, how files are to be sent, where large ones go, and the commit."""
        body, parts = self._body(), self.path.split("?")[0].strip("/").split("/")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or OWNER}/{asked['name']}"
            # Other versions of the client say `private` instead.
            self.server.repositories[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
            self._answer({"url": f"{self.server.address}/{name}", "name": name})
        elif "preupload" in parts:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".gguf")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": modes})
        elif parts[-1] == "batch":
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.server.address}/put/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif "commit" in parts:
            name = "/".join(parts[2:4])
            self.server.commit(name, [json.loads(line) for line in body.splitlines()])
            self._answer({"commitOid": "0" * 40, "commitUrl": f"{self.server.address}/{name}/commit/{'0' * 40}"})
        else:
            self._answer({})

    def log_message(self, *_: object) -> None:
        """Keep still."""

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def _answer(self, record: dict[str, Any] | None, status: int = 200) -> None:
        # Addresses of the batch carry their own permission, and the client sends no token there.
        if not self.path.startswith("/put/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 401
        elif record is None:
            status = max(status, 400)
        text = json.dumps(record or {}).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """A hub whose files lie under `root`."""
    hub = Hub(root)
    thread = Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()

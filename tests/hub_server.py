"""A small server with the Hugging Face Hub's API: descriptions of repositories and their files."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "hidden_act": "silu",
    "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128,
}  # fmt: skip


def write_repository(folder: Path, config: Any = CONFIG) -> Path:
    """A small repository that is accepted as a base, with a pickle beside its safe weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"w" * 5000)
    (folder / "pytorch_model.bin").write_bytes(b"p" * 9000)
    return folder


class HubServer(ThreadingHTTPServer):
    """Serves the two routes that a download uses: the description of a repository, and its files."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.overrides: dict[str, dict[str, Any]] = {}  # by repository: fields of its description
        self.token = ""  # allows access to private repositories
        self.redirect_to = ""  # another server, which has the files
        self.byte_delay_s = 0.0  # between two bytes of a response
        self.fetched: list[str] = []  # names of the files that were downloaded
        self.requests: list[tuple[str, str]] = []  # (path, token) of every request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.respond(body=True)

    def do_HEAD(self) -> None:
        self.respond(body=False)

    def respond(self, body: bool) -> None:
        path = unquote(self.path.split("?")[0]).lstrip("/")
        self.server.requests.append((path, self.headers.get("Authorization", "").removeprefix("Bearer ")))
        if path.startswith("api/models/"):
            return self.describe(path.removeprefix("api/models/"), body)
        name, _, rest = path.partition("/resolve/")
        folder = self.folder_of(name)
        if folder is None:
            return self.refuse("RepoNotFound")
        revision, _, file = rest.partition("/")
        if revision not in ("main", COMMIT):
            return self.refuse("RevisionNotFound")
        if not (folder / file).is_file():
            return self.refuse("EntryNotFound")
        if self.server.redirect_to:
            return self.send(b"", {"Location": f"{self.server.redirect_to}{self.path}"}, body, status=302)
        content = (folder / file).read_bytes()
        if body:
            self.server.fetched.append(file)
        return self.send(
            content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}, body
        )

    def describe(self, path: str, body: bool) -> None:
        name, kind, revision = next(
            path.partition(k) for k in ("/tree/", "/revision/", "\0") if k in path + "\0"
        )
        folder = self.folder_of(name)
        if folder is None:
            return self.refuse("RepoNotFound")
        if revision not in ("", "main", COMMIT):
            return self.refuse("RevisionNotFound")
        if kind == "/tree/":
            files = [p for p in folder.rglob("*") if p.is_file()]
            rows = [{"type": "file", "path": str(p.relative_to(folder)), "size": p.stat().st_size, "oid": "0"} for p in files]  # fmt: skip
            return self.send(json.dumps(rows).encode(), {"Content-Type": "application/json"}, body)
        siblings: list[dict[str, Any]] = [
            {"rfilename": str(p.relative_to(folder))} for p in folder.rglob("*") if p.is_file()
        ]
        if "blobs=true" in self.path:
            siblings = [file | {"size": (folder / file["rfilename"]).stat().st_size} for file in siblings]
        description = {
            "id": name,
            "modelId": name,
            "sha": COMMIT,
            "siblings": siblings,
            "private": False,
            "tags": [],
        } | self.server.overrides.get(name, {})
        return self.send(json.dumps(description).encode(), {"Content-Type": "application/json"}, body)

    def folder_of(self, name: str) -> Path | None:
        """None for an unknown repository, and for a private one without the token."""
        if (
            self.server.overrides.get(name, {}).get("private")
            and self.server.requests[-1][1] != self.server.token
        ):
            return None
        return self.server.repositories.get(name)

    def refuse(self, code: str) -> None:
        self.send(b"", {"X-Error-Code": code}, True, status=404)

    def send(self, content: bytes, headers: dict[str, str], body: bool, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        for at in range(len(content)) if self.server.byte_delay_s and body else ():
            self.wfile.write(content[at : at + 1])
            time.sleep(self.server.byte_delay_s)
        if body and not self.server.byte_delay_s:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def running(repositories: dict[str, Path]) -> Iterator[HubServer]:
    server = HubServer(repositories)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()

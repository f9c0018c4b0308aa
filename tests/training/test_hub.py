"""Base models over HTTP, from a small server that answers as the Hub does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.training.tiny import write_model
from training import hub
from training.events import Failure

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Speaks the two routes a download takes: what is in a repository, and its files."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        path = unquote(self.path.split("?")[0]).lstrip("/")
        if path.startswith("api/models/"):
            return self.describe(path.removeprefix("api/models/"), body)
        name, _, rest = path.partition("/resolve/")
        folder = self.server.repositories.get(name)
        if folder is None:
            return self.refuse("RepoNotFound")
        revision, _, file = rest.partition("/")
        if revision not in ("main", COMMIT):
            return self.refuse("RevisionNotFound")
        if not (folder / file).is_file():
            return self.refuse("EntryNotFound")
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
        folder = self.server.repositories.get(name)
        if folder is None:
            return self.refuse("RepoNotFound")
        if revision not in ("", "main", COMMIT):
            return self.refuse("RevisionNotFound")
        if kind == "/tree/":
            files = [p for p in folder.rglob("*") if p.is_file()]
            rows = [{"type": "file", "path": str(p.relative_to(folder)), "size": p.stat().st_size, "oid": "0"} for p in files]  # fmt: skip
            return self.send(json.dumps(rows).encode(), {"Content-Type": "application/json"}, body)
        siblings = [{"rfilename": str(p.relative_to(folder))} for p in folder.rglob("*") if p.is_file()]
        answer = {
            "id": name,
            "modelId": name,
            "sha": COMMIT,
            "siblings": siblings,
            "private": False,
            "tags": [],
        }
        return self.send(json.dumps(answer).encode(), {"Content-Type": "application/json"}, body)

    def refuse(self, code: str) -> None:
        self.send(b"", {"X-Error-Code": code}, True, status=404)

    def send(self, content: bytes, headers: dict[str, str], body: bool, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    plain = write_model(tmp_path_factory.mktemp("plain"))
    (plain / "pytorch_model.bin").write_bytes(b"a pickle")
    (plain / "onnx").mkdir()
    (plain / "onnx" / "model.safetensors").write_bytes(b"another")
    code = write_model(tmp_path_factory.mktemp("code"))
    config = json.loads((code / "config.json").read_text())
    (code / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}})
    )
    (code / "evil.py").write_text("raise SystemExit('run')")
    server = HubServer({"gpt2": plain, "someone/with-code": code})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def ask(server: HubServer, home: Path, name: str, revision: str | None = None, **environment: str):
    """`hub.locate` in a process of its own: the library reads HF_ENDPOINT when it is imported."""
    script = (
        "import json, sys\nfrom training import hub\nfrom training.events import Failure\n"
        "try:\n    print(json.dumps({'folder': str(hub.locate(*json.loads(sys.argv[1])))}))\n"
        "except Failure as f:\n    print(json.dumps({'reason': f.reason, 'message': f.message}))\n"
        "assert 'torch' not in sys.modules"
    )
    variables = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps([name, revision])],
        env=variables | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_model_is_fetched_once_without_what_could_be_run(server, tmp_path):
    server.fetched.clear()
    folder = Path(ask(server, tmp_path, "gpt2")["folder"])
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
    assert (folder / "model.safetensors").read_bytes() == (
        server.repositories["gpt2"] / "model.safetensors"
    ).read_bytes()
    before = list(server.fetched)
    assert ask(server, tmp_path, "gpt2", COMMIT)["folder"] == str(folder)
    assert ask(server, tmp_path, "gpt2", None, HF_HUB_OFFLINE="1")["folder"] == str(folder)
    assert server.fetched == before


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("someone/no-such-model", None, "has no model called"),
        ("gpt2", "no-such-branch", "no revision"),
        ("not a name!", None, "no name of a model"),
        ("someone/with-code", None, "never run"),
    ],
)
def test_what_cannot_be_fetched_is_said(server, tmp_path, name, revision, message):
    found = ask(server, tmp_path, name, revision)
    assert found["reason"] == "base_model"
    assert message in found["message"]
    assert not list(tmp_path.rglob("*.py"))


def test_an_unreachable_hub_is_said(server, tmp_path):
    found = ask(server, tmp_path, "gpt2", None, HF_ENDPOINT="http://127.0.0.1:9")
    assert found["reason"] == "base_model"
    assert "reached" in found["message"]


def test_a_folder_of_this_machine_is_taken_as_it_lies(tmp_path):
    folder = write_model(tmp_path / "own")
    assert hub.locate(str(folder)) == folder


def test_a_folder_without_safetensors_is_refused(tmp_path):
    folder = write_model(tmp_path / "own")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(Failure, match="no safetensors"):
        hub.locate(folder)

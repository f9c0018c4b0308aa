"""The web process and the workers of a checkout, with separate stores. Nothing of the product is imported: the processes
are started as docs/operations.md describes, and used over HTTP."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import redis

from tests import services
from tests.services import wait_until

ROOT = services.ROOT
PASSWORD = "made-up-golden-password-1"  # of users that exist only in these tests
QUICK = {"JOBS_HEARTBEAT_S": "1", "JOBS_RECONCILE_S": "1", "JOBS_BACKOFF_FIRST_S": "1"}


def python_of(checkout: Path) -> str:
    """The Python of the checkout's own virtual environment, if it has one."""
    own = checkout / ".venv/bin/python"
    return str(own) if own.exists() else sys.executable


class Stack:
    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        web, redis, dynamodb = (services.free_port() for _ in range(3))
        self.url = f"http://localhost:{web}"
        self.web_port, self.dynamodb_port, self.redis_port = web, dynamodb, redis
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        self.env = kept | {
            "VAR_DIR": str(folder / "var"),
            "WEB_PORT": str(web),
            "DYNAMODB_ENDPOINT": f"http://127.0.0.1:{dynamodb}",
            "DYNAMODB_SECRET": services.DYNAMODB_SECRET,
            # The first release has no DYNAMODB_SECRET and signs with these (two_versions.py).
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": services.DYNAMODB_SECRET,
            "REDIS_URL": f"redis://:{services.REDIS_PASSWORD}@127.0.0.1:{redis}/0",
            "PUBLIC_URL": self.url,
            "LLMTUNER_ENV": "test",
            "WEBHOOKS_ALLOW_PRIVATE": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **QUICK,
            **environment,
        }
        self.stores: list[services.Service] = []
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start_stores(self, checkout: Path = ROOT) -> None:
        self.stores.append(services.dynamodb(self.folder, self.dynamodb_port).start())
        self.stores.append(services.redis(self.folder, self.redis_port).start())
        self.manage("migrate", "--verbosity", "0", checkout=checkout)
        self.manage("create_tables", checkout=checkout)

    def manage(self, *arguments: str, checkout: Path = ROOT, **environment: str) -> str:
        command = [python_of(checkout), "manage.py", *arguments]
        completed = subprocess.run(
            command, cwd=checkout, env=self.env | environment, capture_output=True, text=True, check=False
        )
        assert completed.returncode == 0, completed.stderr
        return completed.stdout

    def add_staff(self, email: str) -> None:
        self.manage("createsuperuser", "--noinput", "--email", email, DJANGO_SUPERUSER_PASSWORD=PASSWORD)

    def start(self, name: str, *argv: str, checkout: Path = ROOT) -> None:
        log = (self.folder / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            [python_of(checkout), "-m", *argv],
            cwd=checkout,
            env=self.env,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            preexec_fn=services._die_with_parent,
        )

    def start_web(self, checkout: Path = ROOT) -> None:
        address = ["--host", "127.0.0.1", "--port", str(self.web_port), "--log-level", "warning"]
        self.start("web", "uvicorn", "llmtuner.asgi:application", *address, checkout=checkout)
        wait_until(lambda: is_up(f"{self.url}/healthz"), 120, self.log("web"))

    def start_worker(self, queue: str, checkout: Path = ROOT, name: str = "") -> None:
        pool = ["-P", "threads", "-c", "4"] if queue == "inference" else ["-P", "solo"]
        worker = [
            "celery",
            "-A",
            "llmtuner",
            "worker",
            "-Q",
            queue,
            "-n",
            f"{name or queue}@%h",
            "-l",
            "info",
        ]
        self.start(name or queue, *worker, *pool, checkout=checkout)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def stop_workers(self) -> None:
        self._end([name for name in self.processes if name != "web"])

    def stop(self) -> None:
        self._end([*self.processes])
        for store in self.stores:
            store.kill()

    def _end(self, names: list[str]) -> None:
        services.terminate([self.processes.pop(name) for name in names])


def is_up(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


# ---- users and programs --------------------------------------------------------------------------------------------


class Person:
    """A user's browser session, and an API client with the user's key."""

    def __init__(self, url: str, email: str, password: str = PASSWORD) -> None:
        self.url, self.email, self.password = url, email, password
        self.browser = httpx.Client(base_url=url, timeout=120)
        self.api = httpx.Client(base_url=f"{url}/v1/", timeout=120)

    def get(self, path: str) -> httpx.Response:
        return self.browser.get(path)

    def post(self, path: str, **data: Any) -> httpx.Response:
        """Submits a form as a page does, with the CSRF token and our origin."""
        response = self.browser.post(path, data=data, headers=self.headers())
        assert response.status_code < 400, (path, response.status_code, response.text[-3000:])
        return response

    def headers(self) -> dict[str, str]:
        if "csrf" not in self.browser.cookies:
            self.browser.get("/accounts/login/")
        return {"X-CSRFToken": self.browser.cookies["csrf"], "Origin": self.url}

    def sign_up(self) -> Person:
        """Without a mail server, signing up does not sign in, so that it does not reveal who has an account."""
        self.post("/accounts/signup/", email=self.email, password1=self.password)
        return self.sign_in()

    def sign_in(self) -> Person:
        self.post("/accounts/login/", login=self.email, password=self.password)
        return self._signed_in()

    def _signed_in(self) -> Person:
        assert self.get("/account/").status_code == 200, f"{self.email} could not sign in"
        return self

    def make_key(self) -> str:
        response = self.post("/account/keys/", name="all", days="", scopes=["read", "write", "inference"])
        match = re.search(r"sk-llmt-[a-z0-9]{12}-[\w-]{43}", response.text)
        assert match
        self.use_key(match[0])
        return match[0]

    def use_key(self, key: str) -> None:
        self.api.headers["Authorization"] = f"Bearer {key}"

    def call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        response = self.api.request(method, path, **options)
        assert response.status_code == 200, (path, response.status_code, response.text)
        return dict(response.json())

    def upload(self, name: str, content: bytes, **fields: str) -> str:
        data = {"purpose": "fine-tune", **fields}
        return str(self.call("POST", "files", files={"file": (name, content)}, data=data)["id"])

    def file(self, id: str) -> dict[str, Any]:
        return self.call("GET", f"files/{id}")

    def job(self, id: str) -> dict[str, Any]:
        return self.call("GET", f"fine_tuning/jobs/{id}")

    def checkpoints(self, id: str) -> list[dict[str, Any]]:
        return list(self.call("GET", f"fine_tuning/jobs/{id}/checkpoints")["data"])

    def wait_for_file(self, id: str) -> dict[str, Any]:
        return dict(wait_until(lambda: (f := self.file(id))["status"] != "uploaded" and f, 300, id))

    def wait_for_job(self, id: str, *statuses: str) -> dict[str, Any]:
        """Waits until the job has one of these `llmtuner` statuses."""
        ends = {"succeeded", "failed", "cancelled"}

        def job_with_status() -> dict[str, Any] | None:
            job = self.job(id)
            status = job["llmtuner"]["status"]
            assert status in statuses or status not in ends, job
            return job if status in statuses else None

        return dict(wait_until(job_with_status, 600, id))

    def wait_for_model(self, id: str) -> None:
        """Waits for the model, which is created after the job's end."""
        wait_until(lambda: self.api.get(f"models/{id}").status_code == 200, 300, id)


class Receiver(ThreadingHTTPServer):
    """Receives webhooks and keeps them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receive)
        self.received: list[tuple[dict[str, str], str]] = []  # headers and body

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"


class _Receive(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.received.append(({name.lower(): value for name, value in self.headers.items()}, body))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


# ---- the stores, read directly --------------------------------------------------------------------------------------


def dynamodb_rows(
    port: int, region: str = "us-east-1", secret: str = services.DYNAMODB_SECRET
) -> dict[str, dict[str, Any]]:
    """Each table's description and rows, directly from DynamoDB."""
    import boto3

    client = boto3.client(
        "dynamodb",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name=region,
        aws_access_key_id="local",
        aws_secret_access_key=secret,
    )
    tables = {}
    for name in client.list_tables()["TableNames"]:
        rows = [
            row for page in client.get_paginator("scan").paginate(TableName=name) for row in page["Items"]
        ]
        tables[name] = {"table": client.describe_table(TableName=name)["Table"], "rows": rows}
    return tables


class RedisMonitor:
    """All commands that Redis receives, recorded with MONITOR."""

    def __init__(self, port: int) -> None:
        options: dict[str, Any] = {
            "port": port,
            "password": services.REDIS_PASSWORD,
            "decode_responses": True,
        }
        self.client = redis.Redis(**options)
        self.commands: list[str] = []
        self._connection = redis.Redis(**options, socket_timeout=None)
        threading.Thread(target=self._listen, daemon=True).start()
        wait_until(self._is_recording, 20, "Redis does not respond")

    def _is_recording(self) -> bool:
        self.client.ping()
        return any("PING" in command for command in self.commands)

    def _listen(self) -> None:
        with suppress(redis.ConnectionError), self._connection.monitor() as monitor:  # Redis is stopped
            for command in monitor.listen():
                self.commands.append(command["command"])

    def waiting(self, queue: str) -> list[dict[str, Any]]:
        """Celery's messages that wait in a queue."""
        return [json.loads(text) for text in self.client.lrange(queue, 0, -1)]  # type: ignore[union-attr]

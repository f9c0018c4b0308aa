"""The real services that tests run against: DynamoDB (dynalite), Redis, S3 (rclone), an OpenID Connect provider. Each is a
child process on its own port and is killed when the test process dies."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REDIS_PASSWORD = "test-redis-password"
DYNAMODB_SECRET = "test-dynamodb-secret"
PR_SET_PDEATHSIG = 1


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _die_with_parent() -> None:
    """For `preexec_fn`: has the kernel kill this process when its parent dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def wait_until(condition: Callable[[], Any], seconds: float, message: object = "") -> Any:
    """The first true result of `condition`. Fails after `seconds` with the message, or with what the message returns."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, message() if callable(message) else message
        time.sleep(0.05)
    return result


def terminate(processes: Iterable[subprocess.Popen[bytes]], timeout: float = 40) -> None:
    """Stops all of them at the same time: SIGTERM, and SIGKILL for those that are still running after `timeout` seconds."""
    processes = list(processes)
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass
class Service:
    """A process that can be killed and started again on the same port and data."""

    name: str
    port: int
    argv: list[str]
    is_up: Callable[[], bool]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self, timeout: float = 120) -> Service:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv,
                env=os.environ | self.environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                preexec_fn=_die_with_parent,
            )
        deadline = time.monotonic() + timeout
        while not self.is_up():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.05)
        return self

    def kill(self, sig: int = signal.SIGKILL) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(sig)
            self.process.wait(60)


def _responds_to_http(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20)
    except urllib.error.HTTPError:
        return True  # any response will do: S3 refuses an unsigned request with 403
    except OSError:
        return False
    return True


def _responds_to_redis(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as s:
            s.sendall(f"AUTH {REDIS_PASSWORD}\r\nPING\r\n".encode())
            return b"+OK" in s.recv(64)
    except OSError:
        return False


def dynamodb(folder: Path, port: int | None = None, *, on_disk: bool = False) -> Service:
    port = port or free_port()
    guard = str(ROOT / "llmtuner/dynalite_guard.cjs")
    argv = [str(ROOT / ".tools/node"), "--require", guard, str(ROOT / ".tools/node_modules/dynalite/cli.js")]
    argv += ["--host", "127.0.0.1", "--port", str(port), "--createTableMs", "0", "--deleteTableMs", "0"]
    if on_disk:
        argv += ["--path", str(folder / "dynamodb")]
    environment = {"DYNAMODB_SECRET": DYNAMODB_SECRET}
    return Service(
        "dynamodb", port, argv, lambda: _responds_to_http(port), folder / "dynamodb.log", environment
    )


def redis(folder: Path, port: int | None = None) -> Service:
    port = port or free_port()
    argv = [
        str(ROOT / ".tools/redis-server"),
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--dir",
        str(folder),
    ]
    argv += ["--save", "", "--appendonly", "yes", "--requirepass", REDIS_PASSWORD]
    return Service("redis", port, argv, lambda: _responds_to_redis(port), folder / "redis.log")


def s3(folder: Path, key: str, secret: str, port: int | None = None) -> Service:
    """rclone's S3 server, which verifies signatures. Buckets are the folders under `folder/s3`."""
    port = port or free_port()
    data = folder / "s3"
    data.mkdir(parents=True, exist_ok=True)
    argv = [str(ROOT / ".venv/bin/rclone"), "serve", "s3", str(data), "--addr", f"127.0.0.1:{port}"]
    argv += ["--auth-key", f"{key},{secret}", "--vfs-cache-mode", "off", "--config", os.devnull]
    return Service("s3", port, argv, lambda: _responds_to_http(port), folder / "s3.log")


def openid_provider(folder: Path) -> Service:
    """Stands in for Google. Users are added with PUT /users/SUB."""
    port = free_port()
    argv = [sys.executable, "-m", "oidc_provider_mock", "--port", str(port)]
    return Service(
        "openid-provider", port, argv, lambda: _responds_to_http(port), folder / "openid-provider.log"
    )

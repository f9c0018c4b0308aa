"""A studio on a shared machine: a second bin/up, other accounts, damaged data, a full disk.

All tests share one studio. Its folder is as an earlier version could have left it: readable by everybody, and with a Redis
file that is damaged in the middle. Two bin/up were started in it at the same time.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import redis as redis_client
from botocore.exceptions import ClientError

from llmtuner.processes import QUEUES
from tests import services
from tests.journeys.local_stack import LocalStack, free_ports

pytestmark = pytest.mark.slow
NOBODY = 65534


def damage(folder: Path) -> None:
    """A real append-only file, overwritten in the middle."""
    folder.mkdir(parents=True)
    server = services.redis(folder).start()
    with redis_client.Redis(port=server.port, password=services.REDIS_PASSWORD) as client:
        for number in range(200):
            client.set(f"key-{number}", "value" * 20)
    server.kill(signal.SIGTERM)
    path = max(folder.rglob("*.aof"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 300] = b"\xff" * 300
    path.write_bytes(data)


def command_of(stack: LocalStack, **environment: str) -> dict[str, Any]:
    return {
        "args": [sys.executable, "-m", "llmtuner.local_stack", "--no-sample"],
        "cwd": services.ROOT,
        "env": stack.env | environment,
        "umask": 0o022,
    }


class SharedStack(LocalStack):
    refused_output: str  # of the second bin/up

    @property
    def var(self) -> Path:
        return self.folder / "var"

    def pids(self) -> dict[int, str]:
        """bin/up and all its descendants, with their command lines. Not found by the folder in their environment, because
        Redis overwrites that with its process title."""
        assert self.process
        parents, commands = {}, {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                commands[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
        descendants, generation = set(), {self.process.pid}
        while generation:
            descendants |= generation
            generation = {pid for pid, parent in parents.items() if parent in generation}
        return {pid: commands[pid] for pid in descendants if pid in commands}

    def status(self) -> int:
        url = f"http://127.0.0.1:{self.env['WEB_PORT']}/readyz"
        return int(urllib.request.urlopen(url, timeout=10).status)


@pytest.fixture(scope="module")
def local_stack() -> Iterator[SharedStack]:
    folder = Path(tempfile.mkdtemp(prefix="llmtuner-alone-"))
    folder.chmod(0o755)  # everybody may reach var/
    stack = SharedStack(folder)
    stack.var.mkdir(mode=0o755)
    stack.var.chmod(0o755)
    damage(stack.var / "redis")
    started = []
    for number, ports in enumerate((stack.env, stack.env | free_ports())):
        log = (folder / f"up-{number}.log").open("wb")
        command = command_of(stack, **ports)
        process = subprocess.Popen(**command, stdout=log, stderr=log, start_new_session=True)
        started.append((process, Path(log.name), ports))
        log.close()
    try:
        deadline = time.monotonic() + 300
        while not any("Serving" in path.read_text() for _, path, _ in started) or all(
            process.poll() is None for process, _, _ in started
        ):
            logs = "\n".join(path.read_text() for _, path, _ in started)
            assert any(process.poll() is None for process, _, _ in started), logs
            assert time.monotonic() < deadline, logs
            time.sleep(0.2)
        for process, path, ports in started:
            if process.poll() is None:
                stack.process, stack.env = process, ports
                (folder / "up.log").symlink_to(path)
            else:
                assert process.returncode == 1
                stack.refused_output = path.read_text()
        yield stack
    finally:
        for process, _, _ in started:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(90)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def as_nobody(work: Callable[[], Any]) -> Any:
    """What `work` returns in a child process of another account. Without root it runs as our own account."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            result: Any = work()
        except BaseException as e:  # the parent gets any error
            result = f"{type(e).__name__}: {e}"
        os.write(write, json.dumps(result).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        result = json.loads(pipe.read())
    os.waitpid(pid, 0)
    return result


def test_of_two_started_at_once_one_runs_and_the_other_is_refused(local_stack: SharedStack):
    assert local_stack.process
    assert (
        f"Another bin/up is already running in {local_stack.var}: process {local_stack.process.pid}"
        in local_stack.refused_output
    )
    assert "Traceback" not in local_stack.refused_output
    assert local_stack.status() == 200


@pytest.mark.parametrize("ports", ["the same ports", "other ports"])
def test_a_second_one_is_refused_and_the_first_keeps_running(local_stack: SharedStack, ports: str):
    assert local_stack.process
    lasting = (
        "llmtuner",
        "redis-server",
        "dynalite",
    )  # other processes, such as trainers, may end at any time
    before, written = local_stack.pids(), (local_stack.var / "supervisord.conf").read_bytes()
    second = subprocess.run(
        **command_of(local_stack, **(free_ports() if ports == "other ports" else {})),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert second.returncode == 1
    assert (
        f"process {local_stack.process.pid} at http://localhost:{local_stack.env['WEB_PORT']}"
        in second.stderr
    )
    assert "Traceback" not in second.stderr
    after = local_stack.pids()
    assert {pid for pid, command in before.items() if any(word in command for word in lasting)} <= set(after)
    assert (local_stack.var / "supervisord.conf").read_bytes() == written
    assert local_stack.status() == 200


def test_other_accounts_have_no_permissions_in_the_folder(local_stack: SharedStack):
    files = [
        path
        for path in (local_stack.var, *local_stack.var.rglob("*"))
        if path.exists() and not path.is_symlink()
    ]
    damaged = {
        path for path in files if any("redis-damaged" in part for part in path.parts)
    }  # of an earlier version
    accessible = {
        str(path): oct(path.stat().st_mode)
        for path in files
        if path not in damaged and path.stat().st_mode & 0o077
    }
    assert (local_stack.var / "db.sqlite3") in files
    assert accessible == {}


def test_every_process_creates_private_files(local_stack: SharedStack):
    masks = {}
    for pid, command in local_stack.pids().items():
        with contextlib.suppress(OSError):  # it ended in the meantime
            status = Path(f"/proc/{pid}/status").read_text()
            masks[command] = next(
                (line.split()[1] for line in status.splitlines() if line.startswith("Umask:")), "0077"
            )
    for part in ("redis-server", "dynalite", "llmtuner web", *(f"worker {queue}" for queue in QUEUES)):
        assert any(part in command for command in masks), masks
    assert set(masks.values()) == {"0077"}, masks


def read_hex(path: Path) -> str:
    return path.read_bytes().hex()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another account")
def test_another_account_can_read_nothing(local_stack: SharedStack):
    assert as_nobody(lambda: os.listdir(local_stack.folder))  # it can reach this far
    for name in ("db.sqlite3", "secret-key", "redis-password", "dynamodb-secret", "logs/web.log"):
        assert (local_stack.var / name).exists()
        result = as_nobody(partial(read_hex, local_stack.var / name))
        assert result.startswith("PermissionError"), result
    assert as_nobody(lambda: os.listdir(local_stack.var)).startswith("PermissionError")


def test_the_embedded_dynamodb_refuses_requests_without_its_secret(local_stack: SharedStack):
    url = f"http://127.0.0.1:{local_stack.env['DYNAMODB_PORT']}/"
    scope = "local/20260101/us-east-1/dynamodb/aws4_request"
    forged = f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host;x-amz-date, Signature={'0' * 64}"
    headers = {
        "Content-Type": "application/x-amz-json-1.0",
        "X-Amz-Target": "DynamoDB_20120810.ListTables",
        "X-Amz-Date": "20260101T000000Z",
    }

    def list_tables(**more: str) -> str:
        request = urllib.request.Request(url, b"{}", headers | more)
        try:
            return str(urllib.request.urlopen(request, timeout=20).read())
        except urllib.error.HTTPError as e:
            return json.loads(e.read())["__type"].partition("#")[2]

    assert as_nobody(list_tables) == "MissingAuthenticationTokenException"
    assert as_nobody(lambda: list_tables(Authorization=forged)) == "InvalidSignatureException"
    assert (
        as_nobody(lambda: list_tables(Authorization="AWS4-HMAC-SHA256 nonsense"))
        == "InvalidSignatureException"
    )


@pytest.mark.parametrize("has_secret", [True, False])
def test_an_ordinary_client_needs_the_secret(local_stack: SharedStack, has_secret: bool):
    secret = (local_stack.var / "dynamodb-secret").read_text().strip() if has_secret else "local"
    client = botocore.session.Session().create_client(
        "dynamodb",
        "us-east-1",
        endpoint_url=f"http://127.0.0.1:{local_stack.env['DYNAMODB_PORT']}",
        aws_access_key_id="local",
        aws_secret_access_key=secret,
    )
    if has_secret:
        assert "llmtuner-Job" in client.list_tables()["TableNames"]
    else:
        with pytest.raises(ClientError, match="InvalidSignatureException"):
            client.list_tables()


def test_a_damaged_redis_file_is_set_aside(local_stack: SharedStack):
    (aside,) = local_stack.var.glob("redis-damaged-*")
    assert list(aside.rglob("*.aof"))
    log = (local_stack.folder / "up.log").read_text()
    assert "Redis could not read its data, so it started empty" in log
    assert str(aside) in log
    password = (local_stack.var / "redis-password").read_text().strip()
    with redis_client.Redis(port=int(local_stack.env["REDIS_PORT"]), password=password) as client:
        assert client.get("key-0") is None


def test_supervisord_keeps_running_when_it_cannot_write(local_stack: SharedStack):
    """As on a full disk: supervisord can write neither to its log nor to standard error."""
    supervisord = int((local_stack.var / "supervisord.pid").read_text())

    def worker() -> int:
        return next(
            (pid for pid, command in local_stack.pids().items() if "llmtuner worker checks" in command),
            0,
        )

    def kill_and_await() -> int:
        old = worker()
        assert old  # os.kill(0) would kill this process group
        os.kill(old, signal.SIGKILL)
        deadline = time.monotonic() + 120
        while (new := worker()) in {0, old}:
            assert Path(f"/proc/{supervisord}").exists(), "supervisord ended"
            assert time.monotonic() < deadline
            time.sleep(0.2)
        return new

    _, hard = resource.prlimit(supervisord, resource.RLIMIT_FSIZE)
    resource.prlimit(supervisord, resource.RLIMIT_FSIZE, (0, hard))
    try:
        kill_and_await()
    finally:
        resource.prlimit(supervisord, resource.RLIMIT_FSIZE, (hard, hard))
    last = kill_and_await()
    deadline = time.monotonic() + 60
    while f"'checks' with pid {last}" not in (local_stack.var / "logs/supervisord.log").read_text():
        assert time.monotonic() < deadline, "supervisord does not write to its log again"
        time.sleep(0.2)
    assert local_stack.process
    assert local_stack.process.poll() is None
    assert local_stack.status() == 200


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path):
    """Root can write everywhere, so as root this drops that capability."""
    stack = LocalStack(tmp_path)
    (tmp_path / "var").mkdir()
    (tmp_path / "var").chmod(0o555)
    command = command_of(stack)
    if os.getuid() == 0:
        without = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", "--"]
        command["args"] = [*without, *command["args"]]
    try:
        result = subprocess.run(**command, capture_output=True, text=True, timeout=120)
    finally:
        (tmp_path / "var").chmod(0o755)
    assert result.returncode == 1
    assert f"Cannot write to {tmp_path / 'var'} (Permission denied)" in result.stderr
    assert "VAR_DIR=" in result.stderr
    assert "Traceback" not in result.stderr

"""A started studio among others: a second bin/up, other accounts of the machine, damaged data, a full disk.

One studio serves all of these. Its folder is as an earlier version could leave it: open to everybody, and with Redis's
file damaged in the middle. Two bin/up were started in it at the same moment.
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
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import redis as redis_client
from botocore.exceptions import ClientError

from llmtuner.processes import QUEUES
from tests import services
from tests.journeys.test_studio import House

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


def studio_command(house: House, **environment: str) -> dict[str, Any]:
    return {
        "args": [sys.executable, "-m", "llmtuner.local_stack", "--no-sample"],
        "cwd": services.ROOT,
        "env": house.env | environment,
        "umask": 0o022,
    }


def other_ports() -> dict[str, str]:
    return {name: str(services.free_port()) for name in ("WEB_PORT", "DYNAMODB_PORT", "REDIS_PORT")}


class Started(House):
    refused: str  # what the one that was second said

    @property
    def var(self) -> Path:
        return self.folder / "var"

    def pids(self) -> dict[int, str]:
        """bin/up and every process below it, with its command line. Not by the folder in their environment: Redis writes
        its title over that."""
        assert self.process
        parents, commands = {}, {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                commands[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
        found, rest = set(), {self.process.pid}
        while rest:
            found |= rest
            rest = {pid for pid, parent in parents.items() if parent in rest}
        return {pid: commands[pid] for pid in found if pid in commands}

    def status(self) -> int:
        url = f"http://127.0.0.1:{self.env['WEB_PORT']}/readyz"
        return int(urllib.request.urlopen(url, timeout=10).status)


@pytest.fixture(scope="module")
def house() -> Iterator[Started]:
    folder = Path(tempfile.mkdtemp(prefix="llmtuner-alone-"))
    folder.chmod(0o755)  # everybody may come as far as var/
    house = Started(folder)
    house.var.mkdir(mode=0o755)
    house.var.chmod(0o755)
    damage(house.var / "redis")
    rivals = []
    for number, ports in enumerate((house.env, house.env | other_ports())):
        log = (folder / f"up-{number}.log").open("wb")
        command = studio_command(house, **ports)
        process = subprocess.Popen(**command, stdout=log, stderr=log, start_new_session=True)
        rivals.append((process, Path(log.name), ports))
        log.close()
    try:
        deadline = time.monotonic() + 300
        while not any("Serving" in path.read_text() for _, path, _ in rivals) or all(
            process.poll() is None for process, _, _ in rivals
        ):
            said = "\n".join(path.read_text() for _, path, _ in rivals)
            assert any(process.poll() is None for process, _, _ in rivals), said
            assert time.monotonic() < deadline, said
            time.sleep(0.2)
        for process, path, ports in rivals:
            if process.poll() is None:
                house.process, house.env = process, ports
                (folder / "up.log").symlink_to(path)
            else:
                assert process.returncode == 1
                house.refused = path.read_text()
        yield house
    finally:
        for process, _, _ in rivals:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(90)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def as_nobody(work: Callable[[], Any]) -> Any:
    """What `work` returns in a process of another account; in one of our own, where we may not change it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            answer: Any = work()
        except BaseException as e:  # told to the parent, whatever it is
            answer = f"{type(e).__name__}: {e}"
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = json.loads(pipe.read())
    os.waitpid(pid, 0)
    return answer


def test_of_two_started_at_once_one_runs_and_the_other_is_refused(house: Started):
    assert house.process
    assert f"Another bin/up is already running in {house.var}: process {house.process.pid}" in house.refused
    assert "Traceback" not in house.refused
    assert house.status() == 200


@pytest.mark.parametrize("ports", ["the same ports", "other ports"])
def test_a_second_one_is_refused_and_the_first_keeps_running(house: Started, ports: str):
    assert house.process
    lasting = ("llmtuner", "redis-server", "dynalite")  # a worker's trainers come and go
    before, written = house.pids(), (house.var / "supervisord.conf").read_bytes()
    second = subprocess.run(
        **studio_command(house, **(other_ports() if ports == "other ports" else {})),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert second.returncode == 1
    assert f"process {house.process.pid} at http://localhost:{house.env['WEB_PORT']}" in second.stderr
    assert "Traceback" not in second.stderr
    after = house.pids()
    assert {pid for pid, command in before.items() if any(word in command for word in lasting)} <= set(after)
    assert (house.var / "supervisord.conf").read_bytes() == written
    assert house.status() == 200


def test_other_accounts_have_no_permissions_in_the_folder(house: Started):
    files = [path for path in (house.var, *house.var.rglob("*")) if path.exists() and not path.is_symlink()]
    damaged = {
        path for path in files if any("redis-damaged" in part for part in path.parts)
    }  # an older version's
    found = {
        str(path): oct(path.stat().st_mode)
        for path in files
        if path not in damaged and path.stat().st_mode & 0o077
    }
    assert (house.var / "db.sqlite3") in files
    assert found == {}


def test_every_process_creates_private_files(house: Started):
    masks = {}
    for pid, command in house.pids().items():
        with contextlib.suppress(OSError):  # one that ended just now
            status = Path(f"/proc/{pid}/status").read_text()
            masks[command] = next(
                (line.split()[1] for line in status.splitlines() if line.startswith("Umask:")), "0077"
            )
    for part in ("redis-server", "dynalite", "llmtuner web", *(f"worker {queue}" for queue in QUEUES)):
        assert any(part in command for command in masks), masks
    assert set(masks.values()) == {"0077"}, masks


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another account")
def test_another_account_can_read_nothing(house: Started):
    assert as_nobody(lambda: os.listdir(house.folder))  # so far it may come
    for name in ("db.sqlite3", "secret-key", "redis-password", "dynamodb-secret", "logs/web.log"):
        assert (house.var / name).exists()
        answer = as_nobody(lambda name=name: (house.var / name).read_bytes().hex())
        assert answer.startswith("PermissionError"), answer
    assert as_nobody(lambda: os.listdir(house.var)).startswith("PermissionError")


def test_the_embedded_dynamodb_refuses_requests_without_its_secret(house: Started):
    url = f"http://127.0.0.1:{house.env['DYNAMODB_PORT']}/"
    scope = "local/20260101/us-east-1/dynamodb/aws4_request"
    forged = f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host;x-amz-date, Signature={'0' * 64}"
    headers = {
        "Content-Type": "application/x-amz-json-1.0",
        "X-Amz-Target": "DynamoDB_20120810.ListTables",
        "X-Amz-Date": "20260101T000000Z",
    }

    def ask(**more: str) -> str:
        request = urllib.request.Request(url, b"{}", headers | more)
        try:
            return str(urllib.request.urlopen(request, timeout=20).read())
        except urllib.error.HTTPError as e:
            return json.loads(e.read())["__type"].partition("#")[2]

    assert as_nobody(ask) == "MissingAuthenticationTokenException"
    assert as_nobody(lambda: ask(Authorization=forged)) == "InvalidSignatureException"
    assert as_nobody(lambda: ask(Authorization="AWS4-HMAC-SHA256 nonsense")) == "InvalidSignatureException"


@pytest.mark.parametrize("knows", [True, False])
def test_an_ordinary_client_needs_the_secret(house: Started, knows: bool):
    secret = (house.var / "dynamodb-secret").read_text().strip() if knows else "local"
    client = botocore.session.Session().create_client(
        "dynamodb",
        "us-east-1",
        endpoint_url=f"http://127.0.0.1:{house.env['DYNAMODB_PORT']}",
        aws_access_key_id="local",
        aws_secret_access_key=secret,
    )
    if knows:
        assert "llmtuner-Job" in client.list_tables()["TableNames"]
    else:
        with pytest.raises(ClientError, match="InvalidSignatureException"):
            client.list_tables()


def test_a_damaged_redis_file_is_set_aside(house: Started):
    (aside,) = house.var.glob("redis-damaged-*")
    assert list(aside.rglob("*.aof"))
    said = (house.folder / "up.log").read_text()
    assert "Redis could not read its data, so it started empty" in said
    assert str(aside) in said
    password = (house.var / "redis-password").read_text().strip()
    with redis_client.Redis(port=int(house.env["REDIS_PORT"]), password=password) as client:
        assert client.get("key-0") is None


def test_supervisord_keeps_running_when_it_cannot_write(house: Started):
    """No file may grow any more for supervisord, neither its log nor its standard error: as on a full disk."""
    supervisord = int((house.var / "supervisord.pid").read_text())

    def worker() -> int:
        return next(
            (pid for pid, command in house.pids().items() if "llmtuner worker checks" in command),
            0,
        )

    def kill_and_await() -> int:
        old = worker()
        assert old  # a kill of 0 would be one of ourselves
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
    while f"'checks' with pid {last}" not in (house.var / "logs/supervisord.log").read_text():
        assert time.monotonic() < deadline, "the log does not go on"
        time.sleep(0.2)
    assert house.process
    assert house.process.poll() is None
    assert house.status() == 200


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path):
    """Root may write everywhere, so there this runs as a root without that right."""
    house = House(tmp_path)
    (tmp_path / "var").mkdir()
    (tmp_path / "var").chmod(0o555)
    command = studio_command(house)
    if os.getuid() == 0:
        without = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", "--"]
        command["args"] = [*without, *command["args"]]
    try:
        done = subprocess.run(**command, capture_output=True, text=True, timeout=120)
    finally:
        (tmp_path / "var").chmod(0o755)
    assert done.returncode == 1
    assert f"Cannot write to {tmp_path / 'var'} (Permission denied)" in done.stderr
    assert "VAR_DIR=" in done.stderr
    assert "Traceback" not in done.stderr

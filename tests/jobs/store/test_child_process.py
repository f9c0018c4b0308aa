"""Child processes that load torch or parse untrusted files: limited, without credentials, killed with their parent."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jobs.store import child_process
from jobs.store.child_process import CUT, Limits, LineReader
from jobs.store.redact import our_secrets
from tests.services import ROOT, wait_until


@pytest.fixture
def child():
    """A model server that waits for requests."""
    child = child_process.start("serve", limits=Limits(memory_bytes=64 << 30, file_bytes=1 << 30, cpu_s=900))
    yield child
    child.kill()


def lines_of(data, limit=20):
    read, write = os.pipe()
    with os.fdopen(read, "rb") as pipe:
        reader = LineReader(pipe, limit)

        def write_all():
            with os.fdopen(write, "wb") as out:
                out.write(data)  # blocks while the pipe is full

        threading.Thread(target=write_all).start()
        lines = []
        while not reader.ended:
            lines += reader.lines()
    return lines


def test_its_environment_contains_no_secrets_and_no_store_addresses(child):
    environment = Path(f"/proc/{child.pid}/environ").read_bytes().decode()
    for secret in our_secrets():
        assert secret not in environment
    for name in ("REDIS_URL", "DATABASE_URL", "DYNAMODB", "AWS_", "SECRET", "HF_TOKEN", "DJANGO"):
        assert name not in environment


def test_its_resource_limits_are_set(child):
    limits = {r: resource.prlimit(child.pid, r)[1] for r in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE)}
    assert limits == {resource.RLIMIT_AS: 64 << 30, resource.RLIMIT_FSIZE: 1 << 30}
    assert resource.prlimit(child.pid, resource.RLIMIT_CORE) == (0, 0)
    assert Path(f"/proc/{child.pid}/oom_score_adj").read_text().strip() == "500"


def test_it_has_no_network(child):
    if not child_process.no_network_prefix():
        pytest.skip("this system does not allow network namespaces")
    wait_until(
        lambda: os.readlink(f"/proc/{child.pid}/ns/net") != os.readlink("/proc/self/ns/net"), seconds=120
    )


def test_it_does_not_receive_ctrl_c_of_its_parent(child):
    assert os.getpgid(child.pid) == child.pid


def test_sending_a_heartbeat_never_blocks(child):
    for _ in range(10_000):  # far more than the pipe holds, and nobody reads it
        child.heartbeat()


def test_it_is_killed_with_its_parent():
    program = (
        "import django, sys, time; django.setup(); from jobs.store import child_process;"
        "child = child_process.start('serve'); print(child.pid, flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings"}
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=subprocess.PIPE
    )
    assert parent.stdout
    pid = int(parent.stdout.readline())
    # By then the child has asked the kernel for the signal.
    wait_until(lambda: _runs_the_trainer(pid), seconds=60)
    os.kill(pid, signal.SIGSTOP)  # so that only the kernel's signal can end it
    parent.kill()
    parent.wait()
    wait_until(lambda: _has_ended(pid), seconds=120)


def _has_ended(pid: int) -> bool:
    """Also true for a process that nobody has waited for yet."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def _runs_the_trainer(pid: int) -> bool:
    program, *arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return b"python" in program and arguments[:2] == [b"-m", b"training"]


def test_lines_are_read_completely():
    assert lines_of(b"one\ntwo\n\nthree") == ["one", "two", "three"]


def test_a_line_over_the_limit_is_cut_and_the_next_is_complete():
    assert lines_of(b"x" * 500_000 + b"\nnext\n") == ["x" * 20 + CUT, "next"]


def test_invalid_utf_8_is_replaced():
    assert lines_of(b"\xff\xfe ok\n") == ["\ufffd\ufffd ok"]


def test_reading_never_blocks():
    read, write = os.pipe()
    with os.fdopen(read, "rb") as pipe:
        reader = LineReader(pipe)
        os.write(write, b"half a li")
        assert reader.lines() == []
        assert not reader.ended
    os.close(write)

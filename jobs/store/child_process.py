"""Child processes that may own torch or parse people's files: limited, without credentials, dead with their parent.

A child dies with us in three ways: the kernel kills it when the thread that started it ends (`setpriv --pdeathsig`, so
start children from the main thread, or from one that lives as long as the process), its standard input ends, and
stopping it is our last act. Limits are set from outside with prlimit, so no code of ours runs between fork and exec
(which would be unsafe beside other threads).
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from django.conf import settings

from training.plan.events import MAX_LINE_BYTES

# What a child may know of our environment: nothing that opens a store, a mailbox or the Hub.
ENVIRONMENT = (
    "PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES",
)  # fmt: skip
CUT = "… (cut)"


@dataclass(frozen=True)
class Limits:
    """0 = none."""

    memory_bytes: int = (
        0  # address space; leave at 0 beside a GPU, whose driver reserves far more than it uses
    )
    file_bytes: int = 0
    cpu_s: int = 0
    open_files: int = 4096


class LineReader:
    """Whole lines from a pipe, without ever waiting. A line longer than the cap is cut and marked, never kept."""

    def __init__(self, pipe: IO[bytes], cap: int = MAX_LINE_BYTES) -> None:
        self.fd = pipe.fileno()
        self.cap = cap
        self.ended = False
        self._rest = b""
        self._skipping = False  # the rest of a line that was cut
        os.set_blocking(self.fd, False)

    def lines(self, most: int = 1 << 18) -> list[str]:
        """What has come, at most about `most` bytes of it. Sets `ended` at the end of the pipe."""
        found: list[str] = []
        while most > 0 and not self.ended:
            try:
                data = os.read(self.fd, 1 << 16)
            except BlockingIOError:
                break
            most -= len(data)
            self.ended = not data
            *whole, self._rest = (self._rest + data).split(b"\n")
            for line in whole:
                self._take(line, found)
            if len(self._rest) > self.cap:
                self._take(self._rest, found)
                self._rest, self._skipping = b"", True
        if self.ended and self._rest:
            self._take(self._rest, found)
            self._rest = b""
        return found

    def _take(self, line: bytes, found: list[str]) -> None:
        if self._skipping:
            self._skipping = False
        elif len(line) > self.cap:
            found.append(line[: self.cap].decode("utf-8", "replace") + CUT)
        elif line.strip():
            found.append(line.decode("utf-8", "replace"))


@dataclass
class Child:
    process: subprocess.Popen[bytes]
    out: LineReader
    err: LineReader

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def send(self, message: dict[str, Any]) -> bool:
        """One line on its standard input; False when it no longer listens."""
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except (OSError, ValueError):
            return False
        return True

    def beat(self) -> None:
        """Tells it that we live. Never waits, also when it doesn't read."""
        assert self.process.stdin
        with contextlib.suppress(OSError, ValueError):
            fd = self.process.stdin.fileno()
            os.set_blocking(fd, False)
            os.write(fd, b'{"lease": "ok"}\n')

    def signal(self, number: int) -> None:
        """To the child alone: it passes on what its own children need."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def end(self) -> None:
        """The child and all that it started, at once. Returns when it is gone; what it said can still be read."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def kill(self) -> None:
        self.end()
        self.close()

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()


def environment(home: Path) -> dict[str, str]:
    """The allowed names only, offline, with a home of its own."""
    kept = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    kept |= {
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return kept


@lru_cache(maxsize=1)
def no_network_prefix() -> tuple[str, ...]:
    """Words before a command that leave it in a network of its own, with nobody else in it: what needs no network gets
    none. Nothing, where the system doesn't allow that (some containers)."""
    for words in (("unshare", "--net"), ("unshare", "--user", "--map-current-user", "--net")):
        if shutil.which("unshare"):
            tried = subprocess.run([*words, "true"], capture_output=True, timeout=10)
            if tried.returncode == 0:
                return (*words, "--")
    return ()


def start(*arguments: str, limits: Limits | None = None) -> Child:
    """`python -m training ARGUMENTS…` as a child with three pipes, in a session of its own (Ctrl-C doesn't reach it)."""
    home = Path(settings.WORK_DIR) / "home"
    home.mkdir(parents=True, exist_ok=True)
    # setpriv belongs to util-linux; where there is none (macOS), the end of standard input must do.
    wrapper = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
    wrapper = [*no_network_prefix(), *wrapper]
    process = subprocess.Popen(
        [*wrapper, sys.executable, "-m", "training", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=settings.BASE_DIR,
        env=environment(home),
        start_new_session=True,
    )
    assert process.stdout
    assert process.stderr
    limit(process.pid, limits or Limits())
    return Child(process, LineReader(process.stdout), LineReader(process.stderr))


def read_lines(child: Child, seconds: float) -> Iterator[tuple[bool, str]]:
    """(is it standard error, line) until both pipes end or the time is over. The caller kills it then."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not (child.out.ended and child.err.ended):
        pipes = [pipe for pipe in (child.out, child.err) if not pipe.ended]
        select.select([pipe.fd for pipe in pipes], [], [], 1)
        for pipe in pipes:
            for line in pipe.lines():
                yield pipe is child.err, line


def limit(pid: int, limits: Limits) -> None:
    """Sets a running child's limits. The kernel takes it first when memory runs out, not the studio."""
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_AS: limits.memory_bytes or None,
        resource.RLIMIT_FSIZE: limits.file_bytes or None,
        resource.RLIMIT_CPU: limits.cpu_s or None,
    }
    with contextlib.suppress(ProcessLookupError, OSError):
        for what, value in wanted.items():
            if value is not None and hasattr(resource, "prlimit"):
                _, hard = resource.prlimit(pid, what)
                value = value if hard == resource.RLIM_INFINITY else min(value, hard)
                resource.prlimit(pid, what, (value, value))
        Path(f"/proc/{pid}/oom_score_adj").write_text("500")

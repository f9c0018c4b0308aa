"""Child processes that import torch or parse users' files. They have limits and no credentials, and end with their parent.

Three things make a child end with its parent: the kernel kills it when the thread that started it ends (`setpriv
--pdeathsig`, so start children from the main thread or from one that lives as long as the process), its standard input
is closed, and we stop it before we exit. Limits are set from outside with prlimit, so that none of our code runs between
fork and exec, which would be unsafe in a process with threads.
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

# The only variables that a child inherits. None of them has credentials of a store, a mail server or the Hub.
ENVIRONMENT = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "TMPDIR",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
)
CUT = "… (cut)"


@dataclass(frozen=True)
class Limits:
    """0 = no limit."""

    # Address space; 0 means no limit. Keep 0 with a GPU, because its driver reserves far more than it uses.
    memory_bytes: int = 0
    file_bytes: int = 0
    cpu_s: int = 0
    open_files: int = 4096


class LineReader:
    """Complete lines from a pipe, without blocking. A line longer than the cap is cut and marked."""

    def __init__(self, pipe: IO[bytes], cap: int = MAX_LINE_BYTES) -> None:
        self.fd = pipe.fileno()
        self.cap = cap
        self.ended = False
        self._rest = b""
        self._skipping = False  # the rest of a line that was cut
        os.set_blocking(self.fd, False)

    def lines(self, max_bytes: int = 1 << 18) -> list[str]:
        """The lines received so far, about `max_bytes` at most. Sets `ended` at the end of the pipe."""
        lines: list[str] = []
        while max_bytes > 0 and not self.ended:
            try:
                data = os.read(self.fd, 1 << 16)
            except BlockingIOError:
                break
            max_bytes -= len(data)
            self.ended = not data
            *whole, self._rest = (self._rest + data).split(b"\n")
            for line in whole:
                self._take(line, lines)
            if len(self._rest) > self.cap:
                self._take(self._rest, lines)
                self._rest, self._skipping = b"", True
        if self.ended and self._rest:
            self._take(self._rest, lines)
            self._rest = b""
        return lines

    def _take(self, line: bytes, lines: list[str]) -> None:
        if self._skipping:
            self._skipping = False
        elif len(line) > self.cap:
            lines.append(line[: self.cap].decode("utf-8", "replace") + CUT)
        elif line.strip():
            lines.append(line.decode("utf-8", "replace"))


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
        """Writes one line to its standard input. Returns False if the pipe is closed."""
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except (OSError, ValueError):
            return False
        return True

    def heartbeat(self) -> None:
        """Sends a heartbeat. Never blocks, even if the child does not read."""
        assert self.process.stdin
        with contextlib.suppress(OSError, ValueError):
            fd = self.process.stdin.fileno()
            os.set_blocking(fd, False)
            os.write(fd, b'{"lease": "ok"}\n')

    def signal(self, number: int) -> None:
        """Sends a signal to the child only, which forwards it to its own children if needed."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def kill_group(self) -> None:
        """Kills the child and its process group, and waits for it. Its output can still be read."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def kill(self) -> None:
        self.kill_group()
        self.close()

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()


def environment(home: Path) -> dict[str, str]:
    """The child's environment: only the allowed variables, a separate home folder, and Hugging Face in offline mode."""
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
    """The command prefix that isolates a process in an empty network namespace. Empty if the system does not allow this,
    as in some containers."""
    for command in (("unshare", "--net"), ("unshare", "--user", "--map-current-user", "--net")):
        if shutil.which("unshare"):
            result = subprocess.run([*command, "true"], capture_output=True, timeout=10)
            if result.returncode == 0:
                return (*command, "--")
    return ()


def start(*arguments: str, limits: Limits | None = None) -> Child:
    """Runs `python -m training ARGUMENTS…` as a child with three pipes, in a new session (Ctrl-C does not reach it)."""
    home = Path(settings.WORK_DIR) / "home"
    home.mkdir(parents=True, exist_ok=True)
    # setpriv is part of util-linux; without it (macOS) only the closed standard input ends the child.
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
    """Yields (whether it is standard error, line) until both pipes end or the time is up. The caller then kills the child."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not (child.out.ended and child.err.ended):
        pipes = [pipe for pipe in (child.out, child.err) if not pipe.ended]
        select.select([pipe.fd for pipe in pipes], [], [], 1)
        for pipe in pipes:
            for line in pipe.lines():
                yield pipe is child.err, line


def limit(pid: int, limits: Limits) -> None:
    """Sets a running child's limits. When memory runs out, the kernel kills it first and not the server."""
    limits_by_resource = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_AS: limits.memory_bytes or None,
        resource.RLIMIT_FSIZE: limits.file_bytes or None,
        resource.RLIMIT_CPU: limits.cpu_s or None,
    }
    with contextlib.suppress(ProcessLookupError, OSError):
        for kind, value in limits_by_resource.items():
            if value is not None and hasattr(resource, "prlimit"):
                _, hard = resource.prlimit(pid, kind)
                value = value if hard == resource.RLIM_INFINITY else min(value, hard)
                resource.prlimit(pid, kind, (value, value))
        Path(f"/proc/{pid}/oom_score_adj").write_text("500")

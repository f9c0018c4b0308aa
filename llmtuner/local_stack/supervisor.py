"""supervisord as a child process: its programs, its configuration, and how it is controlled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from supervisor.xmlrpc import SupervisorTransport

from llmtuner.local_stack.preflight import StartupError
from llmtuner.processes import QUEUES

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / ".tools"
STOP_WORKERS_S = 45  # a worker writes a checkpoint and releases its job within 30 s


def programs() -> Iterator[tuple[str, int, list[str], int]]:
    """(name, priority, argv, seconds to stop) in start order; supervisor stops them in reverse."""
    var = os.environ["VAR_DIR"]
    if "LLMTUNER_OWN_REDIS" in os.environ:
        yield "redis", 1, [str(TOOLS / "redis-server"), f"{var}/redis/redis.conf"], 10
    if "LLMTUNER_OWN_DYNAMODB" in os.environ:
        guard = str(ROOT / "llmtuner/dynalite_guard.cjs")
        dynalite = [str(TOOLS / "node"), "--require", guard, str(TOOLS / "node_modules/dynalite/cli.js")]
        dynalite += ["--host", "127.0.0.1"]
        yield (
            "dynamodb",
            1,
            [*dynalite, "--port", os.environ["DYNAMODB_PORT"], "--path", f"{var}/dynamodb"],
            10,
        )
    yield "web", 10, [sys.executable, "-m", "llmtuner", "web"], 15
    for queue in QUEUES:
        yield queue, 20, [sys.executable, "-m", "llmtuner", "worker", queue], STOP_WORKERS_S


def die_with_parent_prefix() -> list[str]:
    """A prefix that makes a command die with its parent, even if the parent is killed. setpriv is part of util-linux, which
    every Debian has."""
    return ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []


def write_configuration(var: Path) -> Path:
    """Writes supervisord.conf, at every start."""
    logs = var / "logs"
    logs.mkdir(exist_ok=True)
    lines = [
        "[supervisord]",
        f"logfile={logs}/supervisord.log",
        f"pidfile={var}/supervisord.pid",
        "nodaemon=true",
        "silent=true",
        "[unix_http_server]",
        f"file={socket_path(var)}",
        "chmod=0700",
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface",
    ]
    for name, priority, argv, stop_s in programs():
        # supervisor expands %(name)s
        escaped = [argument.replace("%", "%%") for argument in [*die_with_parent_prefix(), *argv]]
        command = " ".join(f'"{argument}"' if " " in argument else argument for argument in escaped)
        lines += [
            f"[program:{name}]",
            f"command={command}",
            f"directory={ROOT}",
            f"priority={priority}",
            "autostart=false",
            "autorestart=true",
            "startsecs=1",
            "startretries=1000",
            f"stopwaitsecs={stop_s}",
            "killasgroup=true",
            "redirect_stderr=true",
            f"stdout_logfile={logs}/{name}.log",
            "stdout_logfile_maxbytes=10MB",
            "stdout_logfile_backups=2",
        ]
    path = var / "supervisord.conf"
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o600)
    return path


def socket_path(var: Path) -> Path:
    """The path of supervisor's socket. Unix socket paths are limited to 107 bytes, so if the path of `var` is too long, the
    socket is in the temporary folder."""
    path = var / "supervisor.sock"
    if len(str(path).encode()) < 100:
        return path
    return Path("/tmp") / f"llmtuner-{os.getuid()}-{abs(hash(str(var)))}.sock"  # noqa: S108  supervisor creates it with mode 0700


class Supervisor:
    """A supervisord child process, controlled through its Unix socket."""

    def __init__(self, configuration: Path, var: Path) -> None:
        argv = [
            *die_with_parent_prefix(),
            sys.executable,
            "-m",
            "llmtuner.supervisord",
            "-c",
            str(configuration),
            "-n",
        ]
        # In its own session, so that Ctrl-C reaches only this process, which stops the others in order.
        self.process = subprocess.Popen(argv, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
        self.socket = socket_path(var)
        self.names = [name for name, *_ in programs()]
        self.pids: dict[str, int] = {}
        try:
            wait_for("supervisord", self.is_up, 15, var)
        except BaseException:
            self.process.kill()
            raise

    @property
    def rpc(self) -> Any:
        """A new connection for each call: a broken one would stay broken."""
        transport = SupervisorTransport(None, None, f"unix://{self.socket}")
        return xmlrpc.client.ServerProxy("http://127.0.0.1", transport).supervisor

    def is_up(self) -> bool:
        try:
            # The socket may belong to another supervisord, whose processes we must neither start nor stop.
            return bool(
                self.rpc.getPID() == self.process.pid and self.rpc.getState()["statename"] == "RUNNING"
            )
        except (OSError, xmlrpc.client.Error):
            return False

    def start(self, *names: str) -> None:
        for name in names:
            if name in self.names:
                self.rpc.startProcess(name, False)
                self.pids[name] = self.rpc.getProcessInfo(name)["pid"]

    def has_exited(self, name: str) -> bool:
        """Whether the process that `start` started has exited, even if supervisor has started another one since."""
        return bool(self.rpc.getProcessInfo(name)["pid"] != self.pids[name])

    def stop_one(self, name: str) -> None:
        self._quietly(self.rpc.stopProcess, name, True)

    def stop(self) -> None:
        """Stops the workers first, so that they can put their jobs back into the queue, then the web server, then the stores."""
        if self.process.poll() is None:
            order = [["checks", "notifications", "training", "inference"], ["web"], ["dynamodb", "redis"]]
            for group in order:
                for name in group:
                    if name in self.names:
                        self._quietly(self.rpc.stopProcess, name, False)
                self._wait_stopped(group)
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()

    def _wait_stopped(self, group: list[str]) -> None:
        deadline = time.monotonic() + STOP_WORKERS_S + 5
        while time.monotonic() < deadline:
            states = self._quietly(self.rpc.getAllProcessInfo) or []
            if not any(row["name"] in group and row["pid"] for row in states):
                return
            time.sleep(0.1)

    def _quietly(self, call: Any, *args: Any) -> Any:
        try:
            return call(*args)
        except (OSError, xmlrpc.client.Error):
            return None


def wait_for(name: str, is_up: Any, seconds: float, var: Path) -> None:
    deadline = time.monotonic() + seconds
    while not is_up():
        if time.monotonic() > deadline:
            raise StartupError(
                f"{name} did not start within {seconds:.0f} s. Its log: {var / 'logs'}/{name}.log"
            )
        time.sleep(0.1)

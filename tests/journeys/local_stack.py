"""bin/up as a child process, in its own folder and on its own ports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests import services


def free_ports() -> dict[str, str]:
    return {name: str(services.free_port()) for name in ("WEB_PORT", "DYNAMODB_PORT", "REDIS_PORT")}


class LocalStack:
    """A studio that bin/up starts and supervises."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        self.env = inherited | free_ports() | {"VAR_DIR": str(folder / "var"), "OMP_NUM_THREADS": "1"}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "up.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "llmtuner.local_stack", "--no-sample"],
                cwd=services.ROOT,
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 180
        while "Serving" not in (self.folder / "up.log").read_text().rpartition("=== start")[2]:
            assert self.process.poll() is None, (self.folder / "up.log").read_text()
            assert time.monotonic() < deadline, (self.folder / "up.log").read_text()
            time.sleep(0.2)

    def run_script(self, code: str) -> Any:
        """Runs Python code over the stores of this studio. Returns what it prints as JSON."""
        env = self.env | {
            "DJANGO_SETTINGS_MODULE": "llmtuner.settings",
            "DYNAMODB_ENDPOINT": f"http://127.0.0.1:{self.env['DYNAMODB_PORT']}",
        }
        script = f"import django; django.setup()\n{code}"
        result = subprocess.run(
            [sys.executable, "-c", script], cwd=services.ROOT, env=env, capture_output=True, check=False
        )
        assert result.returncode == 0, result.stderr.decode()
        return json.loads(result.stdout)

    def kill(self) -> None:
        """SIGKILL to the whole process group, like `kill -9 -PGID` in a shell."""
        assert self.process
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with (self.folder / "up.log").open("a") as log:
            log.write("\n=== start")

    def stop(self) -> None:
        """Ctrl-C, and SIGKILL if it is still running a minute later."""
        if self.process is None or self.process.poll() is not None:
            return
        os.killpg(self.process.pid, signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()

    def processes(self) -> list[str]:
        """Command lines of all processes that have this folder in their environment."""
        commands = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if str(self.folder).encode() in (path / "environ").read_bytes():
                    commands.append((path / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return commands

"""Creates tests/golden/var/var.tar.xz: the data folder of a small installation, as the current code leaves it.

    .venv/bin/python -m tests.golden.make_var

It starts everything as bin/up does, fills it (two users, datasets that are ready and rejected, a model fully fine-tuned
from a tiny base of the Hub and one with adapters, a failed job, a paused one, a webhook), and kills all processes with
SIGKILL while one more job trains and has a checkpoint. A later version must start with this folder and continue; so
create it again only when data of older versions need no longer be readable, and keep the old one beside it until then.
The keys and passwords in it were made up for this purpose and are valid nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests import hub_server, services
from tests.golden import scenario
from tests.golden.stack import Person, is_up, receiver, wait_until

ROOT = services.ROOT
VAR = Path(__file__).parent / "var"
ARCHIVE, CONTENTS = VAR / "var.tar.xz", VAR / "contents.json"
KILLED: dict[str, Any] = scenario.SETTINGS | {
    "max_steps": 1500,
    "eval_every": 750,
    "sample_every": 1500,
    "checkpoint_every_steps": 50,
    "dropout": 0.1,
}
PAUSED = KILLED
NOT_PACKED = {
    "supervisord.conf",
    "supervisor.sock",
    "supervisord.pid",
    "logs",
    "work",
}  # created by every start


class LocalStack:
    """All processes on one machine, as bin/up starts them, with a separate folder and ports."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.var = folder, folder / "var"
        ports = {name: str(services.free_port()) for name in ("WEB_PORT", "DYNAMODB_PORT", "REDIS_PORT")}
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        quick = {
            "JOBS_LEASE_S": "5",
            "JOBS_HEARTBEAT_S": "1",
            "JOBS_RECONCILE_S": "1",
            "JOBS_BACKOFF_FIRST_S": "1",
        }
        self.env = kept | ports | quick | {
            "VAR_DIR": str(self.var),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "WEBHOOKS_ALLOW_PRIVATE": "1",
            **environment,
        }  # fmt: skip
        self.url = f"http://localhost:{ports['WEB_PORT']}"
        self.dynamodb_port = int(ports["DYNAMODB_PORT"])
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        """Returns what it printed, once it serves."""
        module = re.search(r"-m (\S+)", (ROOT / "bin/up").read_text())
        assert module
        log = self.folder / "up.log"
        self.process = subprocess.Popen(
            [sys.executable, "-m", module[1], "--no-sample"],
            cwd=ROOT,
            env=self.env,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=services._die_with_parent,
        )
        wait_until(self._serves, 300, log.read_text)
        return log.read_text()

    def _serves(self) -> bool:
        assert self.process
        log = (self.folder / "up.log").read_text()
        assert self.process.poll() is None, log
        return "Serving" in log and is_up(f"{self.url}/healthz")

    def processes(self) -> dict[int, str]:
        """Command lines, by pid, of all processes that have this folder in their environment."""
        commands = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if str(self.folder).encode() in (path / "environ").read_bytes():
                    commands[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
        return commands

    def kill(self) -> None:
        """SIGKILL: first to the trainer and its worker, then to everything else."""
        assert self.process
        for number, command in self.processes().items():
            if re.search(r"-m training standby|-Q training", command):
                kill(number)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        wait_until(lambda: not self.processes(), 60, self.processes)

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(90)
            except subprocess.TimeoutExpired:
                self.kill()


def kill(number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may already have died with its parent
        os.kill(number, signal.SIGKILL)


def fill(stack: LocalStack, owner: Person, hook: Any) -> dict[str, Any]:
    """Fills the folder. Returns the ids, accounts and keys in it."""
    ada = Person(stack.url, "ada@example.com").sign_up()
    key = ada.make_key()
    resources = scenario.before_workers(ada, hook)
    scenario.with_workers(ada, owner, resources, keep_all=True)
    own = owner.make_key()
    owner.upload("owner.jsonl", scenario.REJECTED.replace(b"no end", b"nor here"))
    scenario.pause(ada, resources, "paused", PAUSED)
    killed = scenario.submit(ada, resources, "killed", scenario.TINY, KILLED)
    wait_until(lambda: ada.checkpoints(killed), 600, killed)
    stack.kill()
    contents = asdict(resources) | {"responses": {}}
    users = {"ada": {"email": ada.email, "password": ada.password, "key": key}, "owner": {"email": owner.email, "password": owner.password, "key": own}}  # fmt: skip
    return contents | {"users": users}


def pack(var: Path) -> None:
    with tarfile.open(ARCHIVE, "w:xz") as archive:
        for path in sorted(var.iterdir()):
            if path.name not in NOT_PACKED:
                archive.add(path, f"var/{path.name}")


def main() -> int:
    VAR.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with hub_server.running(scenario.repositories(folder / "hub")) as hub, receiver() as hook:
            stack = LocalStack(folder, HF_ENDPOINT=hub.url)
            try:
                printed = re.search(r"Sign in as (\S+) with the password (\S+)", stack.start())
                assert printed
                owner = Person(stack.url, printed[1], printed[2]).sign_in()
                contents = fill(stack, owner, hook)
            finally:
                stack.stop()
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)  # fmt: skip
        contents["note"] = "Made up for this folder: the keys and passwords are valid nowhere else."
        contents["made"] = {"commit": commit.stdout.strip(), "on": time.strftime("%Y-%m-%d", time.gmtime())}
        pack(stack.var)
    CONTENTS.write_text(json.dumps(contents, indent=1, sort_keys=True) + "\n")
    print(f"{ARCHIVE.relative_to(ROOT)}: {ARCHIVE.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

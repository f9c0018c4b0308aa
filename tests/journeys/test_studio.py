"""bin/up: everything on one machine comes up, and comes up again after the worst."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests import services

pytestmark = pytest.mark.slow

SUBMIT = """
import json, time
from django.contrib.auth import get_user_model
from jobs.store import access
from jobs.datasets import datasets
from jobs.lifecycle import transitions
owner = get_user_model().objects.get().owner_id
with open("training/starter/sample/train.jsonl", "rb") as file:
    dataset = datasets.receive(owner, "sample.jsonl", file)
while access.get_dataset_for(owner, dataset.dataset_id).status != "ready":
    time.sleep(0.2)
settings = {"max_steps": 150, "checkpoint_every_steps": 10, "validation_fraction": 0}
request = transitions.JobRequest(base="starter", dataset_id=dataset.dataset_id, name="Survivor", settings=settings)
print(json.dumps([owner, transitions.submit(owner, request).job_id, dataset.dataset_id]))
"""
LOOK = """
import json, sys
from django.contrib.auth import get_user_model
from jobs.store import access
from jobs.events import event_log
owner, job_id, dataset_id = {ids!r}
job = access.get_job_for(owner, job_id)
events = event_log.read(owner, job_id, 0)
print(json.dumps(dict(
    status=job.status, step=job.checkpoint_step or 0, fencing_token=job.fencing_token, seqs=[e.seq for e in events],
    people=get_user_model().objects.count(), dataset=access.get_dataset_for(owner, dataset_id).status,
    model=job.model_id if job.status == "succeeded" and access.get_model_for(owner, job.model_id) else "",
)))
"""


class House:
    """A studio of its own: folder, ports, processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ports = {name: str(services.free_port()) for name in ("WEB_PORT", "DYNAMODB_PORT", "REDIS_PORT")}
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        self.env = kept | ports | {"VAR_DIR": str(folder / "var"), "OMP_NUM_THREADS": "1"}
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

    def ask(self, code: str):
        prelude = "from jobs.store.tables import Dataset\n"  # the stores' addresses come from the folder and the ports
        env = self.env | {
            "DJANGO_SETTINGS_MODULE": "llmtuner.settings",
            "DYNAMODB_ENDPOINT": f"http://127.0.0.1:{self.env['DYNAMODB_PORT']}",
        }
        script = "import django; django.setup()\n" + prelude + code
        answer = subprocess.run(
            [sys.executable, "-c", script], cwd=services.ROOT, env=env, capture_output=True, check=False
        )
        assert answer.returncode == 0, answer.stderr.decode()
        return json.loads(answer.stdout)

    def kill(self) -> None:
        """SIGKILL to the whole process group, as a shell's `kill -9 -PGID`."""
        assert self.process
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with (self.folder / "up.log").open("a") as log:
            log.write("\n=== start")

    def processes(self) -> list[str]:
        """Command lines of every process that was told this house's folder."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if str(self.folder).encode() in (path / "environ").read_bytes():
                    found.append((path / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found


@pytest.fixture
def house(tmp_path: Path):
    house = House(tmp_path)
    yield house
    if house.process and house.process.poll() is None:
        os.killpg(house.process.pid, signal.SIGINT)
        try:
            house.process.wait(60)
        except subprocess.TimeoutExpired:
            house.kill()


def test_after_kill_9_all_data_is_kept_and_the_running_job_continues(house: House):
    house.start()
    ids = house.ask(SUBMIT)
    deadline = time.monotonic() + 120
    while (seen := house.ask(LOOK.format(ids=ids)))["step"] < 10:
        assert seen["status"] in {"validating", "queued", "running"}, seen
        assert time.monotonic() < deadline, seen
    house.kill()
    time.sleep(2)
    assert house.processes() == []

    house.start()
    again = house.ask(LOOK.format(ids=ids))
    assert again["people"] == 1
    assert again["dataset"] == "ready"
    assert again["seqs"][: len(seen["seqs"])] == seen["seqs"]
    deadline = time.monotonic() + 180
    while (end := house.ask(LOOK.format(ids=ids)))["status"] != "succeeded":
        assert end["status"] in {"queued", "running", "retrying"}, end
        assert time.monotonic() < deadline, end
        time.sleep(1)
    assert end["fencing_token"] >= 2
    assert end["model"]
    assert end["seqs"] == list(range(1, len(end["seqs"]) + 1))

    assert house.process
    os.killpg(house.process.pid, signal.SIGINT)
    assert house.process.wait(60) == 0
    assert house.processes() == []


def test_a_port_that_is_in_use_is_reported(house: House, redis: services.Service):
    house.env["REDIS_PORT"] = str(redis.port)
    answer = subprocess.run(
        [sys.executable, "-m", "llmtuner.local_stack"],
        cwd=services.ROOT,
        env=house.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 1
    assert f"Another program uses port {redis.port}" in answer.stderr
    assert "REDIS_PORT=" in answer.stderr


def test_it_is_ready_while_it_runs(house: House):
    house.start()
    port = house.env["WEB_PORT"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10) as answer:
        assert answer.status == 200

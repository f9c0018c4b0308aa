"""bin/up starts everything on one machine, and starts it again after kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from tests import services
from tests.journeys.local_stack import LocalStack

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
STATE = """
import json, sys
from django.contrib.auth import get_user_model
from jobs.store import access
from jobs.events import event_log
owner, job_id, dataset_id = {ids!r}
job = access.get_job_for(owner, job_id)
events = event_log.read(owner, job_id, 0)
print(json.dumps(dict(
    status=job.status, step=job.checkpoint_step or 0, fencing_token=job.fencing_token, seqs=[e.seq for e in events],
    users=get_user_model().objects.count(), dataset=access.get_dataset_for(owner, dataset_id).status,
    model=job.model_id if job.status == "succeeded" and access.get_model_for(owner, job.model_id) else "",
)))
"""


def test_after_kill_9_all_data_is_kept_and_the_running_job_continues(local_stack: LocalStack):
    local_stack.start()
    ids = local_stack.run_script(SUBMIT)
    deadline = time.monotonic() + 120
    while (before := local_stack.run_script(STATE.format(ids=ids)))["step"] < 10:
        assert before["status"] in {"validating", "queued", "running"}, before
        assert time.monotonic() < deadline, before
    local_stack.kill()
    services.wait_until(lambda: not local_stack.processes(), 60, local_stack.processes)

    local_stack.start()
    after = local_stack.run_script(STATE.format(ids=ids))
    assert after["users"] == 1
    assert after["dataset"] == "ready"
    assert after["seqs"][: len(before["seqs"])] == before["seqs"]
    deadline = time.monotonic() + 180
    while (end := local_stack.run_script(STATE.format(ids=ids)))["status"] != "succeeded":
        assert end["status"] in {"queued", "running", "retrying"}, end
        assert time.monotonic() < deadline, end
        time.sleep(1)
    assert end["fencing_token"] >= 2
    assert end["model"]
    assert end["seqs"] == list(range(1, len(end["seqs"]) + 1))

    assert local_stack.process
    os.killpg(local_stack.process.pid, signal.SIGINT)
    assert local_stack.process.wait(60) == 0
    assert local_stack.processes() == []


def test_a_port_that_is_in_use_is_reported(local_stack: LocalStack, redis: services.Service):
    local_stack.env["REDIS_PORT"] = str(redis.port)
    result = subprocess.run(
        [sys.executable, "-m", "llmtuner.local_stack"],
        cwd=services.ROOT,
        env=local_stack.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert f"Another program is using port {redis.port}" in result.stderr
    assert "REDIS_PORT=" in result.stderr


def test_it_is_ready_while_it_runs(local_stack: LocalStack):
    local_stack.start()
    port = local_stack.env["WEB_PORT"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10) as response:
        assert response.status == 200

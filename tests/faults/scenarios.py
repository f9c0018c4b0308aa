"""One function a fault. Each does harm to a running job in a house of its own and returns what it measured.

`Measured.wrong` is what the judge found; the figures are compared with promises by `benchmarks/faults.py`.
"""

from __future__ import annotations

import json
import random
import signal
import time
from dataclasses import dataclass, field
from typing import Any

from tests.faults import house as h
from tests.faults.history import Recorder, orphans, violations
from tests.faults.proxy import Chaos


@dataclass
class Measured:
    figures: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


@dataclass
class Stage:
    """The house, a dataset, the run without faults, and the recorder that watches all along."""

    house: h.House
    dataset: str
    steps: int
    recorder: Recorder
    some: random.Random
    reference: Any = None
    lease_s: float = 30.0

    def begin(self) -> None:
        self.house.start_worker("one")
        self.reference = h.wait_ended(self.submit())
        assert self.reference.status == "succeeded", self.reference.message

    def submit(self, **settings: Any) -> str:
        asked = {"max_steps": self.steps, "checkpoint_every_steps": max(20, self.steps // 10)} | settings
        job_id = h.submit(self.dataset, **asked)
        self.recorder.jobs.add((h.OWNER, job_id))
        return job_id

    def holder(self, job: Any) -> str:
        """The name of the worker that runs it."""
        pid = int(job.worker.rpartition("/")[2])
        return next(name for name, process in self.house.workers.items() if process.pid == pid)

    def somewhere(self, job_id: str) -> Any:
        """The job at a random moment of its training."""
        return h.wait_step(job_id, self.some.randrange(1, max(2, int(self.steps * 0.7))))

    def judge(self, job_id: str, measured: Measured, seconds: float = 300) -> Any:
        job = h.wait_ended(job_id, seconds)
        if job.status != "succeeded":
            measured.wrong.append(f"{job.status}: {job.message}")
        measured.wrong += violations(job, self.reference, steps=self.steps)
        measured.wrong += [f"orphan trainer {pid}" for pid in orphans(self.house)]
        measured.wrong += self.recorder.found
        self.recorder.found.clear()
        measured.figures["attempts charged"] = float(job.attempts)
        return job


def until(is_so: Any, seconds: float = 60) -> float:
    """Seconds it took."""
    began = time.monotonic()
    while not is_so():
        if time.monotonic() - began > seconds:
            return float("inf")
        time.sleep(0.01)
    return time.monotonic() - began


# ---- processes -------------------------------------------------------------------------------------------------------


def worker_killed(stage: Stage) -> Measured:
    """SIGKILL of a worker: its trainer dies with it, another attempt goes on from the checkpoint."""
    measured = Measured()
    job_id = stage.submit()
    name = stage.holder(stage.somewhere(job_id))
    trainers = h.trainers_of(stage.house.workers[name].pid)
    began = time.monotonic()
    stage.house.kill(name)
    measured.figures["trainer dead s"] = until(lambda: not any(map(h.is_alive, trainers)), 10)
    stage.house.start_worker(name)
    h.wait_until(job_id, lambda job: (job.epoch >= 2 and job.status == "running") or job.ended)
    measured.figures["new attempt s"] = time.monotonic() - began
    stage.judge(job_id, measured)
    return measured


def trainer_killed(stage: Stage) -> Measured:
    measured = Measured()
    job_id = stage.submit()
    name = stage.holder(stage.somewhere(job_id))
    trainers = h.trainers_of(stage.house.workers[name].pid)
    h.os.kill(trainers[0], signal.SIGKILL)
    began = time.monotonic()
    h.wait_until(job_id, lambda job: job.status != "running" or job.epoch >= 2)
    measured.figures["detected s"] = time.monotonic() - began
    h.wait_until(job_id, lambda job: job.epoch >= 2 or job.ended)
    measured.figures["new attempt s"] = time.monotonic() - began
    stage.judge(job_id, measured)
    return measured


def worker_terminated(stage: Stage) -> Measured:
    """SIGTERM: checkpoint, give the job back, go; nothing is charged."""
    measured = Measured()
    job_id = stage.submit()
    name = stage.holder(stage.somewhere(job_id))
    trainers = h.trainers_of(stage.house.workers[name].pid)
    began = time.monotonic()
    stage.house.kill(name, signal.SIGTERM)
    measured.figures["out s"] = time.monotonic() - began
    measured.wrong += [f"trainer {pid} is alive" for pid in trainers if h.is_alive(pid)]
    job = h.job_of(job_id)
    if job.status not in ("queued", "succeeded", "running"):
        measured.wrong.append(f"after SIGTERM it is {job.status}")
    stage.house.start_worker(name)
    stage.judge(job_id, measured)
    return measured


def worker_frozen(stage: Stage) -> Measured:
    """SIGSTOP for longer than the lease while another takes over; then it wakes up as a zombie."""
    measured = Measured()
    job_id = stage.submit()
    name = stage.holder(stage.somewhere(job_id))
    process = stage.house.workers[name]
    trainers = h.trainers_of(process.pid)
    process.send_signal(signal.SIGSTOP)
    other = "other" if name != "other" else "one"
    stage.house.start_worker(other)
    h.wait_until(
        job_id, lambda job: (job.epoch >= 2 and job.status == "running") or job.ended, stage.lease_s + 60
    )
    process.send_signal(signal.SIGCONT)
    measured.figures["zombie's trainer gone s"] = until(lambda: not any(map(h.is_alive, trainers)), 30)
    stage.judge(job_id, measured)
    stage.house.kill(other)
    return measured


# ---- stores ----------------------------------------------------------------------------------------------------------


def redis_killed(stage: Stage, down_s: float = 2) -> Measured:
    """A job runs and another is submitted while Redis is away; both succeed."""
    measured = Measured()
    running = stage.submit()
    stage.somewhere(running)
    stage.house.redis.kill()
    began = time.monotonic()
    waiting = stage.submit()
    measured.figures["submit s"] = time.monotonic() - began
    time.sleep(down_s)
    stage.house.redis.start()
    stage.judge(running, measured)
    stage.judge(waiting, measured)
    return measured


def dynamodb_killed(stage: Stage, down_s: float = 10) -> Measured:
    """The record itself is away: the same trainer goes on, and what it said arrives afterwards."""
    measured = Measured()
    job_id = stage.submit()
    name = stage.holder(stage.somewhere(job_id))
    before = h.trainers_of(stage.house.workers[name].pid)
    stage.house.dynamodb.kill()
    time.sleep(down_s)
    stage.house.dynamodb.start()
    job = stage.judge(job_id, measured)
    if job.epoch != 1:
        measured.wrong.append(f"it took {job.epoch} leases")
    measured.figures["trainers"] = float(len(before))
    return measured


def replies_lost(stage: Stage, chance: float = 0.1) -> Measured:
    """DynamoDB takes writes and its answers are lost on the way: nothing is done twice."""
    measured = Measured()
    chaos = Chaos(stage.house.dynamodb.port)
    name = "behind the proxy"
    others = list(stage.house.workers)
    for other in others:
        stage.house.kill(other, signal.SIGTERM)
    try:
        until(lambda: h.services._answers_http(chaos.port), 10)
        stage.house.start_worker(name, DYNAMODB_ENDPOINT=f"http://127.0.0.1:{chaos.port}")
        chaos.order(f"drop {chance}")
        job_id = stage.submit()
        h.wait_ended(job_id)
        chaos.order("pass")
        stage.judge(job_id, measured)
    finally:
        stage.house.kill(name)
        chaos.stop()
        for other in others:
            stage.house.start_worker(other)
    return measured


# ---- people ----------------------------------------------------------------------------------------------------------


def cancelled(stage: Stage) -> Measured:
    from jobs import feed, lifecycle

    measured = Measured()
    job_id = stage.submit(max_steps=100_000)
    h.wait_step(job_id, 20)
    began = time.monotonic()
    lifecycle.ask(h.OWNER, job_id, "cancel")
    job = h.wait_ended(job_id, 60)
    measured.figures["cancelled s"] = time.monotonic() - began
    if job.status != "cancelled":
        measured.wrong.append(f"it is {job.status}")
    told = feed.read(h.OWNER, job_id)
    if [e.seq for e in told] != list(range(1, len(told) + 1)):
        measured.wrong.append("events are not numbered 1 … N")
    return measured


def paused_and_resumed(stage: Stage) -> Measured:
    from jobs import lifecycle

    measured = Measured()
    job_id = stage.submit()
    stage.somewhere(job_id)
    began = time.monotonic()
    lifecycle.ask(h.OWNER, job_id, "pause")
    job = h.wait_until(job_id, lambda job: job.status == "paused" or job.ended)
    measured.figures["paused s"] = time.monotonic() - began
    if job.status == "paused":
        lifecycle.ask(h.OWNER, job_id, "run")
    stage.judge(job_id, measured)
    return measured


def bells_doubled(stage: Stage, times: int = 10) -> Measured:
    """Each doorbell rings ten times: nobody runs anything twice."""
    from jobs import tasks

    measured = Measured()
    job_id = stage.submit()
    for _ in range(times):
        tasks.run_next.apply_async()
    stage.judge(job_id, measured)
    return measured


def checkpoint_damaged(stage: Stage) -> Measured:
    """A bit flips in the stored checkpoint that the pointer names: the one before it is used, and the end is the same."""
    from jobs import storage

    measured = Measured()
    job_id = stage.submit()
    job = h.wait_until(job_id, lambda job: len(job.checkpoints or []) >= 2 or job.ended)
    name = stage.holder(job)
    stage.house.kill(name)
    job = h.job_of(job_id)
    path = storage.local_path(f"{job.checkpoint_key}/weights.safetensors")
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    stage.house.start_worker(name)
    stage.judge(job_id, measured)
    told = json.dumps(job.checkpoints)
    measured.figures["checkpoints known"] = told.count('"key"')
    return measured


def failpoint(stage: Stage, place: str) -> Measured:
    """A worker dies exactly there."""
    measured = Measured()
    names = list(stage.house.workers)
    for name in names:
        stage.house.kill(name, signal.SIGTERM)
    doomed = stage.house.start_worker("doomed", FAILPOINTS=f"{place}:kill9")
    job_id = stage.submit()
    if until(lambda: doomed.poll() is not None, 60) == float("inf"):
        measured.wrong.append(f"nothing passed {place!r}")
    stage.house.workers.pop("doomed", None)
    doomed.kill()
    for name in names:
        stage.house.start_worker(name)
    stage.judge(job_id, measured)
    return measured


FAILPOINTS = (
    "claimed",
    "trainer started",
    "chunk stored",
    "checkpoint stored",
    "trainer done",
    "model stored",
)

"""What every scenario works with: the house, the run without faults to compare with, and the judge's verdict.

A scenario is a function `(stage, rounds) -> Measured`: it does its harm to running jobs, up to `rounds` times, and says how
often it did. `Measured.wrong` is what the judge found; the figures are compared with promises by `benchmarks/faults.py`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.faults import house as h
from tests.faults.history import Recorder, orphans, violations

NAMES = ("one", "two", "three", "four", "five", "six")


@dataclass
class Measured:
    figures: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    rounds: int = 1

    def worst(self, name: str, value: float) -> None:
        self.figures[name] = max(value, self.figures.get(name, 0.0))


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
    at_once: int = 1  # jobs that are harmed in one go, each with a worker of its own
    patience_s: float = 300.0  # for a job to end

    def begin(self) -> None:
        self.house.start_worker("one")
        self.reference = h.wait_ended(self.submit())
        assert self.reference.status == "succeeded", self.reference.message

    def only(self, count: int, **environment: str) -> list[str]:
        """So many workers run, whatever there was before. Returns their names."""
        for name in list(self.house.workers):
            if name not in NAMES[:count] or self.house.workers[name].poll() is not None or environment:
                self.house.kill(name)
        for name in NAMES[:count]:
            if name not in self.house.workers:
                self.house.start_worker(name, **environment)
        return list(NAMES[:count])

    def submit(self, **settings: Any) -> str:
        asked = {"max_steps": self.steps, "checkpoint_every_steps": max(20, self.steps // 10)} | settings
        job_id = h.submit(self.dataset, **asked)
        self.recorder.jobs.add((h.OWNER, job_id))
        return job_id

    def holder(self, job: Any) -> str:
        """The name of the worker that runs it."""
        pid = int(job.worker.rpartition("/")[2])
        return next(name for name, process in self.house.workers.items() if process.pid == pid)

    def moment(self) -> int:
        """A step at random, early enough that the job still runs a while."""
        return self.some.randrange(1, max(2, int(self.steps * 0.7)))

    def somewhere(self, job_id: str) -> Any:
        """The job at a random moment of its training."""
        return h.wait_step(job_id, self.moment())

    def judge(
        self, job_id: str, measured: Measured, *, charged: int | None = None, leases: int | None = None
    ) -> Any:
        """Waits for the end and looks for everything that must not be. `charged`: attempts it may have cost;
        `leases`: how many it must have taken."""
        job = h.wait_ended(job_id, self.patience_s)
        if job.status != "succeeded":
            measured.wrong.append(f"{job.status}: {job.message}")
        asked = job.settings["max_steps"]
        reference = self.reference if asked == self.steps else None
        measured.wrong += violations(job, reference, steps=asked)
        measured.wrong += [f"orphan trainer {pid}" for pid in orphans(self.house)]
        if charged is not None and job.attempts > charged:
            measured.wrong.append(f"{job.attempts} attempts were charged: {told(job)}")
        if leases is not None and job.fencing_token != leases:
            measured.wrong.append(f"{job_id} took {job.fencing_token} leases")
        self.hear(measured)
        measured.worst("attempts charged", float(job.attempts))
        return job

    def abandon(self) -> None:
        """After a planted bug: nobody works any more, and no job waits."""
        from jobs.lifecycle import transitions
        from jobs.store import queue

        for name in list(self.house.workers):
            self.house.kill(name)
        for job in queue.active_jobs():
            if not job.ended:
                transitions.ask(job.owner, job.job_id, "cancel")
        self.recorder.forget()

    def hear(self, measured: Measured) -> None:
        """What the recorder saw meanwhile."""
        measured.wrong += self.recorder.found
        self.recorder.found.clear()


def told(job: Any) -> str:
    """What its log says of attempts."""
    from jobs.events import event_log

    events = event_log.read(job.owner, job.job_id)
    return " | ".join(str(e.data["message"]) for e in events if e.data["t"] in ("attempt", "doctor"))


def until(is_so: Callable[[], Any], seconds: float = 60) -> float:
    """Seconds it took."""
    began = time.monotonic()
    while not is_so():
        if time.monotonic() - began > seconds:
            return float("inf")
        time.sleep(0.01)
    return time.monotonic() - began


def all_of(job_ids: Iterable[str], is_so: Callable[[Any], Any], seconds: float = 120) -> dict[str, float]:
    """When each became so, by the monotonic clock."""
    waiting, when = list(job_ids), dict[str, float]()
    end = time.monotonic() + seconds
    while waiting:
        for job_id in list(waiting):
            if is_so(h.job_of(job_id)):
                when[job_id] = time.monotonic()
                waiting.remove(job_id)
        if time.monotonic() > end:
            raise TimeoutError(f"{waiting} never got there")
        time.sleep(0.1)
    return when

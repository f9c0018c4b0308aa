"""What every fault uses: the environment, the run without faults to compare with, and the check of the invariants.

A fault is a function `(scenario, rounds) -> Measured`: it injects the fault into running jobs, up to `rounds` times, and
returns how often it did. `benchmarks/faults.py` compares the figures with their limits.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.faults import environment as env
from tests.faults.invariants import Recorder, orphans, violations

NAMES = ("one", "two", "three", "four", "five", "six")


@dataclass
class Measured:
    figures: dict[str, float] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    rounds: int = 1

    def record_max(self, name: str, value: float) -> None:
        self.figures[name] = max(value, self.figures.get(name, 0.0))


@dataclass
class Scenario:
    """The environment, a dataset, the run without faults, and the recorder that watches all jobs."""

    environment: env.Environment
    dataset: str
    steps: int
    recorder: Recorder
    rng: random.Random
    reference: Any = None
    lease_s: float = 30.0
    at_once: int = 1  # jobs that get a fault at the same time, each with its own worker
    timeout_s: float = 300.0  # for a job to end

    def run_reference(self) -> None:
        self.environment.start_worker("one")
        self.reference = env.wait_ended(self.submit())
        assert self.reference.status == "succeeded", self.reference.message

    def run_workers(self, count: int, **variables: str) -> list[str]:
        """Starts and kills workers until exactly this many run. Returns their names."""
        for name in list(self.environment.workers):
            if name not in NAMES[:count] or self.environment.workers[name].poll() is not None or variables:
                self.environment.kill(name)
        for name in NAMES[:count]:
            if name not in self.environment.workers:
                self.environment.start_worker(name, variables=variables)
        return list(NAMES[:count])

    def submit(self, **settings: Any) -> str:
        chosen = {"max_steps": self.steps, "checkpoint_every_steps": max(20, self.steps // 10)} | settings
        job_id = env.submit(self.dataset, **chosen)
        self.recorder.jobs.add((env.OWNER, job_id))
        return job_id

    def worker_of(self, job: Any) -> str:
        """The name of the worker that runs it."""
        pid = int(job.worker.rpartition("/")[2])
        return next(name for name, process in self.environment.workers.items() if process.pid == pid)

    def random_step(self) -> int:
        """A random step, early enough that the job still runs for a while."""
        return self.rng.randrange(1, max(2, int(self.steps * 0.7)))

    def wait_random_step(self, job_id: str) -> Any:
        """Waits until the job reaches a random step."""
        return env.wait_step(job_id, self.random_step())

    def verify(
        self, job_id: str, measured: Measured, *, charged: int | None = None, leases: int | None = None
    ) -> Any:
        """Waits for the end of the job and checks all invariants. `charged`: the most attempts that may be counted;
        `leases`: the number of leases it must have taken."""
        job = env.wait_ended(job_id, self.timeout_s)
        if job.status != "succeeded":
            measured.violations.append(f"{job.status}: {job.message}")
        steps = job.settings["max_steps"]
        reference = self.reference if steps == self.steps else None
        measured.violations += violations(job, reference, steps=steps)
        measured.violations += [f"orphan trainer {pid}" for pid in orphans(self.environment)]
        if charged is not None and job.attempts > charged:
            measured.violations.append(f"{job.attempts} attempts were charged: {attempt_messages(job)}")
        if leases is not None and job.fencing_token != leases:
            measured.violations.append(f"{job_id} took {job.fencing_token} leases")
        self.collect(measured)
        measured.record_max("attempts charged", float(job.attempts))
        return job

    def abandon(self) -> None:
        """After a planted bug: kills all workers and cancels all jobs."""
        from jobs.lifecycle import transitions
        from jobs.store import queue

        for name in list(self.environment.workers):
            self.environment.kill(name)
        for job in queue.active_jobs():
            if not job.ended:
                transitions.set_desired(job.owner, job.job_id, "cancel")
        self.recorder.clear()

    def collect(self, measured: Measured) -> None:
        """Adds the violations that the recorder has seen since the last call."""
        measured.violations += self.recorder.violations
        self.recorder.violations.clear()


def attempt_messages(job: Any) -> str:
    """The messages about attempts in its log."""
    from jobs.events import event_log

    events = event_log.read(job.owner, job.job_id)
    return " | ".join(str(e.data["message"]) for e in events if e.data["t"] in ("attempt", "doctor"))


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> float:
    """Returns the seconds it took, or infinity after `seconds`."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            return float("inf")
        time.sleep(0.01)
    return time.monotonic() - began


def wait_for_all(
    job_ids: Iterable[str], condition: Callable[[Any], Any], seconds: float = 120
) -> dict[str, float]:
    """The monotonic time at which the condition became true for each job."""
    waiting, when = list(job_ids), dict[str, float]()
    end = time.monotonic() + seconds
    while waiting:
        for job_id in list(waiting):
            if condition(env.job_of(job_id)):
                when[job_id] = time.monotonic()
                waiting.remove(job_id)
        if time.monotonic() > end:
            raise TimeoutError(f"the condition was never true for {waiting}")
        time.sleep(0.1)
    return when

"""Actions of users and messages of the queue: cancelled in every state, paused, delivered ten times, fair share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tests.faults import environment as env
from tests.faults.scenario import Measured, Scenario, wait_for_all

LONG = 100_000  # steps, so that the job does not finish by itself

# The states in which a trainer runs or is about to start. tests/faults/cancels.py covers the others, without processes.
RUNNING: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "preparing": ({"max_steps": LONG}, lambda job: job.status == "running"),
    "training": ({"max_steps": LONG}, lambda job: (job.progress or {}).get("step", 0) >= 5),
    "checkpoint": (
        {"max_steps": LONG, "checkpoint_every_steps": 1},
        lambda job: (job.checkpoint_step or 0) >= 2,
    ),
    "evaluating": (
        {"max_steps": LONG, "validation_fraction": 0.5, "eval_every": 1},
        lambda job: (job.progress or {}).get("step", 0) >= 3,
    ),
    # The row shows the first step only when the trainer has finished and waits at the failpoint (see `cancelled`).
    "exporting": ({"max_steps": 20}, lambda job: (job.progress or {}).get("step", 0) >= 1),
}


def cancelled(scenario: Scenario, rounds: int, state: str) -> Measured:
    """Cancels running jobs: no new step 10 s later, the end within 30 s, and the final state never changes."""
    from jobs.events import event_log
    from jobs.lifecycle import transitions

    measured = Measured(rounds=rounds)
    # A pause between the last step and the end, or a cancellation would rarely happen there.
    pause = {"FAILPOINTS": "trainer done:pause2:every"} if state == "exporting" else {}
    scenario.run_workers(min(rounds, scenario.at_once), **pause)
    settings, is_reached = RUNNING[state]
    for _ in range(0, rounds, scenario.at_once):
        jobs = [scenario.submit(**settings) for _ in scenario.environment.workers]
        cancelled_at: dict[str, float] = {}
        end = time.monotonic() + scenario.timeout_s
        while len(cancelled_at) < len(jobs):
            if time.monotonic() > end:
                raise TimeoutError(f"no job reached {state}")
            for job_id in set(jobs) - cancelled_at.keys():
                if is_reached(env.job_of(job_id)):
                    time.sleep(scenario.rng.uniform(0, 0.3))
                    cancelled_at[job_id] = time.time()
                    transitions.set_desired(env.OWNER, job_id, "cancel")
        ended = wait_for_all(jobs, lambda job: job.ended, 60)
        shift = time.time() - time.monotonic()
        for job_id, since in cancelled_at.items():
            measured.record_max("cancelled s", ended[job_id] + shift - since)
            job = env.job_of(job_id)
            if (job.status, job.attempts) != ("cancelled", 0):
                measured.violations.append(f"{state}: it is {job.status}, {job.attempts} attempts charged")
            events = event_log.read(env.OWNER, job_id)
            if [e.seq for e in events] != list(range(1, len(events) + 1)):
                measured.violations.append(f"{state}: events are not numbered 1 … N")
            steps = [e.data["time"] - since for e in events if e.data["t"] == "metric"]
            measured.record_max("last step after s", max(steps, default=0.0))
    time.sleep(1)  # the recorder keeps watching: final states never change
    scenario.collect(measured)
    if pause:
        scenario.run_workers(0)
    return measured


def paused_and_resumed(scenario: Scenario, rounds: int = 1) -> Measured:
    from jobs.lifecycle import transitions

    measured = Measured()
    scenario.run_workers(1)
    job_id = scenario.submit()
    scenario.wait_random_step(job_id)
    began = time.monotonic()
    transitions.set_desired(env.OWNER, job_id, "pause")
    job = env.wait_until(job_id, lambda job: job.status == "paused" or job.ended)
    measured.figures["paused s"] = time.monotonic() - began
    if job.status == "paused":
        transitions.set_desired(env.OWNER, job_id, "run")
    scenario.verify(job_id, measured, charged=0)
    return measured


def duplicate_messages(scenario: Scenario, rounds: int = 1, times: int = 10) -> Measured:
    """Each wake-up message is sent ten times to two workers: no job runs twice."""
    from jobs.worker import tasks

    measured = Measured(rounds=rounds)
    scenario.run_workers(2)
    jobs = []
    for _ in range(rounds):
        jobs.append(scenario.submit(max_steps=60))
        for _ in range(times):
            tasks.run_next.apply_async()
    for job_id in jobs:
        scenario.verify(job_id, measured, charged=0, leases=1)
    return measured


def fair_share(scenario: Scenario, rounds: int = 1, jobs: int = 100) -> Measured:
    """One user queues a hundred jobs and another user one: the other user's job starts next."""
    from jobs.lifecycle import transitions

    measured = Measured()
    scenario.run_workers(1)
    other = env.OWNER + "-other"
    dataset = env.ready_dataset(other)
    many = [scenario.submit(max_steps=60) for _ in range(jobs)]
    env.wait_until(many[0], lambda job: job.status != "queued")
    one = env.submit(dataset, other, max_steps=60, checkpoint_every_steps=20)
    job = env.wait_until(one, lambda job: job.started_at or job.ended, owner=other)
    first = [
        1 for j in map(env.job_of, many) if j.started_at and job.created_at < j.started_at < job.started_at
    ]
    measured.figures["others before it"] = float(len(first))
    for job_id in many:
        if not env.job_of(job_id).ended:
            transitions.set_desired(env.OWNER, job_id, "cancel")
    wait_for_all(many, lambda job: job.ended)
    if env.wait_ended(one, owner=other).status != "succeeded":
        measured.violations.append("the other user's job did not succeed")
    scenario.collect(measured)
    return measured

"""What people ask for, and what the bell does: cancelled in every state, paused, rung ten times, fair shares."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tests.faults import environment as env
from tests.faults.scenario import Measured, Scenario, all_of

LONG = 100_000  # steps that nobody waits for

# The states in which a trainer runs or is about to. The others are in tests/faults/cancels.py, without processes.
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
    # The row's first step is told when the trainer is long done and its end is being stretched (see below).
    "exporting": ({"max_steps": 20}, lambda job: (job.progress or {}).get("step", 0) >= 1),
}


def cancelled(scenario: Scenario, rounds: int, state: str) -> Measured:
    """Cancelled while it runs: no new step 10 s later, the end within 30 s, and the end never changes."""
    from jobs.events import event_log
    from jobs.lifecycle import transitions

    measured = Measured(rounds=rounds)
    # The time between the last step and the end is stretched, or a cancel would seldom meet it.
    pause = {"FAILPOINTS": "trainer done:pause2:every"} if state == "exporting" else {}
    scenario.only(min(rounds, scenario.at_once), **pause)
    settings, is_there = RUNNING[state]
    for _ in range(0, rounds, scenario.at_once):
        jobs = [scenario.submit(**settings) for _ in scenario.environment.workers]
        asked: dict[str, float] = {}
        end = time.monotonic() + scenario.patience_s
        while len(asked) < len(jobs):
            if time.monotonic() > end:
                raise TimeoutError(f"no job got to {state}")
            for job_id in set(jobs) - asked.keys():
                if is_there(env.job_of(job_id)):
                    time.sleep(scenario.some.uniform(0, 0.3))
                    asked[job_id] = time.time()
                    transitions.set_desired(env.OWNER, job_id, "cancel")
        ended = all_of(jobs, lambda job: job.ended, 60)
        shift = time.time() - time.monotonic()
        for job_id, since in asked.items():
            measured.worst("cancelled s", ended[job_id] + shift - since)
            job = env.job_of(job_id)
            if (job.status, job.attempts) != ("cancelled", 0):
                measured.wrong.append(f"{state}: it is {job.status}, {job.attempts} attempts charged")
            told = event_log.read(env.OWNER, job_id)
            if [e.seq for e in told] != list(range(1, len(told) + 1)):
                measured.wrong.append(f"{state}: events are not numbered 1 … N")
            steps = [e.data["time"] - since for e in told if e.data["t"] == "metric"]
            measured.worst("last step after s", max(steps, default=0.0))
    time.sleep(1)  # the recorder goes on looking: ends never change
    scenario.hear(measured)
    if pause:
        scenario.only(0)
    return measured


def paused_and_resumed(scenario: Scenario, rounds: int = 1) -> Measured:
    from jobs.lifecycle import transitions

    measured = Measured()
    scenario.only(1)
    job_id = scenario.submit()
    scenario.somewhere(job_id)
    began = time.monotonic()
    transitions.set_desired(env.OWNER, job_id, "pause")
    job = env.wait_until(job_id, lambda job: job.status == "paused" or job.ended)
    measured.figures["paused s"] = time.monotonic() - began
    if job.status == "paused":
        transitions.set_desired(env.OWNER, job_id, "run")
    scenario.judge(job_id, measured, charged=0)
    return measured


def bells_doubled(scenario: Scenario, rounds: int = 1, times: int = 10) -> Measured:
    """Each doorbell rings ten times for two workers: nobody runs anything twice."""
    from jobs.worker import tasks

    measured = Measured(rounds=rounds)
    scenario.only(2)
    jobs = []
    for _ in range(rounds):
        jobs.append(scenario.submit(max_steps=60))
        for _ in range(times):
            tasks.run_next.apply_async()
    for job_id in jobs:
        scenario.judge(job_id, measured, charged=0, leases=1)
    return measured


def fair_share(scenario: Scenario, rounds: int = 1, jobs: int = 100) -> Measured:
    """One person queues a hundred jobs and another one: the other's is the next that starts."""
    from jobs.lifecycle import transitions

    measured = Measured()
    scenario.only(1)
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
    all_of(many, lambda job: job.ended)
    if env.wait_ended(one, owner=other).status != "succeeded":
        measured.wrong.append("the other's job did not succeed")
    scenario.hear(measured)
    return measured

"""Faults of processes: killed, terminated, frozen, with a wrong clock, or killed at a failpoint."""

from __future__ import annotations

import os
import signal
import time
from functools import partial

from tests.faults import environment as env
from tests.faults.scenario import NAMES, Measured, Scenario, wait_for, wait_for_all


def worker_killed(scenario: Scenario, rounds: int = 1) -> Measured:
    """SIGKILL of a worker: its trainer dies with it, and another attempt continues from the checkpoint."""
    return _killed(scenario, rounds, whole_worker=True)


def trainer_killed(scenario: Scenario, rounds: int = 1) -> Measured:
    """SIGKILL of a trainer: its worker detects it and starts another one."""
    return _killed(scenario, rounds, whole_worker=False)


def _killed(scenario: Scenario, rounds: int, *, whole_worker: bool) -> Measured:
    measured = Measured(rounds=min(rounds, scenario.at_once))
    scenario.run_workers(measured.rounds)
    steps = {scenario.submit(): scenario.random_step() for _ in range(measured.rounds)}
    began: dict[str, float] = {}
    end = time.monotonic() + scenario.timeout_s
    while len(began) < measured.rounds:
        if time.monotonic() > end:
            raise TimeoutError("the jobs make no progress")
        for job_id in steps.keys() - began.keys():
            job = env.job_of(job_id)
            if job.status != "running" or (job.progress or {}).get("step", 0) < steps[job_id]:
                continue
            name = scenario.worker_of(job)
            trainers = env.trainers_of(scenario.environment.workers[name].pid)
            began[job_id] = time.monotonic()
            if whole_worker:
                scenario.environment.kill(name)
                measured.record_max("trainer dead s", wait_for(partial(_none_alive, trainers), 10))
                scenario.environment.start_worker(name)
            else:
                os.kill(trainers[0], signal.SIGKILL)
                seen = wait_for_all([job_id], lambda job: job.status != "running" or job.fencing_token >= 2)
                measured.record_max("detected s", seen[job_id] - began[job_id])
        time.sleep(0.05)
    again = wait_for_all(began, lambda job: (job.fencing_token >= 2 and job.status == "running") or job.ended)
    measured.record_max("new attempt s", max(again[job_id] - began[job_id] for job_id in began))
    for job_id in began:
        scenario.verify(job_id, measured, charged=1)
    return measured


def _none_alive(pids: list[int]) -> bool:
    return not any(map(env.is_alive, pids))


def worker_terminated(scenario: Scenario, rounds: int = 1) -> Measured:
    """SIGTERM, two thirds of the times within 2 s of the worker's start (before it is ready), otherwise while it trains. It
    exits in time, the job is queued again or done, no attempt is charged, and no trainer is left."""
    measured = Measured(rounds=rounds)
    scenario.run_workers(0)
    job_id = scenario.submit()
    for number in range(rounds):
        if env.job_of(job_id).ended:
            scenario.verify(job_id, measured, charged=0)
            job_id = scenario.submit()
        process = scenario.environment.start_worker("one")
        early = rounds > 1 and number % 3 != 2
        if early:
            time.sleep(scenario.rng.uniform(0, 2.0))
        else:
            env.wait_until(job_id, lambda job: job.status != "queued")
            time.sleep(scenario.rng.uniform(0, 4.0))
        began = time.monotonic()
        scenario.environment.kill("one", signal.SIGTERM)
        measured.record_max("out s", time.monotonic() - began)
        if wait_for(lambda: not env.all_trainers(), 1) == float("inf"):
            measured.violations.append(
                f"number {number}: trainers of {process.pid} still run: {env.all_trainers()}"
            )
        job = env.job_of(job_id)
        if job.status not in ("queued", "succeeded") or job.attempts:
            measured.violations.append(
                f"number {number}: the job is {job.status}, {job.attempts} attempts charged"
            )
    scenario.run_workers(1)
    scenario.verify(job_id, measured, charged=0)
    return measured


def terminated_slowly(scenario: Scenario, rounds: int = 1) -> Measured:
    """SIGTERM of a worker whose trainer hangs, while another worker waits for the lease to expire: the lease is kept until
    the trainer has used up its grace period and was killed, and no attempt is charged."""
    measured = Measured()
    scenario.run_workers(2)
    job_id = scenario.submit()
    name = scenario.worker_of(env.wait_step(job_id, scenario.random_step() // 2))
    for pid in env.trainers_of(scenario.environment.workers[name].pid):
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    scenario.environment.kill(name, signal.SIGTERM)
    measured.record_max("out s", time.monotonic() - began)
    scenario.verify(job_id, measured, charged=0)
    return measured


def worker_frozen(scenario: Scenario, rounds: int = 1) -> Measured:
    """SIGSTOP for longer than the lease while other workers take over; then the stale workers resume, and all their writes
    are rejected."""
    measured = Measured(rounds=min(rounds, scenario.at_once, len(NAMES) // 2))
    names = scenario.run_workers(measured.rounds)
    jobs = {scenario.submit(): scenario.random_step() // 2 for _ in names}
    frozen: dict[str, str] = {}
    for job_id, step in sorted(jobs.items(), key=lambda entry: entry[1]):
        frozen[job_id] = scenario.worker_of(env.wait_step(job_id, step))
        scenario.environment.workers[frozen[job_id]].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    trainers = [pid for name in names for pid in env.trainers_of(scenario.environment.workers[name].pid)]
    others = NAMES[len(names) : 2 * len(names)]
    for name in others:
        scenario.environment.start_worker(name)
    wait_for_all(
        jobs,
        lambda job: (job.fencing_token >= 2 and job.status == "running") or job.ended,
        scenario.lease_s + 90,
    )
    time.sleep(max(0.0, 2 * scenario.lease_s - (time.monotonic() - began)))
    old = {job_id: _written_by_first_lease(job_id) for job_id in jobs}
    for name in names:
        scenario.environment.workers[name].send_signal(signal.SIGCONT)
    measured.record_max("stale worker's trainer killed s", wait_for(partial(_none_alive, trainers), 30))
    for job_id in jobs:
        scenario.verify(job_id, measured, charged=1)
        if _written_by_first_lease(job_id) != old[job_id]:
            measured.violations.append("a write with the old fencing token was accepted")
    for name in others:
        scenario.environment.kill(name)
    return measured


def _written_by_first_lease(job_id: str) -> list[object]:
    """What the first lease owner has written."""
    from jobs.store.tables import EventChunk, rows

    job = env.job_of(job_id)
    return [
        (chunk.first_seq, chunk.last_seq, chunk.lease_owner)
        for chunk in rows(EventChunk, job_id)
        if chunk.fencing_token == 1 and chunk.first_seq <= job.last_seq
    ]


def clocks_differ(scenario: Scenario, rounds: int = 1) -> Measured:
    """Workers with clocks two hours ahead, two hours behind and correct: each runs a job for longer than a lease while the
    reconcilers of the others run. No lease is lost and no job runs twice."""
    measured = Measured()
    scenario.run_workers(1)
    for name, shift_s in (("ahead", 7200), ("behind", -7200)):
        scenario.environment.start_worker(name, shift_s=shift_s)
    jobs = [scenario.submit() for _ in range(3)]
    workers = {
        scenario.worker_of(env.wait_until(job_id, lambda job: job.status == "running")) for job_id in jobs
    }
    measured.record_max("workers with a job", len(workers))
    began = time.monotonic()
    for job_id in jobs:
        scenario.verify(job_id, measured, charged=0, leases=1)
    measured.figures["ran s"] = time.monotonic() - began
    for name in ("ahead", "behind"):
        scenario.environment.kill(name)
    return measured


def failpoint(scenario: Scenario, place: str) -> Measured:
    """A worker dies exactly at this failpoint."""
    measured = Measured()
    scenario.run_workers(0)
    worker = scenario.environment.start_worker("failing", variables={"FAILPOINTS": f"{place}:kill9"})
    job_id = scenario.submit()
    if wait_for(lambda: worker.poll() is not None, 60) == float("inf"):
        measured.violations.append(f"no process reached {place!r}")
    scenario.environment.workers.pop("failing", None)
    worker.kill()
    scenario.run_workers(1)
    scenario.verify(job_id, measured)
    return measured


FAILPOINTS = (
    "claimed",
    "trainer started",
    "chunk stored",
    "checkpoint stored",
    "trainer done",
    "model stored",
)

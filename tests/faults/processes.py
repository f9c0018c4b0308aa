"""Faults of processes: killed, asked to stop, frozen, with a clock of their own, or dead at a certain place."""

from __future__ import annotations

import os
import signal
import time

from tests.faults import environment as env
from tests.faults.scenario import NAMES, Measured, Scenario, all_of, until


def worker_killed(scenario: Scenario, rounds: int = 1) -> Measured:
    """SIGKILL of a worker: its trainer dies with it, another attempt goes on from the checkpoint."""
    return _killed(scenario, rounds, whole_worker=True)


def trainer_killed(scenario: Scenario, rounds: int = 1) -> Measured:
    """SIGKILL of a trainer: its worker sees it, and starts another."""
    return _killed(scenario, rounds, whole_worker=False)


def _killed(scenario: Scenario, rounds: int, *, whole_worker: bool) -> Measured:
    measured = Measured(rounds=min(rounds, scenario.at_once))
    scenario.only(measured.rounds)
    steps = {scenario.submit(): scenario.moment() for _ in range(measured.rounds)}
    began: dict[str, float] = {}
    end = time.monotonic() + scenario.patience_s
    while len(began) < measured.rounds:
        if time.monotonic() > end:
            raise TimeoutError("the jobs do not get on")
        for job_id in steps.keys() - began.keys():
            job = env.job_of(job_id)
            if job.status != "running" or (job.progress or {}).get("step", 0) < steps[job_id]:
                continue
            name = scenario.worker_of(job)
            trainers = env.trainers_of(scenario.environment.workers[name].pid)
            began[job_id] = time.monotonic()
            if whole_worker:
                scenario.environment.kill(name)
                measured.worst(
                    "trainer dead s", until(lambda pids=trainers: not any(map(env.is_alive, pids)), 10)
                )
                scenario.environment.start_worker(name)
            else:
                os.kill(trainers[0], signal.SIGKILL)
                seen = all_of([job_id], lambda job: job.status != "running" or job.fencing_token >= 2)
                measured.worst("detected s", seen[job_id] - began[job_id])
        time.sleep(0.05)
    again = all_of(began, lambda job: (job.fencing_token >= 2 and job.status == "running") or job.ended)
    measured.worst("new attempt s", max(again[job_id] - began[job_id] for job_id in began))
    for job_id in began:
        scenario.judge(job_id, measured, charged=1)
    return measured


def worker_terminated(scenario: Scenario, rounds: int = 1) -> Measured:
    """SIGTERM, two thirds of the times within 2 s of the worker's start (before it can know what to do), the others
    while it trains. It is out in time, the job is back in the queue or done, nothing is charged, nobody is left."""
    measured = Measured(rounds=rounds)
    scenario.only(0)
    job_id = scenario.submit()
    for number in range(rounds):
        if env.job_of(job_id).ended:
            scenario.judge(job_id, measured, charged=0)
            job_id = scenario.submit()
        process = scenario.environment.start_worker("one")
        early = rounds > 1 and number % 3 != 2
        if early:
            time.sleep(scenario.some.uniform(0, 2.0))
        else:
            env.wait_until(job_id, lambda job: job.status != "queued")
            time.sleep(scenario.some.uniform(0, 4.0))
        began = time.monotonic()
        scenario.environment.kill("one", signal.SIGTERM)
        measured.worst("out s", time.monotonic() - began)
        if until(lambda: not env.all_trainers(), 1) == float("inf"):
            measured.wrong.append(
                f"number {number}: trainers of {process.pid} are left: {env.all_trainers()}"
            )
        job = env.job_of(job_id)
        if job.status not in ("queued", "succeeded") or job.attempts:
            measured.wrong.append(
                f"number {number}: the job is {job.status}, {job.attempts} attempts charged"
            )
    scenario.only(1)
    scenario.judge(job_id, measured, charged=0)
    return measured


def terminated_slowly(scenario: Scenario, rounds: int = 1) -> Measured:
    """SIGTERM of a worker whose trainer hangs, while another worker waits for its lease to run out: the lease is kept
    until the trainer was given its time and killed, and nothing is charged."""
    measured = Measured()
    scenario.only(2)
    job_id = scenario.submit()
    name = scenario.worker_of(env.wait_step(job_id, scenario.moment() // 2))
    for pid in env.trainers_of(scenario.environment.workers[name].pid):
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    scenario.environment.kill(name, signal.SIGTERM)
    measured.worst("out s", time.monotonic() - began)
    scenario.judge(job_id, measured, charged=0)
    return measured


def worker_frozen(scenario: Scenario, rounds: int = 1) -> Measured:
    """SIGSTOP for longer than the lease while others take over; then they wake up as zombies, whose writes nobody takes."""
    measured = Measured(rounds=min(rounds, scenario.at_once, len(NAMES) // 2))
    names = scenario.only(measured.rounds)
    jobs = {scenario.submit(): scenario.moment() // 2 for _ in names}
    frozen: dict[str, str] = {}
    for job_id, step in sorted(jobs.items(), key=lambda entry: entry[1]):
        frozen[job_id] = scenario.worker_of(env.wait_step(job_id, step))
        scenario.environment.workers[frozen[job_id]].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    trainers = [pid for name in names for pid in env.trainers_of(scenario.environment.workers[name].pid)]
    others = NAMES[len(names) : 2 * len(names)]
    for name in others:
        scenario.environment.start_worker(name)
    all_of(
        jobs,
        lambda job: (job.fencing_token >= 2 and job.status == "running") or job.ended,
        scenario.lease_s + 90,
    )
    time.sleep(max(0.0, 2 * scenario.lease_s - (time.monotonic() - began)))
    old = {job_id: _written_by_first_lease(job_id) for job_id in jobs}
    for name in names:
        scenario.environment.workers[name].send_signal(signal.SIGCONT)
    measured.worst("zombie's trainer gone s", until(lambda: not any(map(env.is_alive, trainers)), 30))
    for job_id in jobs:
        scenario.judge(job_id, measured, charged=1)
        if _written_by_first_lease(job_id) != old[job_id]:
            measured.wrong.append("a write with the old fencing token was accepted")
    for name in others:
        scenario.environment.kill(name)
    return measured


def _written_by_first_lease(job_id: str) -> list[object]:
    """What the first holder has written."""
    from jobs.store.tables import EventChunk, rows

    job = env.job_of(job_id)
    return [
        (chunk.first_seq, chunk.last_seq, chunk.lease_owner)
        for chunk in rows(EventChunk, job_id)
        if chunk.fencing_token == 1 and chunk.first_seq <= job.last_seq
    ]


def clocks_differ(scenario: Scenario, rounds: int = 1) -> Measured:
    """A worker two hours ahead, one two hours behind, one right: each runs a job for longer than a lease beside the
    others' reconcilers. No lease is lost and nobody runs what another runs."""
    measured = Measured()
    scenario.only(1)
    for name, shift_s in (("ahead", 7200), ("behind", -7200)):
        scenario.environment.start_worker(name, shift_s=shift_s)
    jobs = [scenario.submit() for _ in range(3)]
    holders = {
        scenario.worker_of(env.wait_until(job_id, lambda job: job.status == "running")) for job_id in jobs
    }
    measured.worst("workers with a job", len(holders))
    began = time.monotonic()
    for job_id in jobs:
        scenario.judge(job_id, measured, charged=0, leases=1)
    measured.figures["ran s"] = time.monotonic() - began
    for name in ("ahead", "behind"):
        scenario.environment.kill(name)
    return measured


def failpoint(scenario: Scenario, place: str) -> Measured:
    """A worker dies exactly there."""
    measured = Measured()
    scenario.only(0)
    doomed = scenario.environment.start_worker("doomed", FAILPOINTS=f"{place}:kill9")
    job_id = scenario.submit()
    if until(lambda: doomed.poll() is not None, 60) == float("inf"):
        measured.wrong.append(f"nothing passed {place!r}")
    scenario.environment.workers.pop("doomed", None)
    doomed.kill()
    scenario.only(1)
    scenario.judge(job_id, measured)
    return measured


FAILPOINTS = (
    "claimed",
    "trainer started",
    "chunk stored",
    "checkpoint stored",
    "trainer done",
    "model stored",
)

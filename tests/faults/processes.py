"""Faults of processes: killed, asked to stop, frozen, with a clock of their own, or dead at a certain place."""

from __future__ import annotations

import os
import signal
import time

from tests.faults import house as h
from tests.faults.stage import NAMES, Measured, Stage, all_of, until


def worker_killed(stage: Stage, rounds: int = 1) -> Measured:
    """SIGKILL of a worker: its trainer dies with it, another attempt goes on from the checkpoint."""
    return _killed(stage, rounds, whole_worker=True)


def trainer_killed(stage: Stage, rounds: int = 1) -> Measured:
    """SIGKILL of a trainer: its worker sees it, and starts another."""
    return _killed(stage, rounds, whole_worker=False)


def _killed(stage: Stage, rounds: int, *, whole_worker: bool) -> Measured:
    measured = Measured(rounds=min(rounds, stage.at_once))
    stage.only(measured.rounds)
    steps = {stage.submit(): stage.moment() for _ in range(measured.rounds)}
    began: dict[str, float] = {}
    end = time.monotonic() + stage.patience_s
    while len(began) < measured.rounds:
        if time.monotonic() > end:
            raise TimeoutError("the jobs do not get on")
        for job_id in steps.keys() - began.keys():
            job = h.job_of(job_id)
            if job.status != "running" or (job.progress or {}).get("step", 0) < steps[job_id]:
                continue
            name = stage.lease_owner(job)
            trainers = h.trainers_of(stage.house.workers[name].pid)
            began[job_id] = time.monotonic()
            if whole_worker:
                stage.house.kill(name)
                measured.worst(
                    "trainer dead s", until(lambda pids=trainers: not any(map(h.is_alive, pids)), 10)
                )
                stage.house.start_worker(name)
            else:
                os.kill(trainers[0], signal.SIGKILL)
                seen = all_of([job_id], lambda job: job.status != "running" or job.fencing_token >= 2)
                measured.worst("detected s", seen[job_id] - began[job_id])
        time.sleep(0.05)
    again = all_of(began, lambda job: (job.fencing_token >= 2 and job.status == "running") or job.ended)
    measured.worst("new attempt s", max(again[job_id] - began[job_id] for job_id in began))
    for job_id in began:
        stage.judge(job_id, measured, charged=1)
    return measured


def worker_terminated(stage: Stage, rounds: int = 1) -> Measured:
    """SIGTERM, two thirds of the times within 2 s of the worker's start (before it can know what to do), the others
    while it trains. It is out in time, the job is back in the queue or done, nothing is charged, nobody is left."""
    measured = Measured(rounds=rounds)
    stage.only(0)
    job_id = stage.submit()
    for number in range(rounds):
        if h.job_of(job_id).ended:
            stage.judge(job_id, measured, charged=0)
            job_id = stage.submit()
        process = stage.house.start_worker("one")
        early = rounds > 1 and number % 3 != 2
        if early:
            time.sleep(stage.some.uniform(0, 2.0))
        else:
            h.wait_until(job_id, lambda job: job.status != "queued")
            time.sleep(stage.some.uniform(0, 4.0))
        began = time.monotonic()
        stage.house.kill("one", signal.SIGTERM)
        measured.worst("out s", time.monotonic() - began)
        if until(lambda: not h.all_trainers(), 1) == float("inf"):
            measured.wrong.append(f"number {number}: trainers of {process.pid} are left: {h.all_trainers()}")
        job = h.job_of(job_id)
        if job.status not in ("queued", "succeeded") or job.attempts:
            measured.wrong.append(
                f"number {number}: the job is {job.status}, {job.attempts} attempts charged"
            )
    stage.only(1)
    stage.judge(job_id, measured, charged=0)
    return measured


def terminated_slowly(stage: Stage, rounds: int = 1) -> Measured:
    """SIGTERM of a worker whose trainer hangs, while another worker waits for its lease to run out: the lease is kept
    until the trainer was given its time and killed, and nothing is charged."""
    measured = Measured()
    stage.only(2)
    job_id = stage.submit()
    name = stage.lease_owner(h.wait_step(job_id, stage.moment() // 2))
    for pid in h.trainers_of(stage.house.workers[name].pid):
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    stage.house.kill(name, signal.SIGTERM)
    measured.worst("out s", time.monotonic() - began)
    stage.judge(job_id, measured, charged=0)
    return measured


def worker_frozen(stage: Stage, rounds: int = 1) -> Measured:
    """SIGSTOP for longer than the lease while others take over; then they wake up as zombies, whose writes nobody takes."""
    measured = Measured(rounds=min(rounds, stage.at_once, len(NAMES) // 2))
    names = stage.only(measured.rounds)
    jobs = {stage.submit(): stage.moment() // 2 for _ in names}
    frozen: dict[str, str] = {}
    for job_id, step in sorted(jobs.items(), key=lambda entry: entry[1]):
        frozen[job_id] = stage.lease_owner(h.wait_step(job_id, step))
        stage.house.workers[frozen[job_id]].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    trainers = [pid for name in names for pid in h.trainers_of(stage.house.workers[name].pid)]
    others = NAMES[len(names) : 2 * len(names)]
    for name in others:
        stage.house.start_worker(name)
    all_of(
        jobs,
        lambda job: (job.fencing_token >= 2 and job.status == "running") or job.ended,
        stage.lease_s + 90,
    )
    time.sleep(max(0.0, 2 * stage.lease_s - (time.monotonic() - began)))
    old = {job_id: _of_epoch_1(job_id) for job_id in jobs}
    for name in names:
        stage.house.workers[name].send_signal(signal.SIGCONT)
    measured.worst("zombie's trainer gone s", until(lambda: not any(map(h.is_alive, trainers)), 30))
    for job_id in jobs:
        stage.judge(job_id, measured, charged=1)
        if _of_epoch_1(job_id) != old[job_id]:
            measured.wrong.append("a write of the old epoch was accepted")
    for name in others:
        stage.house.kill(name)
    return measured


def _of_epoch_1(job_id: str) -> list[object]:
    """What the first holder has written."""
    from jobs.store.tables import EventChunk, rows

    job = h.job_of(job_id)
    return [
        (chunk.first_seq, chunk.last_seq, chunk.lease_owner)
        for chunk in rows(EventChunk, job_id)
        if chunk.fencing_token == 1 and chunk.first_seq <= job.last_seq
    ]


def clocks_differ(stage: Stage, rounds: int = 1) -> Measured:
    """A worker two hours ahead, one two hours behind, one right: each runs a job for longer than a lease beside the
    others' reconcilers. No lease is lost and nobody runs what another runs."""
    measured = Measured()
    stage.only(1)
    for name, shift_s in (("ahead", 7200), ("behind", -7200)):
        stage.house.start_worker(name, shift_s=shift_s)
    jobs = [stage.submit() for _ in range(3)]
    holders = {
        stage.lease_owner(h.wait_until(job_id, lambda job: job.status == "running")) for job_id in jobs
    }
    measured.worst("workers with a job", len(holders))
    began = time.monotonic()
    for job_id in jobs:
        stage.judge(job_id, measured, charged=0, leases=1)
    measured.figures["ran s"] = time.monotonic() - began
    for name in ("ahead", "behind"):
        stage.house.kill(name)
    return measured


def failpoint(stage: Stage, place: str) -> Measured:
    """A worker dies exactly there."""
    measured = Measured()
    stage.only(0)
    doomed = stage.house.start_worker("doomed", FAILPOINTS=f"{place}:kill9")
    job_id = stage.submit()
    if until(lambda: doomed.poll() is not None, 60) == float("inf"):
        measured.wrong.append(f"nothing passed {place!r}")
    stage.house.workers.pop("doomed", None)
    doomed.kill()
    stage.only(1)
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

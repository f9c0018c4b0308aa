"""Faults of stores: Redis, DynamoDB and S3 killed, away, slow, failing or cut off."""

from __future__ import annotations

import json
import time

from tests.faults import house as h
from tests.faults.proxy import Chaos
from tests.faults.stage import Measured, Stage, until


def redis_killed(stage: Stage, rounds: int = 1) -> Measured:
    """A job runs and another is submitted while Redis is away; all succeed. The one that waited starts soon after."""
    measured = Measured(rounds=rounds)
    stage.only(1)
    jobs = [stage.submit()]
    for _ in range(rounds):
        stage.somewhere(jobs[-1])
        stage.house.redis.kill()
        began = time.monotonic()
        jobs.append(stage.submit())
        measured.worst("submit s", time.monotonic() - began)
        time.sleep(stage.some.choice([0, 1, 2, 4]))
        stage.house.redis.start()
        h.wait_ended(jobs[-2])
        began = time.monotonic()
        h.wait_until(jobs[-1], lambda job: job.status != "queued")
        measured.worst("claimed s", time.monotonic() - began)
    for job_id in jobs:
        stage.judge(job_id, measured, charged=0)
    return measured


def dynamodb_killed(stage: Stage, rounds: int = 1, down_s: float = 10) -> Measured:
    """The record itself is away: the same trainer goes on, and what it said arrives afterwards."""
    measured = Measured(rounds=rounds)
    stage.only(1)
    job_id = stage.submit()
    for number in range(rounds):
        if h.job_of(job_id).ended or number == 0:
            job_id = stage.submit() if number else job_id
            h.wait_step(job_id, stage.moment() // 2)
        time.sleep(stage.some.uniform(0, 1))
        stage.house.dynamodb.kill()
        time.sleep(down_s if number == 0 else stage.some.uniform(0.5, down_s))
        stage.house.dynamodb.start()
        job = h.job_of(job_id)
        h.wait_until(job_id, lambda now, seen=job: now.version > seen.version or now.ended)
        if h.job_of(job_id).ended or number == rounds - 1:
            stage.judge(job_id, measured, charged=0, leases=1)
    return measured


def dynamodb_away(stage: Stage, rounds: int = 1, down_s: float = 120) -> Measured:
    """Away for two minutes: training goes on meanwhile, and its events arrive afterwards."""
    from jobs.events import event_log

    measured = Measured()
    stage.only(1)
    job_id = stage.submit(max_steps=100_000, checkpoint_every_steps=20_000)
    h.wait_step(job_id, 20)
    stage.house.dynamodb.kill()
    began = time.time()
    time.sleep(down_s)
    ended = time.time()
    stage.house.dynamodb.start()
    # until what happened after the return is stored, and so all before it
    newest = lambda job: next(event_log.backwards(job_id, int(job.last_seq))).data["time"]  # noqa: E731
    began_again = time.monotonic()
    h.wait_until(job_id, lambda job: newest(job) > ended)
    measured.figures["caught up s"] = time.monotonic() - began_again
    told = event_log.read(h.OWNER, job_id)
    meanwhile = [e for e in told if e.data["t"] == "metric" and began + 5 < e.data["time"] < ended - 5]
    measured.figures["steps meanwhile"] = float(len(meanwhile))
    if len({int(e.data["time"] - began) // 10 for e in meanwhile}) < (down_s - 15) // 10:
        measured.wrong.append(f"training stood still: {len(meanwhile)} steps in {down_s} s")
    _cancel(stage, job_id, measured)
    return measured


def _cancel(stage: Stage, job_id: str, measured: Measured) -> None:
    from jobs.events import event_log
    from jobs.lifecycle import transitions

    transitions.ask(h.OWNER, job_id, "cancel")
    job = h.wait_ended(job_id, 60)
    if (job.status, job.fencing_token, job.attempts) != ("cancelled", 1, 0):
        measured.wrong.append(f"it is {job.status}, took {job.fencing_token} leases, {job.attempts} attempts")
    numbers = [event.seq for event in event_log.read(h.OWNER, job_id)]
    if numbers != list(range(1, len(numbers) + 1)):
        measured.wrong.append("events are not numbered 1 … N")
    stage.hear(measured)


def replies_lost(stage: Stage, rounds: int = 1, chance: float = 0.1) -> Measured:
    """DynamoDB takes writes and its answers are lost on the way: nothing is done twice."""
    measured = Measured()
    stage.only(0)
    chaos = Chaos(stage.house.dynamodb.port)
    name = "behind the proxy"
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
    return measured


def checkpoint_damaged(stage: Stage, rounds: int = 1) -> Measured:
    """A bit flips in the stored checkpoint that the pointer names: the one before it is used, and the end is the same."""
    from jobs.store import blobs

    measured = Measured()
    stage.only(1)
    job_id = stage.submit()
    job = h.wait_until(job_id, lambda job: len(job.checkpoints or []) >= 2 or job.ended)
    name = stage.lease_owner(job)
    stage.house.kill(name)
    job = h.job_of(job_id)
    path = blobs.local_path(f"{job.checkpoint_key}/weights.safetensors")
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    stage.house.start_worker(name)
    stage.judge(job_id, measured)
    told = json.dumps(job.checkpoints)
    measured.figures["checkpoints known"] = told.count('"key"')
    return measured


# ---- S3: only in a house whose objects are there ---------------------------------------------------------------------

S3_FAULTS = (
    "latency 0.3",
    "rate 50000",
    "status 500 0.5",
    "status 503 0.5",
    "status 503 1",
    "reset",
    "drop 0.3",
)


def s3_faulty(stage: Stage, fault: str) -> Measured:
    """S3 fails while checkpoints and the final model are being uploaded, then it returns: no pointer ever names bytes
    that are not there whole, training goes on, and the job succeeds."""
    measured = Measured()
    assert stage.house.s3_proxy
    stage.only(1)
    job_id = stage.submit(checkpoint_every_steps=max(20, stage.steps // 20))
    h.wait_step(job_id, stage.moment() // 3)
    stage.house.s3_proxy.order(fault)
    began = time.monotonic()
    until(lambda: h.job_of(job_id).phase == "exporting" or h.job_of(job_id).ended, 120)
    time.sleep(10)  # the final model is being uploaded, as far as it goes
    stage.house.s3_proxy.order("pass")
    measured.figures["faulty s"] = time.monotonic() - began
    stage.judge(job_id, measured, charged=1)
    return measured

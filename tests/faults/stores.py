"""Faults of stores: Redis, DynamoDB and S3 killed, down, slow, failing or disconnected."""

from __future__ import annotations

import json
import time

from tests.faults import environment as env
from tests.faults.proxy import Chaos
from tests.faults.scenario import Measured, Scenario, wait_for


def redis_killed(scenario: Scenario, rounds: int = 1) -> Measured:
    """A job runs and another is submitted while Redis is down; both succeed. The waiting one starts soon afterwards."""
    measured = Measured(rounds=rounds)
    scenario.run_workers(1)
    jobs = [scenario.submit()]
    for _ in range(rounds):
        scenario.wait_random_step(jobs[-1])
        scenario.environment.redis.kill()
        began = time.monotonic()
        jobs.append(scenario.submit())
        measured.record_max("submit s", time.monotonic() - began)
        time.sleep(scenario.rng.choice([0, 1, 2, 4]))
        scenario.environment.redis.start()
        env.wait_ended(jobs[-2])
        began = time.monotonic()
        env.wait_until(jobs[-1], lambda job: job.status != "queued")
        measured.record_max("claimed s", time.monotonic() - began)
    for job_id in jobs:
        scenario.verify(job_id, measured, charged=0)
    return measured


def dynamodb_killed(scenario: Scenario, rounds: int = 1, down_s: float = 10) -> Measured:
    """DynamoDB is down: the same trainer continues, and its events are stored afterwards."""
    measured = Measured(rounds=rounds)
    scenario.run_workers(1)
    job_id = scenario.submit()
    for number in range(rounds):
        if env.job_of(job_id).ended or number == 0:
            job_id = scenario.submit() if number else job_id
            env.wait_step(job_id, scenario.random_step() // 2)
        time.sleep(scenario.rng.uniform(0, 1))
        scenario.environment.dynamodb.kill()
        time.sleep(down_s if number == 0 else scenario.rng.uniform(0.5, down_s))
        scenario.environment.dynamodb.start()
        job = env.job_of(job_id)
        env.wait_until(job_id, lambda now, seen=job: now.version > seen.version or now.ended)
        if env.job_of(job_id).ended or number == rounds - 1:
            scenario.verify(job_id, measured, charged=0, leases=1)
    return measured


def dynamodb_away(scenario: Scenario, rounds: int = 1, down_s: float = 120) -> Measured:
    """Down for two minutes: training continues, and its events are stored afterwards."""
    from jobs.events import event_log

    measured = Measured()
    scenario.run_workers(1)
    job_id = scenario.submit(max_steps=100_000, checkpoint_every_steps=20_000)
    env.wait_step(job_id, 20)
    scenario.environment.dynamodb.kill()
    began = time.time()
    time.sleep(down_s)
    ended = time.time()
    scenario.environment.dynamodb.start()
    # wait until an event from after the restart is stored, and therefore all earlier ones
    newest = lambda job: next(event_log.backwards(job_id, int(job.last_seq))).data["time"]  # noqa: E731
    began_again = time.monotonic()
    env.wait_until(job_id, lambda job: newest(job) > ended)
    measured.figures["caught up s"] = time.monotonic() - began_again
    events = event_log.read(env.OWNER, job_id)
    meanwhile = [e for e in events if e.data["t"] == "metric" and began + 5 < e.data["time"] < ended - 5]
    measured.figures["steps meanwhile"] = float(len(meanwhile))
    if len({int(e.data["time"] - began) // 10 for e in meanwhile}) < (down_s - 15) // 10:
        measured.violations.append(f"training did not continue: {len(meanwhile)} steps in {down_s} s")
    _cancel(scenario, job_id, measured)
    return measured


def _cancel(scenario: Scenario, job_id: str, measured: Measured) -> None:
    from jobs.events import event_log
    from jobs.lifecycle import transitions

    transitions.set_desired(env.OWNER, job_id, "cancel")
    job = env.wait_ended(job_id, 60)
    if (job.status, job.fencing_token, job.attempts) != ("cancelled", 1, 0):
        measured.violations.append(
            f"it is {job.status}, took {job.fencing_token} leases, {job.attempts} attempts"
        )
    numbers = [event.seq for event in event_log.read(env.OWNER, job_id)]
    if numbers != list(range(1, len(numbers) + 1)):
        measured.violations.append("events are not numbered 1 … N")
    scenario.collect(measured)


def replies_lost(scenario: Scenario, rounds: int = 1, chance: float = 0.1) -> Measured:
    """DynamoDB applies writes but its responses are lost: nothing is done twice."""
    measured = Measured()
    scenario.run_workers(0)
    chaos = Chaos(scenario.environment.dynamodb.port)
    name = "behind the proxy"
    try:
        wait_for(lambda: env.services._responds_to_http(chaos.port), 10)
        scenario.environment.start_worker(
            name, variables={"DYNAMODB_ENDPOINT": f"http://127.0.0.1:{chaos.port}"}
        )
        chaos.order(f"drop {chance}")
        job_id = scenario.submit()
        env.wait_ended(job_id)
        chaos.order("pass")
        scenario.verify(job_id, measured)
    finally:
        scenario.environment.kill(name)
        chaos.stop()
    return measured


def checkpoint_damaged(scenario: Scenario, rounds: int = 1) -> Measured:
    """A bit flips in the newest stored checkpoint: the one before it is used, and the final weights are the same."""
    from jobs.store import blobs

    measured = Measured()
    scenario.run_workers(1)
    job_id = scenario.submit()
    job = env.wait_until(job_id, lambda job: len(job.checkpoints or []) >= 2 or job.ended)
    name = scenario.worker_of(job)
    scenario.environment.kill(name)
    job = env.job_of(job_id)
    path = blobs.local_path(f"{job.checkpoint_key}/weights.safetensors")
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    scenario.environment.start_worker(name)
    scenario.verify(job_id, measured)
    measured.figures["checkpoints known"] = json.dumps(job.checkpoints).count('"key"')
    return measured


# ---- S3: only in an environment that stores objects there -----------------------------------------------------------------

S3_FAULTS = (
    "latency 0.3",
    "rate 50000",
    "status 500 0.5",
    "status 503 0.5",
    "status 503 1",
    "reset",
    "drop 0.3",
)


def s3_faulty(scenario: Scenario, fault: str) -> Measured:
    """S3 fails while checkpoints and the final model are uploaded, then it recovers: no row ever names an incomplete
    checkpoint, training continues, and the job succeeds."""
    measured = Measured()
    assert scenario.environment.s3_proxy
    scenario.run_workers(1)
    job_id = scenario.submit(checkpoint_every_steps=max(20, scenario.steps // 20))
    env.wait_step(job_id, scenario.random_step() // 3)
    scenario.environment.s3_proxy.order(fault)
    began = time.monotonic()
    wait_for(lambda: env.job_of(job_id).phase == "exporting" or env.job_of(job_id).ended, 120)
    time.sleep(10)  # the upload of the final model is attempted
    scenario.environment.s3_proxy.order("pass")
    measured.figures["faulty s"] = time.monotonic() - began
    scenario.verify(job_id, measured, charged=1)
    return measured

"""Concurrent calls: a job is claimed once, a key creates one job, the quota holds. More jobs run with `bin/test --all`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from jobs.lifecycle import transitions
from jobs.lifecycle.transitions import OverQuota, WorkerInfo
from jobs.store import queue, quotas, tables
from jobs.store.tables import Job, JobIndex
from tests.jobs.makers import make_owner, make_request, read

pytestmark = pytest.mark.usefixtures("stores")
THREADS = 8
ROUNDS = [25, pytest.param(250, marks=pytest.mark.campaign)]


@pytest.fixture
def pool():
    with ThreadPoolExecutor(THREADS) as executor:
        yield executor


@pytest.mark.parametrize("rounds", ROUNDS)
def test_each_job_is_claimed_once(pool, rounds):
    owner = make_owner()
    jobs = [Job(owner, tables.new_id("ftjob"), status="queued") for _ in range(rounds)]
    for job in jobs:
        tables.put_new(job)
    barrier = Barrier(THREADS)

    def race(number):
        worker = WorkerInfo(f"w{number}", f"p{number}")
        won = []
        for job in jobs:
            barrier.wait()
            won.append(transitions.claim(job, worker) is not None)
        return won

    winners = [sum(round) for round in zip(*pool.map(race, range(THREADS)), strict=True)]
    assert winners == [1] * rounds
    assert {read(job).fencing_token for job in jobs} == {1}


def test_concurrent_submissions_respect_the_quota(pool, settings):
    settings.JOBS = settings.JOBS | {"max_jobs_per_owner": 5}
    owner = make_owner()
    request = make_request(owner)

    def submit(number):
        try:
            return transitions.submit(owner, request, idempotency_key=f"k{number}").job_id
        except OverQuota:
            return None

    accepted = {job_id for job_id in pool.map(submit, range(20)) if job_id}
    assert len(accepted) == 5
    assert quotas.held(owner, "jobs") == accepted
    assert {row.job_id for row in queue.index_rows() if row.owner == owner} == accepted


def test_concurrent_submissions_with_one_key_create_one_job(pool):
    owner = make_owner()
    request = make_request(owner)
    jobs = pool.map(lambda _: transitions.submit(owner, request, idempotency_key="k").job_id, range(30))
    assert len(set(jobs)) == 1
    assert len([row for row in queue.index_rows() if row.owner == owner]) == 1
    assert tables.get(JobIndex, queue.shard(read_one(owner)), read_one(owner)) is not None


def read_one(owner):
    (job,) = tables.rows(Job, owner)
    return job.job_id

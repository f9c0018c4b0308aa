"""The order of the queue, and which jobs fit a worker."""

from __future__ import annotations

import pytest

from jobs.lifecycle import transitions
from jobs.store import queue
from jobs.store.queue import WorkerInfo
from jobs.store.tables import Job
from tests.jobs.makers import make_job, read


def job(owner, number, status="queued", **fields):
    return Job(owner, f"ftjob-{number:03}", status=status, **fields)


def order(*jobs):
    return [f"{j.owner}{int(j.job_id[6:])}" for j in queue.in_order(jobs)]


def test_the_oldest_is_next():
    assert order(job("a", 2), job("a", 1), job("a", 3)) == ["a1", "a2", "a3"]


def test_an_owner_with_a_hundred_jobs_waits_for_an_owner_with_one():
    many = [job("a", n) for n in range(100)]
    assert order(*many, job("b", 500))[:3] == ["a0", "b500", "a1"]
    assert order(job("a", 999, "running"), *many, job("b", 500))[:3] == ["b500", "a0", "a1"]


def test_a_single_worker_alternates_between_owners():
    waiting = [*(job("a", n) for n in range(3)), job("b", 500), job("c", 501)]
    ordered = queue.in_order(waiting, {"a": 2, "b": 1})
    assert [j.owner for j in ordered][:3] == ["c", "b", "a"]


def test_a_worker_remembers_which_owner_it_served_last(monkeypatch):
    monkeypatch.setattr(queue, "_served", {})
    monkeypatch.setattr(queue, "MAX_SERVED", 2)
    for owner in ("a", "b", "a", "c"):
        queue.record_served(owner)
    assert queue.served() == {"a": 3, "c": 4}


def test_priority_comes_first():
    assert order(job("a", 1), job("b", 2), job("a", 3, priority=1))[0] == "a3"


def test_paused_and_cancelled_jobs_are_not_queued():
    assert order(job("a", 1, "paused"), job("a", 2, desired="cancel"), job("a", 3)) == ["a3"]


def test_a_worker_takes_only_jobs_that_fit():
    small, large = WorkerInfo("w", "p", memory=8), WorkerInfo("w", "p", memory=64, gpu=True)
    hungry, gpu = job("a", 1, needs={"memory": 16}), job("a", 1, needs={"gpu": True})
    assert not queue.fits(hungry, small)
    assert queue.fits(hungry, large)
    assert not queue.fits(gpu, small)
    assert queue.fits(gpu, large)
    assert queue.fits(job("a", 1), small)


@pytest.mark.usefixtures("stores")
def test_a_queued_job_has_a_position():
    first = make_job()
    second = make_job(first.owner)
    positions = [queue.position(read(j)) for j in (first, second)]
    assert positions[0] < positions[1]
    transitions.set_desired(first.owner, first.job_id, "cancel")
    assert queue.position(read(first)) is None

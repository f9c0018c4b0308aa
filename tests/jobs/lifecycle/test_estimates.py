"""Estimates are corrected by finished jobs on the same kind of machine."""

from __future__ import annotations

import pytest

from jobs.lifecycle import estimates
from jobs.store import queue, tables
from jobs.store.tables import Dataset, EstimateRecord, Job
from tests.jobs.makers import make_job, read
from training.data.summary import Summary
from training.plan.auto_settings import resolve
from training.plan.catalog import starter
from training.plan.config import Settings

SUMMARY = {"examples": 480, "tokens": 20_000, "trained_tokens": 8_000, "longest": 60, "kind": "completion"}

pytestmark = pytest.mark.usefixtures("stores")


@pytest.fixture(autouse=True)
def no_records() -> None:
    for record in EstimateRecord.query(estimates.kind_of(estimates.machine())):
        record.delete()
    estimates.forget()


# Each phase's share of a job's time. The rest is export.
SHARES = {"preparing": 0.1, "rehearsing": 0.1, "training": 0.6, "evaluating": 0.1}


def make_finished_job(seconds: float, **fields: object) -> Job:
    """A job that took this long."""
    job = make_job()
    dataset = tables.get(Dataset, job.owner, job.dataset_id)
    assert dataset is not None
    dataset.update([Dataset.summary.set(SUMMARY)])
    job = read(job)
    job.status, job.started_at, job.ended_at = "succeeded", 1000.0, 1000.0 + seconds
    job.progress = {"spent": {phase: share * seconds for phase, share in SHARES.items()}}
    job.metrics = {"memory": 700_000_000}
    for name, value in fields.items():
        setattr(job, name, value)
    return job


def predicted_seconds() -> float:
    counted = Summary.from_dict(SUMMARY)
    settings, _ = resolve(Settings(), counted, starter(), estimates.machine())
    estimate = estimates.estimate(starter(), settings, counted, estimates.machine())
    return estimate.seconds_p50 - estimate.parts["queue"]


def test_three_finished_jobs_correct_the_next_estimate() -> None:
    before = predicted_seconds()
    for _ in range(3):
        estimates.record(make_finished_job(4 * before))
    assert predicted_seconds() == pytest.approx(4 * before, rel=0.02)


def test_recording_a_job_twice_counts_it_once() -> None:
    job = make_finished_job(100)
    estimates.record(job)
    estimates.record(job)
    assert [r["job_id"] for r in estimates.records(estimates.machine())] == [job.job_id]


@pytest.mark.parametrize(
    "fields",
    [
        {"status": "failed"},
        {"attempts": 1},
        {"fencing_token": 2},
        {"started_at": None},
        {"base": "somebody/else", "base_snapshot": None},
    ],
)
def test_only_uninterrupted_runs_are_recorded(fields: dict[str, object]) -> None:
    estimates.record(make_finished_job(100, **fields))
    assert estimates.records(estimates.machine()) == []


def test_the_owner_has_the_same_record() -> None:
    job = make_finished_job(100)
    estimates.record(job)
    (record,) = estimates.records(job.owner)
    assert (record["job_id"], record["actual"], record["peak"]) == (job.job_id, 100, 700_000_000)
    assert sum(record["took"].values()) == pytest.approx(100)
    machines = estimates.records(estimates.machine())[0]
    assert record == machines | {"name": "orders"}
    assert not {"name", "owner"} & set(machines), "what staff see about all jobs identifies no user"


def test_the_queue_time_follows_recent_jobs() -> None:
    for row in queue.index_rows():
        row.delete()
    assert estimates.queue_seconds() == 0
    make_job(dataset_status="ready")
    assert estimates.queue_seconds() == 60, "the default without records of earlier jobs"
    for seconds in (100, 200, 300):
        estimates.record(make_finished_job(seconds))
    estimates.forget()
    assert estimates.queue_seconds() == 4 * 200, "the finished ones are still in the list"

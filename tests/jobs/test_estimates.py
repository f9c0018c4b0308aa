"""Estimates learn from finished jobs, on the kind of machine that ran them."""

from __future__ import annotations

import pytest

from jobs import estimates, tables
from jobs.tables import Dataset, EstimateRecord, Job
from tests.jobs.makers import make_job, read
from training.auto import resolve
from training.catalog import starter
from training.config import Settings
from training.report import Summary

SUMMARY = {"examples": 480, "tokens": 20_000, "trained_tokens": 8_000, "longest": 60, "kind": "completion"}

pytestmark = pytest.mark.usefixtures("stores")


@pytest.fixture(autouse=True)
def nothing_learned() -> None:
    for record in EstimateRecord.query(estimates.kind_of(estimates.machine())):
        record.delete()
    estimates._cache.clear()


def finished(seconds: float, **fields: object) -> Job:
    """A job of Alice's that took so long."""
    job = make_job()
    dataset = tables.get(Dataset, job.owner, job.dataset_id)
    assert dataset is not None
    dataset.update([Dataset.summary.set(SUMMARY)])
    job = read(job)
    job.status, job.started_at, job.ended_at = "succeeded", 1000.0, 1000.0 + seconds
    for name, value in fields.items():
        setattr(job, name, value)
    return job


def predicted() -> float:
    counted = Summary.from_dict(SUMMARY)
    settings, _ = resolve(Settings(), counted, starter(), estimates.machine())
    return estimates.estimate(starter(), settings, counted, estimates.machine()).seconds_p50


def test_three_finished_jobs_correct_the_next_estimate() -> None:
    before = predicted()
    for _ in range(3):
        estimates.record(finished(4 * before))
    assert predicted() == pytest.approx(4 * before)


def test_recording_a_job_twice_counts_it_once() -> None:
    job = finished(100)
    estimates.record(job)
    estimates.record(job)
    assert [r["job_id"] for r in estimates.records(estimates.machine())] == [job.job_id]


@pytest.mark.parametrize(
    "fields", [{"status": "failed"}, {"attempts": 1}, {"started_at": None}, {"base": "somebody/else"}]
)
def test_only_whole_runs_teach(fields: dict[str, object]) -> None:
    estimates.record(finished(100, **fields))
    assert estimates.records(estimates.machine()) == []

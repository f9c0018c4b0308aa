"""The moves of a job that no worker holds. They are made by the reconciler, or when the dataset it waits for is ready."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.dispatch import receiver

from jobs.datasets import reports
from jobs.datasets.signals import dataset_settled
from jobs.lifecycle import moves, submission
from jobs.store import queue, tables
from jobs.store.states import DatasetStatus, JobStatus, ReportStatus
from jobs.store.tables import Dataset, Job
from training.data.summary import PREFERENCES


def lose_lease(job: Job) -> Job | None:
    """running → retrying, or failed after too many attempts. The caller must have seen this lease unchanged for 30 s."""
    status = moves.landing("lost", job)
    actions = moves.leaving("lost", job, status, "lost_worker", "", "")
    return moves.announced(moves.move(job, actions, moves.as_seen(job) & (Job.lease == job.lease)))


def settle(job: Job) -> Job | None:
    """Moves a job that no worker holds to the status that `desired` asks for. This is needed if the write that set `desired`
    was based on an older state."""
    status = moves.desired_status(job, job.desired)
    if job.ended or job.status == JobStatus.RUNNING or status == job.status:
        return None
    return moves.announced(moves.move(job, moves.entering(job, status), moves.as_seen(job)))


def requeue(job: Job) -> Job | None:
    """retrying → queued. The caller must have waited for `backoff_s`."""
    return moves.announced(
        moves.move(job, moves.entering(job, JobStatus.QUEUED), moves.as_seen(job) & (Job.desired == "run"))
    )


def backoff_s(job: Job) -> float:
    """Seconds to wait before the next attempt: 0 the first time, then 10 s · 2ⁿ up to 10 min. Progress resets the count."""
    tries = job.attempts_without_progress + job.platform_faults
    if tries <= 1:
        return 0.0
    return float(min(settings.JOBS["backoff_first_s"] * 2 ** (tries - 2), settings.JOBS["backoff_max_s"]))


def validate(job: Job) -> Job | None:
    """validating → queued once its datasets are ready and were read with the tokenizer of its base; → failed if one was
    rejected or deleted, or contradicts the task."""
    for dataset_id in filter(None, (job.dataset_id, job.validation_dataset_id)):
        dataset = tables.get(Dataset, job.owner, dataset_id)
        if dataset is None or dataset.deleted:
            return _fail_unchecked(job, "dataset_deleted", "")
        if dataset.status == DatasetStatus.REJECTED:
            return _fail_unchecked(job, "dataset_rejected", dataset.error)
        if dataset.status != DatasetStatus.READY:
            return None
        if submission.holds_preferences(dataset):
            return _fail_unchecked(job, "dataset_unsupported", PREFERENCES)
        if dataset_id != job.dataset_id:
            continue
        if refusal := submission.task_refusal(job.settings, dataset):
            return _fail_unchecked(job, "bad_settings", refusal)
        if refusal := reports.refusal_for(dataset, job.base_snapshot or {"id": job.base}):
            return _fail_unchecked(job, "dataset_rejected", refusal)
        report = reports.for_job(job, dataset)
        if report is not None and report.status == ReportStatus.CHECKING:
            return None
        if report is not None and report.status == ReportStatus.REFUSED:
            return _fail_unchecked(job, "dataset_rejected", report.error)
        if refusal := reports.cut_answers(
            dataset, job.base_snapshot or {"id": job.base}, submission.settings_of(job)
        ):
            return _fail_unchecked(job, "no_trained_token", refusal)
    return moves.announced(moves.move(job, moves.entering(job, JobStatus.QUEUED), moves.as_seen(job)))


@receiver(dataset_settled)
def validate_waiting(owner: str, dataset_id: str, **kwargs: Any) -> None:
    """Validates the jobs that wait for this dataset."""
    for job in queue.active_of(owner):
        if job.status == JobStatus.VALIDATING and dataset_id in (job.dataset_id, job.validation_dataset_id):
            validate(job)


def _fail_unchecked(job: Job, reason: str, message: str) -> Job | None:
    actions = moves.leaving("failed", job, JobStatus.FAILED, reason, message, "")
    return moves.announced(moves.move(job, actions, moves.as_seen(job)))

"""The warnings about a job before it starts: shown by the form, and returned by `/v1` with the created job."""

from __future__ import annotations

from jobs.datasets import reports
from jobs.lifecycle import estimates
from jobs.lifecycle.submission import schema_of
from jobs.registry import base_models
from jobs.store import tables
from jobs.store.states import DatasetStatus
from jobs.store.tables import Dataset, Job
from training.data.summary import Summary
from training.plan.auto_settings import resolve
from training.plan.config import parse
from training.plan.warnings import Planned, Warning, warnings


def for_plan(dataset: Dataset | None, planned: Planned | None) -> list[Warning]:
    """`planned` is None while the dataset's counts or the base model are unknown."""
    pending = []
    if dataset and dataset.unchecked:
        pending.append(
            Warning(
                "This dataset is still being checked",
                "You can start now: the job waits for the check, and fails if the file is rejected.",
            )
        )
    return pending + (warnings(planned) if planned else [])


def for_job(job: Job) -> list[Warning]:
    """The warnings that the form would show for the settings of this job."""
    dataset = tables.get(Dataset, job.owner, job.dataset_id)
    return for_plan(dataset, _plan(job, dataset))


def _plan(job: Job, dataset: Dataset | None) -> Planned | None:
    base = base_models.of_job(job)
    if dataset is None or base is None:
        return None
    summary = Summary.from_dict(reports.summary_for(dataset, job.base_snapshot or {"id": job.base})[0])
    if not summary.examples:
        return None
    machine = estimates.machine()
    settings, _ = resolve(parse(job.settings or {}, schema_of(job)), summary, base, machine)
    validation = (
        tables.get(Dataset, job.owner, job.validation_dataset_id) if job.validation_dataset_id else None
    )
    leaks = None
    if validation and dataset.status == validation.status == DatasetStatus.READY:
        leaks = reports.request_leaks(dataset, validation)  # None until they are counted
    leaked = int((leaks or {}).get("count") or 0)
    return Planned(settings, base, machine, summary, rows_of(validation), leaked)


def rows_of(validation: Dataset | None) -> int:
    """The rows of a validation dataset, at least 1; 0 if there is none."""
    if validation is None:
        return 0
    counts = validation.summary or {}
    return int(counts.get("rows") or counts.get("examples") or 1)

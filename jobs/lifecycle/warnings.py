"""The warnings about a job before it starts: shown by the form, and returned by `/v1` with the created job."""

from __future__ import annotations

from jobs.datasets import reports
from jobs.lifecycle import estimates
from jobs.registry import base_models
from jobs.store import tables
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
    settings, _ = resolve(parse(job.settings or {}), summary, base, machine)
    return Planned(settings, base, machine, summary)

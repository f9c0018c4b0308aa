"""A job's result file: its metrics as CSV, generated from its events on request, so that nothing is stored twice."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

from jobs.api import paging
from jobs.api.errors import not_found
from jobs.events import event_log, history
from jobs.store import access, tables
from jobs.store.states import JobStatus

PURPOSE = "fine-tune-results"
Json = dict[str, Any]
_ID = re.compile(r"file-results-([0-9A-HJKMNP-TV-Z]{26})")
COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


def id_for(job_id: str) -> str:
    return "file-results-" + job_id.removeprefix("ftjob-")


def is_result(file_id: str) -> bool:
    return file_id.startswith("file-results-")


def content(owner: str, file_id: str) -> str:
    job = _job(owner, file_id)
    job_history = history.JobHistory.from_events(event_log.read(owner, job.job_id))
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(COLUMNS)
    for step in sorted(job_history.metrics.keys() | job_history.evals.keys()):
        metric, held_out = job_history.metrics.get(step, {}), job_history.evals.get(step, {})
        values = [row.get(name) for row in (metric, held_out) for name in ("loss", "accuracy")]
        table.writerow([step, *map(_cell, values)])
    return out.getvalue()


def _cell(value: Any) -> str:
    return "" if value is None else repr(float(value))


def describe(owner: str, file_id: str) -> Json:
    job = _job(owner, file_id)
    return show(job, len(content(owner, file_id)))


def list_files(owner: str, limit: int, after: str | None) -> tuple[list[Json], bool]:
    cursor = None
    if after is not None:
        match = _ID.fullmatch(after)
        cursor = f"ftjob-{match[1]}" if match else after
        paging.check_after(tables.Job, owner, cursor)
    jobs = access.list_jobs(owner, min(limit, 100), cursor, status=JobStatus.SUCCEEDED)
    return [show(job, len(content(owner, id_for(job.job_id)))) for job in jobs], jobs.has_more


def show(job: Any, size: int) -> Json:
    return {
        "id": id_for(job.job_id),
        "object": "file",
        "bytes": size,
        "created_at": int(job.ended_at or job.created_at),
        "filename": "step_metrics.csv",
        "purpose": PURPOSE,
        "status": "processed",
    }


def _job(owner: str, file_id: str) -> Any:
    match = _ID.fullmatch(file_id)
    try:
        if match is None:
            raise access.NotFound
        job = access.get_job_for(owner, f"ftjob-{match[1]}")
    except access.NotFound as error:
        raise not_found("File object") from error
    if job.status != JobStatus.SUCCEEDED:
        raise not_found("File object")
    return job

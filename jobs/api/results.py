"""The result file of a job: a CSV of its curve, made from its events whenever it is read, so nothing is stored twice."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

from jobs.api import paging
from jobs.api.errors import not_found
from jobs.events import event_log, history
from jobs.store import access, tables

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
    told = history.JobHistory.from_events(event_log.read(owner, job.job_id))
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(COLUMNS)
    for step in sorted(told.metrics.keys() | told.evals.keys()):
        metric, held_out = told.metrics.get(step, {}), told.evals.get(step, {})
        table.writerow(
            [
                step,
                *(
                    _cell(row.get(name))
                    for row, name in (
                        (metric, "loss"),
                        (metric, "accuracy"),
                        (held_out, "loss"),
                        (held_out, "accuracy"),
                    )
                ),
            ]
        )
    return out.getvalue()


def _cell(value: Any) -> str:
    return "" if value is None else repr(float(value))


def describe(owner: str, file_id: str) -> Json:
    job = _job(owner, file_id)
    return show(job, len(content(owner, file_id)))


def list_files(owner: str, limit: int, after: str | None) -> tuple[list[Json], bool]:
    cursor = None
    if after is not None:
        found = _ID.fullmatch(after)
        cursor = f"ftjob-{found[1]}" if found else after
        paging.check_after(tables.Job, owner, cursor)
    jobs = access.list_jobs(owner, min(limit, 100), cursor, status="succeeded")
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


def _has_results(job: Any) -> bool:
    return bool(job.status == "succeeded")


def _job(owner: str, file_id: str) -> Any:
    found = _ID.fullmatch(file_id)
    try:
        if found is None:
            raise access.NotFound
        job = access.get_job_for(owner, f"ftjob-{found[1]}")
    except access.NotFound as missing:
        raise not_found("File object") from missing
    if not _has_results(job):
        raise not_found("File object")
    return job

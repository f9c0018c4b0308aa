"""Estimates of duration and memory, corrected by how long finished jobs took on the same kind of machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from django.conf import settings

from jobs.datasets import reports
from jobs.lifecycle.submission import schema_of
from jobs.registry import base_models
from jobs.store import queue, tables
from jobs.store.end_steps import step
from jobs.store.states import JobStatus
from jobs.store.tables import Dataset, EstimateRecord, Job, Worker
from training.data.summary import Summary
from training.plan.auto_settings import resolve
from training.plan.catalog import BaseModel, Machine, this_machine
from training.plan.config import Settings, current_names, parse, parse_stored
from training.plan.estimate import Estimate, FinishedJob
from training.plan.estimate import estimate as predict

KEPT = 50  # the number of finished jobs that corrections are based on
CACHE_S = (
    30.0  # the form requests an estimate at every keystroke, so reads from the store are cached this long
)
MAX_QUEUE_JOBS = 100  # jobs considered when the time in the queue is estimated
ALIVE_S = 60.0  # a worker that has not updated its row for this long is considered dead

_cache: dict[str, tuple[float, Any]] = {}


def machine() -> Machine:
    """The machine that jobs run on: that of the training worker that was seen last, or this one if there is none."""
    return _machine()


def workers() -> list[Worker]:
    """All training workers that have ever run."""
    return list(_cached("workers", lambda: list(tables.rows(Worker, "training"))))


def _machine(name: str = "") -> Machine:
    """The machine of the worker with this name, or else of the worker that was seen last."""
    for worker in sorted(workers(), key=lambda w: (w.worker_id == name, w.last_seen), reverse=True):
        info = worker.info.get("machine") if isinstance(worker.info, dict) else None
        if isinstance(info, dict):
            return Machine(**{name: info[name] for name in Machine.__dataclass_fields__ if name in info})
    return this_machine()


def estimate(
    base: BaseModel, resolved: Settings, summary: Summary, on: Machine, validation: Summary | None = None
) -> Estimate:
    """An estimate for the form. It is fast: it uses the exact token counts and the times of earlier jobs."""
    return predict(
        base,
        resolved,
        summary,
        on,
        validation=validation,
        past=history(on),
        queue=_cached("queue", queue_seconds),
        price_per_hour=float(settings.JOBS.get("price_per_hour", 0.0)),
    )


def queue_seconds() -> float:
    """Seconds until a worker is free: running jobs report their time left, and waiting ones are assumed to take the median
    time."""
    active = queue.active_jobs(queue.index_rows()[:MAX_QUEUE_JOBS])
    now = time.time()
    alive = sum(now - worker.last_seen < ALIVE_S for worker in workers())
    past = history(machine())
    usual = median(sum(p.took.values()) for p in past) if past else 60.0
    ahead = [
        float((job.progress or {}).get("eta_s") or usual) for job in active if job.status == JobStatus.RUNNING
    ]
    ahead += [
        usual
        for job in active
        if job.status in (JobStatus.QUEUED, JobStatus.RETRYING) and job.desired == "run"
    ]
    if len(ahead) < alive:
        return 0.0
    free = sorted(ahead[: max(1, alive)])
    for seconds in ahead[max(1, alive) :]:  # each job goes to the worker that is free first
        free[0] += seconds
        free.sort()
    return free[0] if free else 0.0


def history(on: Machine) -> list[FinishedJob]:
    """The last finished jobs on this kind of machine: the work they consisted of and how long it took, newest first."""
    return list(_cached(kind_of(on), lambda: _past(records(on))))


def _past(records: list[dict[str, Any]]) -> list[FinishedJob]:
    names = ("work", "took", "memory", "peak", "base")
    return [
        FinishedJob(
            **{name: r[name] for name in names}, adapter=current_names({"method": r["method"]})["adapter"]
        )
        for r in records
        if all(name in r for name in (*names, "method"))
    ]


def records(on: Machine | str) -> list[dict[str, Any]]:
    """The full records of finished jobs, for the page on estimate accuracy. `on` is a kind of machine, or an owner."""
    kind = on if isinstance(on, str) else kind_of(on)
    rows = EstimateRecord.query(kind, scan_index_forward=False, limit=KEPT)
    return [{"job_id": row.job_id, **row.data} for row in rows]


@step(20)
def record(job: Job) -> None:
    """Records how long a finished job took, together with what the jobs before it predicted. Idempotent.

    Only jobs that succeeded in their first attempt are recorded."""
    if job.status != JobStatus.SUCCEEDED or job.deleted or job.attempts or job.fencing_token > 1:
        return
    if not (job.started_at and job.ended_at):
        return
    dataset = tables.get(Dataset, job.owner, job.dataset_id)
    base, on = base_models.of_job(job), _machine(job.worker)
    counted = _counted(dataset, job)
    if base is None or counted is None:
        return
    validation = None
    if job.validation_dataset_id:
        validation = _counted(tables.get(Dataset, job.owner, job.validation_dataset_id), job)
    plan = job.plan if isinstance(job.plan, dict) else {}
    resolved = plan.get("settings")
    requested = parse_stored(resolved) if resolved else parse(job.settings or {}, schema_of(job))
    chosen, _ = resolve(requested, counted, base, on)
    before = [r for r in records(on) if r["job_id"] != job.job_id and r["when"] <= job.created_at]
    predicted = predict(base, chosen, counted, on, validation=validation, past=_past(before))
    actual = job.ended_at - job.started_at
    data = {
        "predicted": predicted.seconds_p50,
        "p90": predicted.seconds_p90,
        "actual": actual,
        "peak_predicted": predicted.memory,
        "peak": int((job.metrics or {}).get("memory") or 0),
        "memory": predicted.memory_parts,
        "work": predicted.work,
        "took": _took(actual, (job.progress or {}).get("spent") or {}),
        "learned": len(before),
        "base": job.base,
        "method": chosen.stored()["method"],
        "tokens": predicted.tokens,
        "when": job.ended_at,
    }
    EstimateRecord(kind=kind_of(on), job_id=job.job_id, data=data).save()  # used for predictions
    EstimateRecord(
        kind=job.owner, job_id=job.job_id, data=data | {"name": job.name}
    ).save()  # shown to its owner
    _cache.pop(kind_of(on), None)


def _counted(dataset: Dataset | None, job: Job) -> Summary | None:
    """The dataset's counts with the tokenizer of the job's base model."""
    base_snapshot = job.base_snapshot or {"id": job.base}
    summary = Summary.from_dict(reports.summary_for(dataset, base_snapshot)[0] if dataset else {})
    return summary if summary.examples else None


def _took(actual: float, spent: dict[str, float]) -> dict[str, float]:
    """The seconds that each part took, from the phases that the trainer reported; empty if it reported none."""
    if not spent.get("training"):
        return {}
    training, evaluation = float(spent["training"]), float(spent.get("evaluating", 0.0))
    start = float(spent.get("preparing", 0.0)) + float(spent.get("rehearsing", 0.0))
    export = actual - start - training - evaluation
    return {"start": start, "training": training, "evaluation": evaluation, "export": max(export, 0.01)}


def kind_of(on: Machine) -> str:
    """The name of this kind of machine. Machines of the same kind share their records."""
    return f"{on.device}:{on.name}:{on.count}"


def forget() -> None:
    """Clears the cache."""
    _cache.clear()


def _cached(name: str, load: Callable[[], Any]) -> Any:
    at, value = _cache.get(name, (0.0, None))
    if time.monotonic() - at > CACHE_S or value is None:
        value = load()
        _cache[name] = (time.monotonic(), value)
    return value

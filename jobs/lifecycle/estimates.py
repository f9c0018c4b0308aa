"""Estimates that learn: what finished jobs took on a kind of machine corrects the next prediction for it."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from django.conf import settings

from jobs.datasets import reports
from jobs.registry import base_models
from jobs.store import queue, tables
from jobs.store.end_steps import step
from jobs.store.tables import Dataset, EstimateRecord, Job, Worker
from training.data.summary import Summary
from training.plan.auto_settings import resolve
from training.plan.catalog import BaseModel, Machine, this_machine
from training.plan.config import Settings, current_names, parse
from training.plan.estimate import Estimate, Past
from training.plan.estimate import estimate as predict

KEPT = 50  # finished jobs that count
REMEMBERED_S = 30.0  # the form asks at every key; the store is asked this seldom
MOST_WAITING = 100  # jobs looked at for the time in the queue
ALIVE_S = 60.0  # a worker not heard of for so long is gone

_cache: dict[str, tuple[float, Any]] = {}


def machine() -> Machine:
    """What jobs run on: the last heard training worker's own account, else this machine."""
    return _machine()


def workers() -> list[Worker]:
    """Of jobs, whoever was ever heard of."""
    return list(_remembered("workers", lambda: list(tables.rows(Worker, "training"))))


def _machine(name: str = "") -> Machine:
    """Of the worker of that name, else of the one heard last."""
    for found in sorted(workers(), key=lambda w: (w.worker_id == name, w.last_seen), reverse=True):
        told = found.info.get("machine") if isinstance(found.info, dict) else None
        if isinstance(told, dict):
            return Machine(**{name: told[name] for name in Machine.__dataclass_fields__ if name in told})
    return this_machine()


def estimate(
    base: BaseModel, resolved: Settings, summary: Summary, on: Machine, validation: Summary | None = None
) -> Estimate:
    """For the form: within a moment, from exact counts and from what jobs took before."""
    return predict(
        base, resolved, summary, on, validation=validation, past=history(on), queue=_remembered("queue", queue_seconds),
        price_per_hour=float(settings.JOBS.get("price_per_hour", 0.0)),
    )  # fmt: skip


def queue_seconds() -> float:
    """Seconds until a worker is free: what runs has told how long it will, what waits takes as long as jobs mostly do."""
    active = queue.active_jobs(queue.index_rows()[:MOST_WAITING])
    now = time.time()
    alive = sum(now - worker.last_seen < ALIVE_S for worker in workers())
    past = history(machine())
    usual = median(sum(p.took.values()) for p in past) if past else 60.0
    ahead = [float((job.progress or {}).get("eta_s") or usual) for job in active if job.status == "running"]
    ahead += [usual for job in active if job.status in ("queued", "retrying") and job.desired == "run"]
    if len(ahead) < alive:
        return 0.0
    free = sorted(ahead[: max(1, alive)])
    for seconds in ahead[max(1, alive) :]:  # each goes to whoever is free first
        free[0] += seconds
        free.sort()
    return free[0] if free else 0.0


def history(on: Machine) -> list[Past]:
    """What the last jobs on such a machine consisted of and took, the newest first."""
    return _remembered(kind_of(on), lambda: _past(records(on)))


def _past(found: list[dict[str, Any]]) -> list[Past]:
    names = ("work", "took", "memory", "peak", "base")
    return [
        Past(**{name: r[name] for name in names}, adapter=current_names({"method": r["method"]})["adapter"])
        for r in found
        if all(name in r for name in (*names, "method"))
    ]


def records(on: Machine | str) -> list[dict[str, Any]]:
    """The same with everything that was kept of them, for the page that shows how estimates did; `on` is a kind of
    machine, or an owner."""
    kind = on if isinstance(on, str) else kind_of(on)
    found = EstimateRecord.query(kind, scan_index_forward=False, limit=KEPT)
    return [{"job_id": record.job_id, **record.data} for record in found]


@step(20)
def record(job: Job) -> None:
    """Keep what a finished job took beside what the jobs before it made of it. Repeating it changes nothing.

    Only whole runs teach: ended well, and not tried twice."""
    if job.status != "succeeded" or job.deleted or job.attempts or job.fencing_token > 1:
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
    chosen, _ = resolve(parse(plan.get("settings") or job.settings or {}), counted, base, on)
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
    EstimateRecord(kind=kind_of(on), job_id=job.job_id, data=data).save()  # what the machine learns from
    EstimateRecord(kind=job.owner, job_id=job.job_id, data=data | {"name": job.name}).save()  # for its owner
    _cache.pop(kind_of(on), None)


def _counted(dataset: Dataset | None, job: Job) -> Summary | None:
    """With the tokenizer of the job's base."""
    facts = job.base_snapshot or {"id": job.base}
    found = Summary.from_dict(reports.summary_for(dataset, facts)[0] if dataset else {})
    return found if found.examples else None


def _took(actual: float, spent: dict[str, float]) -> dict[str, float]:
    """Seconds of each part, by the phases the trainer told of; nothing where it told of none."""
    if not spent.get("training"):
        return {}
    training, evaluation = float(spent["training"]), float(spent.get("evaluating", 0.0))
    start = float(spent.get("preparing", 0.0)) + float(spent.get("rehearsing", 0.0))
    export = actual - start - training - evaluation
    return {"start": start, "training": training, "evaluation": evaluation, "export": max(export, 0.01)}


def kind_of(on: Machine) -> str:
    """Machines with the same name learn from each other."""
    return f"{on.device}:{on.name}:{on.count}"


def forget() -> None:
    """Ask the store again."""
    _cache.clear()


def _remembered(name: str, ask: Any) -> Any:
    at, value = _cache.get(name, (0.0, None))
    if time.monotonic() - at > REMEMBERED_S or value is None:
        value = ask()
        _cache[name] = (time.monotonic(), value)
    return value

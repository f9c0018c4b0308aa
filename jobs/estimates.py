"""Estimates that learn: what finished jobs took on a kind of machine corrects the next prediction for it."""

from __future__ import annotations

import time
from typing import Any

from django.conf import settings

from jobs import bases, reports, tables
from jobs.tables import Dataset, EstimateRecord, Job, Worker
from training.auto import resolve
from training.catalog import BaseModel, Machine, this_machine
from training.config import Settings, parse
from training.estimate import Estimate, Past
from training.estimate import estimate as predict
from training.report import Summary

KEPT = 50  # finished jobs that count
REMEMBERED_S = 30.0  # the form asks at every key; the store is asked this seldom

_cache: dict[str, tuple[float, Any]] = {}


def machine() -> Machine:
    """What jobs run on: the last heard training worker's own account, else this machine."""
    return _remembered("machine", _machine)


def _machine() -> Machine:
    workers = sorted(Worker.query("training"), key=lambda w: -w.heard_at)
    for worker in workers:
        told = worker.info.get("machine") if isinstance(worker.info, dict) else None
        if isinstance(told, dict):
            return Machine(**{name: told[name] for name in Machine.__dataclass_fields__ if name in told})
    return this_machine()


def estimate(base: BaseModel, resolved: Settings, summary: Summary, on: Machine) -> Estimate:
    """For the form: within a moment, from exact counts and from what jobs took before."""
    price = float(settings.JOBS.get("price_per_hour", 0.0))
    return predict(base, resolved, summary, on, past=history(on), price_per_hour=price)


def history(on: Machine) -> list[Past]:
    """Predicted and actual seconds of the last jobs on such a machine, the newest first."""
    return _remembered(kind_of(on), lambda: [Past(r["predicted"], r["actual"]) for r in records(on)])


def records(on: Machine) -> list[dict[str, Any]]:
    """The same with everything that was kept of them, for the page that shows how estimates did."""
    found = EstimateRecord.query(kind_of(on), scan_index_forward=False, limit=KEPT)
    return [{"job_id": record.job_id, **record.data} for record in found]


def record(job: Job) -> None:
    """Keep what a finished job took beside what would have been predicted for it. Repeating it changes nothing.

    Only whole runs teach: ended well, and not tried twice."""
    dataset = tables.get(Dataset, job.owner, job.dataset_id)
    facts = job.base_facts or {"id": job.base}
    counted = Summary.from_dict(reports.summary_for(dataset, facts)[0] if dataset else {})
    base, on = bases.of_job(job), machine()
    if job.status != "succeeded" or job.attempts or base is None:
        return
    if not (job.started_at and job.ended_at and counted.examples):
        return
    plan = job.plan.get("settings") if isinstance(job.plan, dict) else None
    chosen, _ = resolve(parse(plan or job.settings or {}), counted, base, on)
    predicted = predict(base, chosen, counted, on)
    EstimateRecord(
        kind=kind_of(on),
        job_id=job.job_id,
        data={
            "predicted": predicted.seconds_p50,
            "actual": job.ended_at - job.started_at,
            "memory": predicted.memory,
            "base": job.base,
            "method": chosen.method,
            "tokens": predicted.tokens,
            "when": job.ended_at,
        },
    ).save()
    _cache.pop(kind_of(on), None)


def kind_of(on: Machine) -> str:
    """Machines with the same name learn from each other."""
    return f"{on.device}:{on.name}:{on.count}"


def _remembered(name: str, ask: Any) -> Any:
    at, value = _cache.get(name, (0.0, None))
    if time.monotonic() - at > REMEMBERED_S or value is None:
        value = ask()
        _cache[name] = (time.monotonic(), value)
    return value

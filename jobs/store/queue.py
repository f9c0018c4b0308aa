"""Who is next: by priority, then fair share between owners, then age, among the jobs that fit the worker.

Fair share: an owner's jobs get places counted from how many of theirs already run, so whoever has none running comes
before the second job of somebody else, however many that one has queued. Between owners in the same place, a worker
takes the one it served longest ago: with a single worker nobody runs at the moment it looks for its next job.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jobs.store import tables
from jobs.store.tables import Job, JobIndex

KNOWN = 1000  # owners that a worker remembers
SHARDS = 4  # of the list of active jobs: spreads its writes on AWS; changing it needs an empty list


@dataclass(frozen=True)
class WorkerInfo:
    """A worker that asks for a job, and what it has to run it with."""

    name: str  # for people: host and process
    process: str  # names this start of the process, never used again
    memory: int = 0  # bytes; 0 = unknown, fits everything
    gpu: bool = False
    devices: int = 1


def shard(job_id: str) -> str:
    return f"active#{zlib.crc32(job_id.encode()) % SHARDS}"


def index_rows() -> list[JobIndex]:
    """Every job that has not ended, by its row in the list."""
    return [row for n in range(SHARDS) for row in tables.rows(JobIndex, f"active#{n}")]


def active_jobs(rows: Iterable[JobIndex] | None = None) -> list[Job]:
    """The jobs behind the rows; a row whose job isn't there (yet) is left out."""
    keys = [(row.owner, row.job_id) for row in (index_rows() if rows is None else rows)]
    return list(Job.batch_get(keys, consistent_read=True)) if keys else []


def active_of(owner: str) -> list[Job]:
    """The jobs of one person that have not ended."""
    return active_jobs([row for row in index_rows() if row.owner == owner])


def in_order(jobs: Iterable[Job], served: Mapping[str, int] | None = None) -> list[Job]:
    """The queued ones of `jobs`, who is next first. `served`: a worker's own memory of whom it had when."""
    served = served or {}
    jobs = list(jobs)
    place = Counter(job.owner for job in jobs if job.status == "running")
    queued = [job for job in jobs if job.status == "queued" and job.desired == "run"]
    ranked = []
    for job in sorted(queued, key=lambda job: (-job.priority, job.job_id)):
        ranked.append((-job.priority, place[job.owner], served.get(job.owner, 0), job.job_id, job))
        place[job.owner] += 1
    return [job for *_, job in sorted(ranked, key=lambda entry: entry[:4])]


_served: dict[str, int] = {}  # owner: the how manyth claim of this process was theirs last


def served() -> Mapping[str, int]:
    return _served


def record_served(owner: str) -> None:
    """A job of this owner was claimed."""
    number = max(_served.values(), default=0) + 1
    _served.pop(owner, None)
    _served[owner] = number
    if len(_served) > KNOWN:
        del _served[next(iter(_served))]


def fits(job: Job, worker: WorkerInfo) -> bool:
    needs = job.needs or {}
    if needs.get("gpu") and not worker.gpu:
        return False
    return not worker.memory or int(needs.get("memory") or 0) <= worker.memory


def position(job: Job) -> int | None:
    """1 = next; None when it isn't waiting in the queue."""
    if job.status != "queued":
        return None
    order = [waiting.job_id for waiting in in_order(active_jobs())]
    return order.index(job.job_id) + 1 if job.job_id in order else None

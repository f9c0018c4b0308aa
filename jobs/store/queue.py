"""The order of the queue: of the jobs that fit the worker, by priority, then by fair share between owners, then by age.

Fair share: an owner's queued jobs are ranked after their running ones, so the first job of one owner comes before the second
job of another, no matter how many jobs either has queued. Among owners of equal rank, a worker takes the one that it served
least recently. (This matters with a single worker, because then no job is running when the next one is claimed.)
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jobs.store import tables
from jobs.store.states import JobStatus
from jobs.store.tables import Job, JobIndex

MAX_SERVED = 1000  # owners that a worker remembers
SHARDS = 4  # partitions of the list of active jobs, which spread its writes on AWS; change this only while the list is empty


@dataclass(frozen=True)
class WorkerInfo:
    """A worker that claims jobs, and its hardware."""

    name: str  # for display: host and process
    process: str  # unique ID of this start of the process
    memory: int = 0  # bytes; 0 = unknown, fits every job
    gpu: bool = False
    devices: int = 1


def shard(job_id: str) -> str:
    return f"active#{zlib.crc32(job_id.encode()) % SHARDS}"


def index_rows() -> list[JobIndex]:
    """The rows of all jobs in the list of active jobs, which have not ended."""
    return [row for n in range(SHARDS) for row in tables.rows(JobIndex, f"active#{n}")]


def active_jobs(rows: Iterable[JobIndex] | None = None) -> list[Job]:
    """The jobs of these rows. A row that does not have a job yet is skipped."""
    keys = [(row.owner, row.job_id) for row in (index_rows() if rows is None else rows)]
    return list(Job.batch_get(keys, consistent_read=True)) if keys else []


def active_of(owner: str) -> list[Job]:
    """The jobs of one user that have not ended."""
    return active_jobs([row for row in index_rows() if row.owner == owner])


def in_order(jobs: Iterable[Job], served: Mapping[str, int] | None = None) -> list[Job]:
    """The queued jobs among `jobs`, next first. `served`: when this worker last served each owner."""
    served = served or {}
    jobs = list(jobs)
    rank = Counter(job.owner for job in jobs if job.status == JobStatus.RUNNING)
    queued = [job for job in jobs if job.status == JobStatus.QUEUED and job.desired == "run"]
    ranked = []
    for job in sorted(queued, key=lambda job: (-job.priority, job.job_id)):
        ranked.append((-job.priority, rank[job.owner], served.get(job.owner, 0), job.job_id, job))
        rank[job.owner] += 1
    return [job for *_, job in sorted(ranked, key=lambda entry: entry[:4])]


_served: dict[str, int] = {}  # owner: the number of the last claim by this process of one of their jobs


def served() -> Mapping[str, int]:
    return _served


def record_served(owner: str) -> None:
    """Records that a job of this owner was claimed."""
    number = max(_served.values(), default=0) + 1
    _served.pop(owner, None)
    _served[owner] = number
    if len(_served) > MAX_SERVED:
        del _served[next(iter(_served))]


def fits(job: Job, worker: WorkerInfo) -> bool:
    needs = job.needs or {}
    if needs.get("gpu") and not worker.gpu:
        return False
    return not worker.memory or int(needs.get("memory") or 0) <= worker.memory


def position(job: Job) -> int | None:
    """The job's position in the queue, where 1 is next; None if it is not in the queue."""
    if job.status != JobStatus.QUEUED:
        return None
    order = [waiting.job_id for waiting in in_order(active_jobs())]
    return order.index(job.job_id) + 1 if job.job_id in order else None

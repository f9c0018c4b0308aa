"""Finishes what others left: runs in every worker, idempotent, so there is no leader and nothing to elect.

It trusts no clock but its own monotonic one. A lease is stale when *it* has seen it unchanged for 30 s; a gap in its own
looking, or a store that didn't answer, starts every watch again, so an outage costs nobody a lease.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from django.conf import settings

from jobs.lifecycle import finalize, transitions
from jobs.store import blobs, outbox, queue, quotas, redis_client, tables
from jobs.store.tables import Job

log = logging.getLogger(__name__)


@dataclass
class Watch:
    """Since when each thing has been seen as it is now."""

    clock: Any = time.monotonic
    seen: dict[str, tuple[Any, float]] = field(default_factory=dict)
    looked_at: float | None = None
    next_due: float | None = None
    _touched: set[str] = field(default_factory=set)

    def look(self) -> None:
        """A round begins."""
        now = self.clock()
        if self.looked_at is not None and now - self.looked_at > settings.JOBS["watch_gap_s"]:
            self.seen.clear()
        self.looked_at, self.next_due = now, None
        for name in set(self.seen) - self._touched:
            del self.seen[name]  # not met in the last round
        self._touched.clear()

    def unchanged(self, name: str, value: Any, seconds: float) -> bool:
        """Has `name` been seen with this value for so long?"""
        self._touched.add(name)
        now = self.clock()
        before, since = self.seen.get(name, (None, now))
        if name not in self.seen or before != value:
            self.seen[name], since = (value, now), now
        due = since + seconds
        if now >= due:
            return True
        self.next_due = min(due, self.next_due) if self.next_due is not None else due
        return False

    def again(self, name: str) -> None:
        """Acted: wait as long before the next time."""
        self.seen.pop(name, None)

    def forget(self) -> None:
        self.seen.clear()
        self.looked_at = None


class Reconciler:
    """`tick()` again and again; it keeps nothing that matters."""

    def __init__(self, clock: Any = time.monotonic) -> None:
        self.watch = Watch(clock)
        self._due: dict[str, float] = {}

    def tick(self) -> float | None:
        """One round. Returns the seconds until a watch falls due (None: none runs). Raises when the store is away."""
        try:
            self.watch.look()
            jobs = self._jobs()
            self._errands()
            self._hourly(jobs)
        except Exception:
            self.watch.forget()
            raise
        due = self.watch.next_due
        return max(due - self.watch.clock(), 0.05) if due is not None else None

    def _jobs(self) -> list[Job]:
        rows = queue.index_rows()
        jobs = {job.job_id: job for job in queue.active_jobs(rows)}
        for row in rows:
            job = jobs.get(row.job_id)
            if job is None:
                self._orphan(row.owner, row.job_id)
            else:
                self._job(job)
        self._bells(list(jobs.values()))
        return list(jobs.values())

    def _orphan(self, owner: str, job_id: str) -> None:
        if self.watch.unchanged(job_id, "none", settings.JOBS["void_after_s"]):
            finalize.make_void(owner, job_id)

    def _job(self, job: Job) -> None:
        if job.ended:
            # Whoever ended it has rung for this; a round later it is ours to do.
            if self.watch.unchanged(job.job_id, job.status, settings.JOBS["reconcile_s"]):
                finalize.after_end(job.owner, job.job_id)
        elif job.status == "running":
            if self.watch.unchanged(job.job_id, job.lease, settings.JOBS["lease_s"]):
                self._said(job, "lost lease", transitions.lose_lease(job))
        elif settled := transitions.settle(job):
            self._said(job, "settled", settled)
        elif job.status == "validating":
            transitions.validate(job)
        elif job.status == "retrying" and self.watch.unchanged(
            job.job_id, job.version, transitions.backoff_s(job)
        ):
            transitions.requeue(job)

    def _bells(self, jobs: list[Job]) -> None:
        if waiting := len(queue.in_order(jobs)):
            redis_client.enqueue_training(waiting)

    def _errands(self) -> None:
        for row in outbox.pending():
            if outbox.is_due(row) and self.watch.unchanged(row.job_id, row.lease, settings.JOBS["lease_s"]):
                outbox.enqueue(*outbox.parse(row), row.lease or "")
                self.watch.again(row.job_id)

    def _hourly(self, jobs: list[Job]) -> None:
        """Bytes: what lost attempts and killed processes left goes. Quotas: an id whose job has ended goes."""
        if self._falls_due("janitor", settings.JOBS["janitor_s"]):
            for job in jobs:
                if job.fencing_token > 1:
                    finalize.sweep(job)
            blobs.sweep_unfinished()
        if self._falls_due("audit", settings.JOBS["audit_s"]):
            for owner in {job.owner for job in jobs}:
                quotas.audit(owner, "jobs", lambda id, owner=owner: is_over(owner, id))  # type: ignore[misc]  # bound now

    def _falls_due(self, name: str, seconds: float) -> bool:
        """On a clock of its own, which no gap starts again."""
        now = self.watch.clock()
        if now < self._due.setdefault(name, now + seconds):
            return False
        self._due[name] = now + seconds
        return True

    def _said(self, job: Job, what: str, moved: Job | None) -> None:
        if moved:
            log.warning("%s: %s, now %s", job.job_id, what, moved.status)


def is_over(owner: str, job_id: str) -> bool:
    job = tables.get(Job, owner, job_id)
    return job is not None and job.ended

"""Completes interrupted work. It runs in every worker and is idempotent, so no leader needs to be elected.

It trusts only its own monotonic clock: a lease is stale when *this* process has seen it unchanged for 30 s. A gap between two
rounds, or a store that does not respond, restarts all timers, so no job loses its lease because of an outage.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, assert_never

from django.conf import settings

from jobs.lifecycle import finalize, transitions
from jobs.store import blobs, outbox, queue, quotas, redis_client, states, tables
from jobs.store.states import JobStatus
from jobs.store.tables import Job

log = logging.getLogger(__name__)


@dataclass
class Watch:
    """Remembers how long each value has been unchanged."""

    clock: Callable[[], float] = time.monotonic
    seen: dict[str, tuple[Any, float]] = field(default_factory=dict)
    last_round_at: float | None = None
    next_due: float | None = None
    _touched: set[str] = field(default_factory=set)

    def begin_round(self) -> None:
        now = self.clock()
        if self.last_round_at is not None and now - self.last_round_at > settings.JOBS["watch_gap_s"]:
            self.seen.clear()
        self.last_round_at, self.next_due = now, None
        for name in set(self.seen) - self._touched:
            del self.seen[name]  # not seen in the last round
        self._touched.clear()

    def unchanged(self, name: str, value: Any, seconds: float) -> bool:
        """Whether `name` has had this value for at least `seconds`."""
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

    def restart(self, name: str) -> None:
        """Restarts the timer after an action, so that the action is not repeated sooner."""
        self.seen.pop(name, None)

    def forget(self) -> None:
        self.seen.clear()
        self.last_round_at = None


class Reconciler:
    """Call `tick()` repeatedly. It holds no state that must survive."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.watch = Watch(clock)
        self._due: dict[str, float] = {}

    def tick(self) -> float | None:
        """One round. Returns the seconds until the next timer is due, or None. Raises if the store cannot be reached."""
        try:
            self.watch.begin_round()
            jobs = self._jobs()
            self._outbox()
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
        self._notify_workers(list(jobs.values()))
        return list(jobs.values())

    def _orphan(self, owner: str, job_id: str) -> None:
        if self.watch.unchanged(job_id, "none", settings.JOBS["void_after_s"]):
            finalize.make_void(owner, job_id)

    def _job(self, job: Job) -> None:
        status = states.known(job.status)
        match status:
            case JobStatus.SUCCEEDED | JobStatus.FAILED | JobStatus.CANCELLED | JobStatus.VOID:
                # The process that ended the job sent a task message for this. If nobody has done it a round later, we do.
                if self.watch.unchanged(job.job_id, job.status, settings.JOBS["reconcile_s"]):
                    finalize.after_end(job.owner, job.job_id)
            case JobStatus.RUNNING:
                if self.watch.unchanged(job.job_id, job.lease, settings.JOBS["lease_s"]):
                    self._log_move(job, "lost lease", transitions.lose_lease(job))
            case JobStatus.VALIDATING:
                if not self._settled(job):
                    transitions.validate(job)
            case JobStatus.RETRYING:
                if not self._settled(job) and self.watch.unchanged(
                    job.job_id, job.version, transitions.backoff_s(job)
                ):
                    transitions.requeue(job)
            case JobStatus.QUEUED | JobStatus.PAUSED | None:
                self._settled(job)
            case _:
                assert_never(status)

    def _settled(self, job: Job) -> bool:
        """Whether the job was moved to the status that its owner wants."""
        settled = transitions.settle(job)
        if settled:
            self._log_move(job, "settled", settled)
        return settled is not None

    def _notify_workers(self, jobs: list[Job]) -> None:
        if waiting := len(queue.in_order(jobs)):
            redis_client.enqueue_training(waiting)

    def _outbox(self) -> None:
        for row in outbox.pending():
            if outbox.is_due(row) and self.watch.unchanged(row.job_id, row.lease, settings.JOBS["lease_s"]):
                outbox.enqueue(*outbox.parse(row), row.lease or "")
                self.watch.restart(row.job_id)

    def _hourly(self, jobs: list[Job]) -> None:
        """Deletes objects that lost attempts and killed processes left behind, and removes ended jobs from quotas."""
        if self._is_due("janitor", settings.JOBS["janitor_s"]):
            for job in jobs:
                if job.fencing_token > 1:
                    finalize.sweep(job)
            blobs.sweep_unfinished()
        if self._is_due("audit", settings.JOBS["audit_s"]):
            for owner in {job.owner for job in jobs}:
                quotas.audit(owner, "jobs", partial(has_ended, owner))

    def _is_due(self, name: str, seconds: float) -> bool:
        """Whether this periodic work is due. Unlike the timers of Watch, its timer is not restarted by gaps."""
        now = self.watch.clock()
        if now < self._due.setdefault(name, now + seconds):
            return False
        self._due[name] = now + seconds
        return True

    def _log_move(self, job: Job, move: str, moved: Job | None) -> None:
        if moved:
            log.warning("%s: %s, now %s", job.job_id, move, moved.status)


def has_ended(owner: str, job_id: str) -> bool:
    job = tables.get(Job, owner, job_id)
    return job is not None and job.ended

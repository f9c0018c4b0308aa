"""The lease on a job: how a worker claims a job, and every write that it makes while it holds the lease."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from django.conf import settings
from pynamodb.exceptions import PynamoDBException
from pynamodb.expressions.condition import Condition
from pynamodb.expressions.update import Action

from jobs.lifecycle import moves
from jobs.store import queue, reasons, tables
from jobs.store.lease import LostRace
from jobs.store.queue import WorkerInfo
from jobs.store.states import JobStatus
from jobs.store.tables import HeartbeatJob, Job

PROCESS = secrets.token_hex(8)  # identifies this run of this process


def claim_next(worker: WorkerInfo) -> Claim | None:
    """Claims the next job for this worker. Returns None if no queued job fits it."""
    for job in queue.in_order(queue.active_jobs(), queue.served()):
        if queue.fits(job, worker):
            claimed = claim(job, worker)
            if claimed:
                queue.record_served(job.owner)
                return claimed
    return None


def claim(job: Job, worker: WorkerInfo) -> Claim | None:
    """Claims `job`, which was queued when it was read. Returns None if another worker was first."""
    if job.status != JobStatus.QUEUED or job.desired != "run":
        return None
    lease_owner = f"{worker.process}/{secrets.token_hex(8)}"
    actions: list[Action] = [
        Job.status.set(JobStatus.RUNNING),
        Job.phase.set("preparing"),
        Job.fencing_token.set(job.fencing_token + 1),
        Job.lease_owner.set(lease_owner),
        Job.worker.set(worker.name),
        Job.lease.set(moves.new_lease()),
    ]
    if job.started_at is None:
        actions.append(Job.started_at.set(time.time()))
    condition = moves.as_seen(job) & (Job.desired == "run")
    # If the reply is lost, we may hold the lease without knowing it. So the write is repeated until there is a reply.
    moved = _retry_until_reply(
        lambda: moves.move(job, actions, condition, lambda current: current.lease_owner == lease_owner)
    )
    if moved is None or moved.status != JobStatus.RUNNING:
        return None
    moves.announce(moved)
    return Claim(moved, int(moved.fencing_token), lease_owner)


Reply = TypeVar("Reply")


def _retry_until_reply(send: Callable[[], Reply]) -> Reply:
    """Repeats the same write until the store replies, but no longer than a lease would last."""
    deadline = time.monotonic() + settings.JOBS["self_fence_s"]
    while True:
        try:
            return send()
        except PynamoDBException:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


@dataclass
class Claim:
    """The lease on a job: the right of one attempt to write to it. `job` is the row as last seen.

    Each method raises LostRace if the lease is lost; the attempt must then stop and write nothing more. If the store cannot
    be reached, each raises PynamoDBException; the call can be repeated with the same arguments.
    """

    job: Job
    fencing_token: int
    lease_owner: str

    @property
    def owner(self) -> str:
        return self.job.owner

    @property
    def job_id(self) -> str:
        return self.job.job_id

    @property
    def desired(self) -> str:
        return self.job.desired

    @property
    def prefix(self) -> str:
        """The prefix of this attempt's objects. A late writer with an older token uses another prefix, which nothing reads."""
        return f"jobs/{self.job_id}/e{self.fencing_token}/"

    def is_mine(self, current: Job) -> bool:
        return current.status == JobStatus.RUNNING and (current.fencing_token, current.lease_owner) == (
            self.fencing_token,
            self.lease_owner,
        )

    def _mine(self) -> Condition:
        condition: Condition = (
            (Job.status == JobStatus.RUNNING)
            & (Job.fencing_token == self.fencing_token)
            & (Job.lease_owner == self.lease_owner)
        )
        return condition

    def heartbeat(
        self,
        progress: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        first_seq: int | None = None,
        last_seq: int | None = None,
        *,
        phase: str | None = None,
        plan: Mapping[str, Any] | None = None,
        estimate: Mapping[str, Any] | None = None,
        resume_check: Mapping[str, Any] | None = None,
    ) -> str:
        """Renews the lease, reports progress, and makes the events first_seq … last_seq visible to readers (their chunk
        must be stored already). Tries once, for 3 s. Returns what the user wants: run, pause or cancel."""
        payload: dict[str, Any] = {
            "progress": progress,
            "metrics": metrics,
            "phase": phase,
            "plan": plan,
            "estimate": estimate,
            "resume_check": resume_check,
        }
        actions: list[Action] = [Job.lease.set(moves.new_lease()), Job.version.add(1)]
        actions += [
            moves.set_attribute(Job, name, value) for name, value in payload.items() if value is not None
        ]
        condition = self._mine()
        if first_seq is not None and last_seq is not None:
            actions.append(Job.last_seq.set(last_seq))
            condition &= Job.last_seq == first_seq - 1
        moved = tables.update(
            HeartbeatJob(self.owner, self.job_id),
            actions,
            condition,
            lambda current: self.is_mine(_as_job(current)) and last_seq in (None, current.last_seq),
        )
        return self._seen(_as_job(moved) if moved else None).desired

    def move_pointer(self, checkpoint: Mapping[str, Any]) -> str:
        """Sets the checkpoint from which the next attempt resumes: {"key", "step", "sha256", "bytes", …}. Its files must be
        stored and verified already. This is progress, so earlier failures no longer count. Returns what the user wants."""
        kept = kept_checkpoints([*self.job.checkpoints, dict(checkpoint)])
        step, key = int(checkpoint["step"]), str(checkpoint["key"])
        moved = moves.move(
            self.job,
            [
                Job.checkpoint_key.set(key),
                Job.checkpoint_step.set(step),
                Job.checkpoints.set(kept),
                Job.attempts_without_progress.set(0),
                Job.platform_faults.set(0),
            ],
            self._mine() & (Job.checkpoint_step.does_not_exist() | (Job.checkpoint_step < step)),
            lambda current: self.is_mine(current) and current.checkpoint_key == key,
        )
        return self._seen(moved).desired

    def pointer_back(self, checkpoint: Mapping[str, Any] | None) -> None:
        """Moves the pointer to the newest intact checkpoint, or removes it if there is none. Called before training if the
        checkpoint that the pointer names is damaged."""
        before, key = self.job.checkpoint_key, str(checkpoint["key"]) if checkpoint else None
        actions: list[Action]
        if checkpoint:
            kept = [c for c in self.job.checkpoints if c["step"] <= checkpoint["step"]]
            actions = [Job.checkpoint_key.set(str(key)), Job.checkpoint_step.set(int(checkpoint["step"]))]
        else:
            kept = []
            actions = [Job.checkpoint_key.remove(), Job.checkpoint_step.remove()]
        pointer = Job.checkpoint_key == before if before else Job.checkpoint_key.does_not_exist()
        moved = moves.move(
            self.job,
            [*actions, Job.checkpoints.set(kept)],
            self._mine() & pointer,
            lambda current: self.is_mine(current) and current.checkpoint_key == key,
        )
        self._seen(moved)

    def finish(
        self,
        status: Literal[JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.PAUSED],
        reason: str = "",
        result: Mapping[str, Any] | None = None,
        *,
        message: str = "",
        advice: str = "",
    ) -> str:
        """Ends the attempt: it succeeded, failed permanently, or was stopped on request. For a success, `result` is
        {"prefix", "files": [{"name", "bytes", "sha256"}], "step", "metrics", …}. Returns the job's new status."""
        event = "stopped" if status in {JobStatus.CANCELLED, JobStatus.PAUSED} else status
        return self._leave(event, reason, message, advice, result)

    def give_back(self) -> str:
        """Puts the job back into the queue because the worker is stopping. This does not count as an attempt. Returns the
        job's new status."""
        return self._leave("stopped")

    def trainer_died(self, reason: str, message: str = "", advice: str = "") -> str:
        """Ends an attempt that failed: the job is retried, or fails after too many attempts. A platform fault does not count
        as an attempt. Returns the job's new status."""
        event = "broke off" if reasons.is_platform_fault(reason) else "died"
        return self._leave(event, reason, message, advice)

    def _leave(
        self,
        event: str,
        reason: str = "",
        message: str = "",
        advice: str = "",
        result: Mapping[str, Any] | None = None,
    ) -> str:
        while True:
            job = self.job
            status = moves.landing(event, job)
            actions = moves.leaving(event, job, status, reason, message, advice)
            if status == JobStatus.SUCCEEDED:
                actions.append(Job.result.set({**(result or {}), "epoch": self.fencing_token}))
            moved = moves.move(
                job,
                actions,
                self._mine() & (Job.desired == job.desired),
                lambda current, status=status: (
                    current.status == status  # type: ignore[misc]  # bound for this round
                    and (current.fencing_token, current.lease_owner) == (self.fencing_token, self.lease_owner)
                ),
            )
            if moved:
                self.job = moved
                moves.announce(moved)
                return status
            # Either the lease is lost, or the user's request has changed, and with it the resulting status.
            self._seen(tables.get(Job, self.owner, self.job_id))

    def _seen(self, current: Job | None) -> Job:
        if current is None or not self.is_mine(current):
            raise LostRace(f"The lease on {self.job_id} (fencing token {self.fencing_token}) was lost.")
        self.job = current
        return current


def _as_job(row: HeartbeatJob) -> Job:
    """The same row as a Job: both classes map the same table."""
    job = Job()
    job.attribute_values = row.attribute_values
    return job


def kept_checkpoints(checkpoints: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last two checkpoints and the best one: the next attempt may fall back on them, so the cleanup must keep them."""
    last = checkpoints[-2:]
    return [c for c in checkpoints[:-2] if c.get("best")][-1:] + last


def this_worker(**has: Any) -> WorkerInfo:
    """Describes this process as a worker."""
    return WorkerInfo(name=f"{os.uname().nodename}/{os.getpid()}", process=PROCESS, **has)

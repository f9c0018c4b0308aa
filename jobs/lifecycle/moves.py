"""How a job changes status: where each move leads, and the conditional write that makes it. See jobs/lifecycle/transitions.py."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from django.conf import settings
from pynamodb.expressions.condition import Condition
from pynamodb.expressions.update import Action

from jobs.events import event_log
from jobs.store import reasons, redis_client, tables
from jobs.store.states import JobStatus
from jobs.store.tables import ENDED, Job

Desired = Literal["run", "pause", "cancel"]
MAX_NOTIFICATIONS = 8  # the most that are sent at once; the reconciler notifies more workers if needed
PLATFORM_FAULTS = frozenset({"lost", "broke off"})  # ways to leave `running` that do not count as an attempt


def landing(event: str, job: Job) -> JobStatus:
    """The status that follows when a job leaves `running`, given what the user wants."""
    if job.desired == "cancel":
        return JobStatus.CANCELLED
    if event in {JobStatus.SUCCEEDED, JobStatus.FAILED}:
        return JobStatus(event)
    if event == "stopped":
        return {"run": JobStatus.QUEUED, "pause": JobStatus.PAUSED}[job.desired]
    if event in PLATFORM_FAULTS:
        spent = job.platform_faults + 1 >= settings.JOBS["max_platform_faults"]
    else:
        spent = (
            job.attempts + 1 >= settings.JOBS["max_attempts"]
            or job.attempts_without_progress + 1 >= settings.JOBS["max_attempts_without_progress"]
        )
    if spent:
        return JobStatus.FAILED
    return JobStatus.PAUSED if job.desired == "pause" else JobStatus.RETRYING


def leaving(event: str, job: Job, status: JobStatus, reason: str, message: str, advice: str) -> list[Action]:
    actions = [Job.lease.remove(), *entering(job, status)]
    tried = event == "died" or event in PLATFORM_FAULTS
    if event == "died" and status != JobStatus.CANCELLED:
        actions += [Job.attempts.add(1), Job.attempts_without_progress.add(1)]
    if event in PLATFORM_FAULTS and status != JobStatus.CANCELLED:
        actions.append(Job.platform_faults.add(1))
    if status == JobStatus.FAILED and tried:
        message = " ".join(
            part for part in (message or reasons.sentence(reason), reasons.sentence("attempts_spent")) if part
        )
    if status == JobStatus.CANCELLED:
        reason, message, advice = "cancelled", "", ""
    if status in ENDED or reason:
        actions += [
            Job.reason.set(reason),
            Job.message.set(message or reasons.sentence(reason)),
            Job.advice.set(advice or reasons.advice(reason)),
        ]
    return actions


def desired_status(job: Job, desired: str) -> str:
    """The status that `desired` asks for on a job that no worker holds."""
    if desired == "cancel":
        return JobStatus.CANCELLED
    if desired == "pause":
        return JobStatus.PAUSED
    if job.status == JobStatus.PAUSED:
        # A job that never ran may not have been checked yet.
        return JobStatus.QUEUED if job.fencing_token else JobStatus.VALIDATING
    return job.status


def move(
    job: Job,
    actions: list[Action],
    condition: Condition,
    already_applied: Callable[[Job], bool] = lambda current: False,
) -> Job | None:
    return tables.update(job, [*actions, Job.version.add(1)], condition, already_applied)


def as_seen(job: Job) -> Condition:
    condition: Condition = (Job.status == job.status) & (Job.version == job.version)
    return condition


def entering(job: Job, status: str) -> list[Action]:
    actions: list[Action] = [Job.status.set(status), Job.phase.set("")]
    if status in ENDED:
        actions.append(Job.ended_at.set(time.time()))
    return actions


def set_attribute(table: Any, name: str, value: Any) -> Action:
    attribute = getattr(table, name)
    action: Action = (
        attribute.remove()
        if value is None
        else attribute.set(dict(value) if isinstance(value, Mapping) else value)
    )
    return action


def new_lease() -> str:
    return secrets.token_hex(8)


def announced(moved: Job | None) -> Job | None:
    if moved:
        announce(moved)
    return moved


def announce(job: Job) -> None:
    """Sends notifications after the write. Losing one does no harm: readers also poll, and the reconciler sends it again."""
    event_log.announce(job.job_id, int(job.last_seq))
    if job.ended:
        redis_client.enqueue("after_end", job.owner, job.job_id)
    elif job.status == JobStatus.QUEUED and job.desired == "run":
        redis_client.enqueue_training(MAX_NOTIFICATIONS)

"""The states of a job. jobs/lifecycle/transitions.py has the transitions between them."""

from __future__ import annotations

from enum import StrEnum


class JobStatus(StrEnum):
    """The values are stored: never change them."""

    VALIDATING = "validating"  # waiting for the check of its dataset
    QUEUED = "queued"
    RUNNING = "running"
    RETRYING = "retrying"  # waiting after a failed attempt
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    VOID = "void"  # the submission was never completed


ENDED = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.VOID})
ACTIVE = frozenset(JobStatus) - ENDED

"""The states of a job, a dataset and a report. jobs/lifecycle/transitions.py has the transitions of a job.

A `match` over all of them, as below, makes mypy name what a new state would miss.
"""

from __future__ import annotations

from enum import StrEnum

# The values are stored: never change them.


class JobStatus(StrEnum):
    VALIDATING = "validating"  # waiting for the check of its dataset
    QUEUED = "queued"
    RUNNING = "running"
    RETRYING = "retrying"  # waiting after a failed attempt
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    VOID = "void"  # the submission was never completed


class DatasetStatus(StrEnum):
    RECEIVING = "receiving"  # its bytes are being uploaded
    CHECKING = "checking"
    READY = "ready"
    REJECTED = "rejected"


class ReportStatus(StrEnum):
    """Of a dataset's report for another tokenizer, and of one tokenized row."""

    CHECKING = "checking"
    READY = "ready"
    REFUSED = "refused"  # the base cannot be trained on this dataset
    FAILED = "failed"  # not made; it can be requested again


def _is_final(status: JobStatus) -> bool:
    match status:
        case (
            JobStatus.VALIDATING
            | JobStatus.QUEUED
            | JobStatus.RUNNING
            | JobStatus.RETRYING
            | JobStatus.PAUSED
        ):
            return False
        case JobStatus.SUCCEEDED | JobStatus.FAILED | JobStatus.CANCELLED | JobStatus.VOID:
            return True


ENDED = frozenset(status for status in JobStatus if _is_final(status))


def known(status: str) -> JobStatus | None:
    """A stored status; None for one that a newer version has written."""
    return next((state for state in JobStatus if state == status), None)

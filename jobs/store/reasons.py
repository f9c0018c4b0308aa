"""Why a job ends or needs a person: a short closed list, each with the sentence that is read and what to do next.

The trainer's own reasons (training.plan.events) come first; these are the platform's."""

from __future__ import annotations

from training.plan.events import REASONS as TRAINER_REASONS
from training.plan.events import Reason

REASONS: dict[str, Reason] = TRAINER_REASONS | {
    "dataset_rejected": Reason(-1, "The dataset was refused.", "Open the dataset's report: it names the lines to repair.", True),
    "dataset_deleted": Reason(-1, "The dataset was deleted before training began.", "Upload it again and start a new job.", True),
    "killed": Reason(-1, "The trainer was killed, most likely because memory ran out.", "Lower micro_batch_tokens or sequence_length if it happens again."),
    "stalled": Reason(-1, "The trainer made no progress for too long and was stopped.", "The log holds its last words; try again."),
    "lost_worker": Reason(-1, "The worker that ran the job went silent.", "Check that its machine is up; the job goes on from its last checkpoint on another.", platform_fault=True),
    "store": Reason(-1, "Files could not be read from or written to the object storage.", "Check the storage; the job goes on from its last checkpoint.", platform_fault=True),
    "file_damaged": Reason(-1, "A file that the job needs is missing from the object storage, or damaged.", "Upload the dataset again, and start a new job."),
    "attempts_spent": Reason(-1, "The job was tried too often without getting further.", "The log tells what happened each time. Press Retry to go on from the last checkpoint."),
    "time_limit": Reason(-1, "The job took longer than the operator allows.", "Train fewer epochs, or ask the operator to raise the limit.", True),
    "too_many_events": Reason(-1, "The trainer printed more than can be kept.", "Evaluate and sample less often.", True),
    "cancelled": Reason(-1, "Cancelled as asked.", "Clone the job to start it again.", True),
}  # fmt: skip


def sentence(reason: str) -> str:
    return REASONS[reason].sentence if reason in REASONS else ""


def advice(reason: str) -> str:
    return REASONS[reason].advice if reason in REASONS else ""


def is_platform_fault(reason: str) -> bool:
    """Is it neither the job's nor its owner's doing?"""
    return reason in REASONS and REASONS[reason].platform_fault

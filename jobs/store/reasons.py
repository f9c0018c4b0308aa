"""Why a job fails or pauses: a complete list of reasons, each with a sentence for users and what to do next.

The trainer has its own reasons (training.plan.events); this module adds the platform's."""

from __future__ import annotations

from training.data.summary import ONE_ANSWER, PREFERENCES
from training.plan.events import REASONS as TRAINER_REASONS
from training.plan.events import Reason

PLATFORM_REASONS: dict[str, Reason] = {
    "dataset_rejected": Reason(
        -1, "The dataset was rejected.", "Open the dataset's report, which lists the lines to fix.", True
    ),
    "dataset_unsupported": Reason(-1, PREFERENCES, ONE_ANSWER, True),
    "dataset_deleted": Reason(
        -1, "The dataset was deleted before training began.", "Upload it again and start a new job.", True
    ),
    "killed": Reason(
        -1,
        "The trainer was killed, most likely because memory ran out.",
        "If it happens again, lower micro_batch_tokens or sequence_length.",
    ),
    "stalled": Reason(
        -1,
        "The trainer made no progress for too long and was stopped.",
        "Check the end of the log for the cause, then try again.",
    ),
    "lost_worker": Reason(
        -1,
        "The worker that ran the job stopped responding.",
        "Check that its machine is running. The job resumes from its last checkpoint on another worker.",
        platform_fault=True,
    ),
    "store": Reason(
        -1,
        "Files could not be read from or written to object storage.",
        "Check the object storage. The job resumes from its last checkpoint automatically.",
        platform_fault=True,
    ),
    "file_damaged": Reason(
        -1,
        "A file that the job needs is damaged or missing from object storage.",
        "Upload the dataset again and start a new job.",
    ),
    "attempts_spent": Reason(
        -1,
        "Too many attempts failed without progress.",
        "The log shows what happened each time. Resume the job to continue from its last checkpoint.",
    ),
    "time_limit": Reason(
        -1,
        "The job exceeded the time limit set by the administrator.",
        "Train for fewer epochs, or ask the administrator to raise the limit.",
        True,
    ),
    "too_many_events": Reason(
        -1,
        "The trainer produced more output than can be stored.",
        "Evaluate less often and show fewer samples.",
        True,
    ),
    "cancelled": Reason(-1, "Cancelled on request.", "Clone the job to start it again.", True),
}
REASONS: dict[str, Reason] = TRAINER_REASONS | PLATFORM_REASONS


def sentence(reason: str) -> str:
    return REASONS[reason].sentence if reason in REASONS else ""


def advice(reason: str) -> str:
    return REASONS[reason].advice if reason in REASONS else ""


def is_platform_fault(reason: str) -> bool:
    """Whether the platform is at fault, and neither the job nor its owner."""
    return reason in REASONS and REASONS[reason].platform_fault

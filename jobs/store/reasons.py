"""Why a job fails or pauses: a short closed list, each with the sentence that users read and what to do next.

The trainer's own reasons (training.plan.events) come first; these are the platform's."""

from __future__ import annotations

from training.plan.events import REASONS as TRAINER_REASONS
from training.plan.events import Reason

PLATFORM_REASONS: dict[str, Reason] = {
    "dataset_rejected": Reason(
        -1, "The dataset was rejected.", "Open the dataset's report: it lists the lines to fix.", True
    ),
    "dataset_deleted": Reason(
        -1, "The dataset was deleted before training began.", "Upload it again and start a new job.", True
    ),
    "killed": Reason(
        -1,
        "The trainer was killed, most likely because memory ran out.",
        "Lower micro_batch_tokens or sequence_length if it happens again.",
    ),
    "stalled": Reason(
        -1,
        "The trainer made no progress for too long and was stopped.",
        "See the end of the log, then try again.",
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
        "Check the storage. The job resumes from its last checkpoint.",
        platform_fault=True,
    ),
    "file_damaged": Reason(
        -1,
        "A file that the job needs is missing from object storage, or damaged.",
        "Upload the dataset again, and start a new job.",
    ),
    "attempts_spent": Reason(
        -1,
        "Too many attempts failed without progress.",
        "The log shows what happened each time. Resume the job to continue from its last checkpoint.",
    ),
    "time_limit": Reason(
        -1,
        "The job exceeded the operator's time limit.",
        "Train fewer epochs, or ask the operator to raise the limit.",
        True,
    ),
    "too_many_events": Reason(
        -1, "The trainer produced more output than can be stored.", "Evaluate and sample less often.", True
    ),
    "cancelled": Reason(-1, "Cancelled on request.", "Clone the job to start it again.", True),
}
REASONS: dict[str, Reason] = TRAINER_REASONS | PLATFORM_REASONS


def sentence(reason: str) -> str:
    return REASONS[reason].sentence if reason in REASONS else ""


def advice(reason: str) -> str:
    return REASONS[reason].advice if reason in REASONS else ""


def is_platform_fault(reason: str) -> bool:
    """Whether neither the job nor its owner is to blame."""
    return reason in REASONS and REASONS[reason].platform_fault

"""How each job status is shown: one table. A new status that is missing here fails mypy."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.store import states
from jobs.store.states import JobStatus

PRIMARY, SUCCESS, ERROR = "bg-primary", "bg-success", "bg-error"
WARNING, NEUTRAL = "bg-warning", "bg-base-content/40"

PHASE_LABELS = {
    "preparing": "Preparing",
    "rehearsing": "Rehearsing",
    "training": "Training",
    "evaluating": "Evaluating",
    "exporting": "Exporting",
}


@dataclass(frozen=True)
class StatusDisplay:
    label: str
    tone: str  # CSS class of the dot
    empty_log: str = "No log lines were written."
    problem_title: str = ""  # heading of the reason, for a status that can have one
    problem_border: str = ""


def display_of(status: str) -> StatusDisplay:
    """A status written by a newer version is shown by its own name."""
    state = states.known(status)
    return _display(state) if state else StatusDisplay(status.capitalize(), NEUTRAL)


def _display(status: JobStatus) -> StatusDisplay:
    match status:
        case JobStatus.VALIDATING:
            return StatusDisplay(
                "Checking data",
                WARNING,
                "The dataset is being checked. The job joins the queue when the check is done.",
            )
        case JobStatus.QUEUED:
            return StatusDisplay(
                "Queued", WARNING, "No log lines yet. The log starts when a worker takes the job."
            )
        case JobStatus.RUNNING:
            return StatusDisplay("Running", PRIMARY, "The worker is starting.")
        case JobStatus.RETRYING:
            return StatusDisplay(
                "Retrying soon",
                WARNING,
                problem_title="Attempt failed. Retrying automatically.",
                problem_border="border-warning/40",
            )
        case JobStatus.PAUSED:
            return StatusDisplay("Paused", NEUTRAL, problem_title="Why it stopped")
        case JobStatus.SUCCEEDED:
            return StatusDisplay("Succeeded", SUCCESS)
        case JobStatus.FAILED:
            return StatusDisplay(
                "Failed", ERROR, problem_title="Why it failed", problem_border="border-error/40"
            )
        case JobStatus.CANCELLED:
            return StatusDisplay("Cancelled", NEUTRAL, problem_title="Why it stopped")
        case JobStatus.VOID:
            return StatusDisplay("Never started", NEUTRAL)

"""Determines from a trainer's exit what went wrong, what happens next, and what the user should do.

An error that the user must fix ends the job. If memory runs out, the micro-batch is halved and training continues from the
checkpoint: each step is then computed in more pieces, with the same result. Everything else is retried, which counts as an
attempt unless the platform is at fault.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any, Literal

from pynamodb.exceptions import PynamoDBException

from jobs.store import blobs
from jobs.store.reasons import REASONS
from training.plan.events import EXIT, REASON_OF_EXIT, Failure, reason_of

Verdict = Literal["done", "stopped", "fault", "died", "smaller"]
SMALLEST_MICRO_BATCH = 64  # tokens


@dataclass(frozen=True)
class ExitDiagnosis:
    """`fault`: the job fails. `died`: the job is retried, and the reason decides whether this counts as an attempt.
    `smaller`: the micro-batch is halved and training continues."""

    verdict: Verdict
    reason: str = ""
    message: str = ""
    advice: str = ""


def diagnose(
    code: int, failed: dict[str, Any] | None, *, killed_by_us: str = "", micro_batch: int = 0
) -> ExitDiagnosis:
    """Diagnoses the exit code (negative for a signal), the trainer's "failed" event, and the reason why we killed it, if we
    did."""
    if killed_by_us:
        return _explained(killed_by_us)
    if code == EXIT["done"]:
        return ExitDiagnosis("done")
    if code == EXIT["stopped"]:
        return ExitDiagnosis("stopped")
    reason = REASON_OF_EXIT.get(code, "unexpected")
    if code < 0:
        reason = "time_limit" if -code == signal.SIGXCPU else "killed"
    if reason == "out_of_memory" and micro_batch > SMALLEST_MICRO_BATCH:
        return ExitDiagnosis("smaller", reason, (failed or {}).get("message", ""))
    if failed and failed.get("reason") == reason:
        return _explained(reason, failed.get("message", ""), failed.get("advice", ""))
    return _explained(
        reason, f"The trainer was terminated by signal {signal.Signals(-code).name}." if code < 0 else ""
    )


def diagnose_error(error: BaseException) -> ExitDiagnosis:
    """Diagnoses an error that was raised in the worker while it fetched or stored files or started a trainer."""
    if isinstance(error, Failure):
        return _explained(error.reason, error.message, error.advice)
    if isinstance(error, (blobs.Missing, blobs.Damaged)):
        return _explained("file_damaged")
    system = error if isinstance(error, OSError) else error.__cause__
    reason = reason_of(system) if isinstance(system, OSError) else ""
    if isinstance(error, blobs.StorageError):
        if reason == "disk_full":
            return _explained("disk_full", "The disk of the object storage is full.")
        cause = (system.strerror if isinstance(system, OSError) else "") or error
        return _explained("store", f"The object storage returned an error: {cause}"[:500])
    if isinstance(error, PynamoDBException):
        return _explained(
            "store",
            "The database did not respond.",
            "Check the database. The job is retried automatically.",
        )
    if reason:
        return _explained(reason, "The worker's disk is full." if reason == "disk_full" else "")
    return _explained("unexpected", "An unexpected error occurred in the worker. See the worker's log.")


def _explained(reason: str, message: str = "", advice: str = "") -> ExitDiagnosis:
    known = REASONS[reason]
    return ExitDiagnosis(
        "fault" if known.user_fault else "died", reason, message or known.sentence, advice or known.advice
    )


def halved(micro_batch: int) -> int:
    return max(SMALLEST_MICRO_BATCH, micro_batch // 2)


def smaller_batch_event(micro_batch: int) -> dict[str, Any]:
    """The event shown on the job's page."""
    return {
        "t": "doctor",
        "level": "warning",
        "cause": "out_of_memory",
        "action": {"micro_batch_tokens": micro_batch},
        "message": f"Memory ran out. Each step is now computed in micro-batches of {micro_batch} tokens, which needs less "
        "memory and gives the same result. Training continues from the last checkpoint.",
    }

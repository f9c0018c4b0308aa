"""The failure doctor: what an ending of the trainer means, what is done by itself, and what a person should do.

A user's fault ends the job. Memory that ran out is cured in place: the micro-batch is halved, so a step is computed in
more parts with the same result, and training goes on from the checkpoint. The rest is tried again by the lease's rules,
which charge the job for it unless the platform is at fault.
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
class Diagnosis:
    """`fault`: the job fails. `died`: try again; its reason decides what that costs. `smaller`: halve the micro-batch and
    go on."""

    verdict: Verdict
    reason: str = ""
    message: str = ""
    advice: str = ""


def diagnose(
    code: int, said: dict[str, Any] | None, *, killed_by_us: str = "", micro_batch: int = 0
) -> Diagnosis:
    """From the exit code (negative: a signal), the trainer's last words ("failed" line) and why we killed it, if so."""
    if killed_by_us:
        return _told(killed_by_us)
    if code == EXIT["done"]:
        return Diagnosis("done")
    if code == EXIT["stopped"]:
        return Diagnosis("stopped")
    reason = REASON_OF_EXIT.get(code, "unexpected")
    if code < 0:
        reason = "time_limit" if -code == signal.SIGXCPU else "killed"
    if reason == "out_of_memory" and micro_batch > SMALLEST_MICRO_BATCH:
        return Diagnosis("smaller", reason, (said or {}).get("message", ""))
    if said and said.get("reason") == reason:
        return _told(reason, said.get("message", ""), said.get("advice", ""))
    return _told(reason, f"The trainer ended by signal {signal.Signals(-code).name}." if code < 0 else "")


def of_error(error: BaseException) -> Diagnosis:
    """Of what was raised beside the trainer: while files were fetched or stored, or a trainer was started."""
    if isinstance(error, Failure):
        return _told(error.reason, error.message, error.advice)
    if isinstance(error, (blobs.Missing, blobs.Damaged)):
        return _told("file_damaged")
    system = error if isinstance(error, OSError) else error.__cause__
    reason = reason_of(system) if isinstance(system, OSError) else ""
    if isinstance(error, blobs.StorageError):
        if reason == "disk_full":
            return _told("disk_full", "The disk of the object storage is full.")
        said = (system.strerror if isinstance(system, OSError) else "") or error
        return _told("store", f"The storage said: {said}"[:500])
    if isinstance(error, PynamoDBException):
        return _told(
            "store", "The database did not answer.", "Check the database; the job goes on by itself."
        )
    if reason:
        return _told(reason, "The worker's disk is full." if reason == "disk_full" else "")
    return _told("unexpected", "The worker met something unexpected; its own log holds the details.")


def _told(reason: str, message: str = "", advice: str = "") -> Diagnosis:
    known = REASONS[reason]
    return Diagnosis(
        "fault" if known.user_fault else "died", reason, message or known.sentence, advice or known.advice
    )


def halved(micro_batch: int) -> int:
    return max(SMALLEST_MICRO_BATCH, micro_batch // 2)


def told_smaller(micro_batch: int) -> dict[str, Any]:
    """The event for the page."""
    return {
        "t": "doctor",
        "level": "warning",
        "cause": "out_of_memory",
        "action": {"micro_batch_tokens": micro_batch},
        "message": f"Memory ran out. Each step is now computed in parts of {micro_batch} tokens instead of larger ones: the "
        "same result, less memory. Training goes on from the last checkpoint.",
    }

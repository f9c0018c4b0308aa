"""What an exit code or an error means for the attempt and the job."""

from __future__ import annotations

import errno
import signal

import pytest
from pynamodb.exceptions import GetError

from jobs.store import blobs
from jobs.worker.exit_diagnosis import SMALLEST_MICRO_BATCH, diagnose, diagnose_error, halved
from jobs.worker.resume_check import ResumeCheck
from training.plan.events import EXIT, REASONS, Failure


def test_exit_codes_0_and_75():
    assert diagnose(0, None).verdict == "done"
    assert diagnose(75, None).verdict == "stopped"


@pytest.mark.parametrize("reason", [name for name, reason in REASONS.items() if reason.user_fault])
def test_a_user_error_is_never_retried(reason):
    failed = {"reason": reason, "message": "line 7 is empty", "advice": "Fill it."}
    diagnosis = diagnose(EXIT[reason], failed)
    assert (diagnosis.verdict, diagnosis.message, diagnosis.advice) == (
        "fault",
        "line 7 is empty",
        "Fill it.",
    )


@pytest.mark.parametrize("reason", ["disk_full", "not_writable", "unexpected"])
def test_a_machine_fault_is_retried_and_explained(reason):
    diagnosis = diagnose(EXIT[reason], None)
    assert diagnosis.verdict == "died"
    assert diagnosis.message == REASONS[reason].sentence
    assert diagnosis.advice


def test_out_of_memory_halves_the_micro_batch_down_to_the_smallest():
    assert diagnose(EXIT["out_of_memory"], None, micro_batch=4096).verdict == "smaller"
    assert diagnose(EXIT["out_of_memory"], None, micro_batch=SMALLEST_MICRO_BATCH).verdict == "died"
    assert halved(4096) == 2048
    assert halved(70) == SMALLEST_MICRO_BATCH


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS])
def test_a_signal_is_named(number):
    diagnosis = diagnose(-number, None)
    assert (diagnosis.verdict, diagnosis.reason) == ("died", "killed")
    assert signal.Signals(number).name in diagnosis.message


def test_exceeding_the_cpu_time_limit_is_not_retried():
    assert diagnose(-signal.SIGXCPU, None).verdict == "fault"


def test_an_unknown_exit_code_is_unexpected():
    assert diagnose(1, None).reason == "unexpected"


def test_the_reason_for_our_own_kill_takes_precedence():
    assert diagnose(-9, None, killed_by_us="stalled").reason == "stalled"
    assert diagnose(-9, None, killed_by_us="time_limit").verdict == "fault"


def caused_by(error: OSError) -> blobs.StorageError:
    try:
        raise blobs.StorageError(f"jobs/x/weights: {error}") from error
    except blobs.StorageError as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "reason", "text"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/srv/work/x"),
            "disk_full",
            "The worker's disk is full.",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk_full", "The worker's disk is full."),
        (
            caused_by(OSError(errno.ENOSPC, "No space")),
            "disk_full",
            "The disk of the object storage is full.",
        ),
        (
            OSError(errno.EROFS, "Read-only", "/srv/work/x"),
            "not_writable",
            "The work folder is not writable.",
        ),
        (blobs.StorageError("no route to the bucket"), "store", "no route to the bucket"),
        (caused_by(OSError(errno.EIO, "Input/output error", "/srv/x")), "store", "Input/output error"),
        (GetError("down"), "store", "The database did not respond."),
        (blobs.Missing("datasets/x"), "file_damaged", "missing"),
        (blobs.Damaged("datasets/x"), "file_damaged", "damaged"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "unexpected", "worker's log"),
        (KeyError("x"), "unexpected", "worker's log"),
        (Failure("disk_full"), "disk_full", "The disk is full."),
    ],
)
def test_an_error_in_the_worker_has_a_reason(error, reason, text):
    diagnosis = diagnose_error(error)
    assert (diagnosis.verdict, diagnosis.reason) == ("died", reason)
    assert text in diagnosis.message
    assert "/srv" not in diagnosis.message  # users must not see paths of the worker
    assert diagnosis.advice


def test_a_user_error_found_by_the_worker_fails_the_job():
    diagnosis = diagnose_error(Failure("base_model", "It was deleted.", "Choose another."))
    assert (diagnosis.verdict, diagnosis.message, diagnosis.advice) == (
        "fault",
        "It was deleted.",
        "Choose another.",
    )


def test_the_resume_check_counts_equal_losses_and_names_the_first_that_differs():
    check = ResumeCheck(10, {11: "0x1p+1", 12: "0x1p+2", 13: "0x1p+3"})
    assert not check.compare({"step": 11, "loss_hex": "0x1p+1"})
    assert not check.compare({"step": 12, "loss_hex": "0x1.8p+2"})
    assert check.compare({"step": 13, "loss_hex": "0x1p+3"})
    event = check.report()
    assert (event["equal"], event["steps"], event["exact"], event["different"]) == (2, 3, False, [12])
    assert "2 of 3" in event["message"]

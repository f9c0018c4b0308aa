"""One attempt at a job, from its claim to its end. The trainer is a child of this process.

The trainer has no credentials and no access to the stores: it reads files, writes files and prints lines. This module fetches
what it needs, numbers and stores its events, uploads its checkpoints and carries out the user's requests (`desired`). One
thread does all of this in short turns (`_turn`), so that the lease is always renewed in time. Only files are copied in
separate threads.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from django.conf import settings
from pynamodb.exceptions import PynamoDBException

from jobs.lifecycle import finalize
from jobs.lifecycle.transitions import Claim, LostRace
from jobs.store import failpoints
from jobs.store.child_process import Child
from jobs.store.states import JobStatus
from jobs.worker import artifacts, exit_diagnosis, prepare, prewarmed
from jobs.worker.attempt_writer import Writer
from jobs.worker.exit_diagnosis import ExitDiagnosis
from jobs.worker.trainer_output import TrainerOutput
from training.plan.events import Failure

log = logging.getLogger(__name__)
Result = TypeVar("Result")

TURN_S = 0.1
UPLOAD_RETRY_S = 600  # how long to retry storing the model at the end of a job
SILENCE_SHOWN_AFTER = 0.25  # fraction of the stall limit after which the page shows that there is no progress


def run(claim: Claim, stop: threading.Event | None = None) -> None:
    """Runs the claimed job until it ends, is paused or cancelled, loses its lease, or `stop` is set (then the job is put back
    into the queue within 30 s). Call it from the main thread, because the trainer dies with the thread that starts it. No
    error of the job is raised; the reconciler handles what could not be recorded."""
    failpoints.hit("claimed")
    folder = prepare.work_folder(claim.job_id, claim.fencing_token)
    attempt = _Attempt(claim, stop or threading.Event(), folder)
    try:
        with prewarmed.folder_lock(folder):
            try:
                attempt.run()
            finally:
                attempt.close()
                shutil.rmtree(folder, ignore_errors=True)
    except LostRace:
        log.warning(
            "%s: the lease with fencing token %s was lost; its trainer is stopped",
            claim.job_id,
            claim.fencing_token,
        )
    except Exception as error:
        log.exception("%s: the attempt was aborted", claim.job_id)
        attempt.aborted(error)


def _in_thread(work: Callable[[], Result]) -> Future[Result]:
    """Runs in a daemon thread, which does not keep the process alive if a copy hangs (an executor's threads would)."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="files", daemon=True).start()
    return future


class _StopRequested(Exception):
    """The attempt must stop while no trainer is running."""


class _Attempt:
    def __init__(self, claim: Claim, stop: threading.Event, folder: Path) -> None:
        self.claim, self.stop, self.folder = claim, stop, folder
        self.child: Child | None = None
        self.writer = Writer(claim)
        self.output = TrainerOutput(self.writer)
        self.upload: Future[dict[str, Any]] | None = None  # one at a time
        self.deleting: Future[None] | None = None  # superseded checkpoints
        self.waiting: list[dict[str, Any]] = []  # checkpoints to upload: at most the best one and the newest
        self.stop_sent_at: float | None = None  # when the trainer was sent SIGTERM
        self.killed_by_us = ""
        self.pinged_at = 0.0
        self.started_at = time.monotonic()
        self.ran_before = float((claim.job.progress or {}).get("seconds") or 0)

    # ---- from start to end ------------------------------------------------------------------------------

    def run(self) -> None:
        job = self.claim.job
        number = int(job.attempts) + 1
        before = f" Previous attempt: {job.message}" if number > 1 and job.message else ""
        self._emit(
            "attempt",
            f"Attempt {number} (lease {self.claim.fencing_token}) on {job.worker}.{before}",
            attempt=number,
        )
        try:
            prepared = self._in_background(lambda: prepare.prepare(job, self.folder, self._check_stop))
            self._report_damaged(prepared)
            self.output.resume_check = prepared.resume_check
            diagnosis = self._train(prepared.config)
            if diagnosis.verdict == "done":
                self._succeed(prepared.config)
                return
        except _StopRequested:
            diagnosis = ExitDiagnosis("stopped")
        except (Failure, OSError, PynamoDBException, *artifacts.STORAGE_ERRORS) as error:
            log.warning("%s: %s: %s", self.claim.job_id, type(error).__name__, error)
            diagnosis = exit_diagnosis.diagnose_error(error)
        self._finish(diagnosis)

    def _train(self, config: dict[str, Any]) -> ExitDiagnosis:
        """Trains, and retries with smaller micro-batches if memory runs out."""
        while True:
            code = self._train_once(config)
            if self.stop_sent_at is not None and code != 0:
                return ExitDiagnosis("stopped")  # with a checkpoint, or killed after the grace period
            diagnosis = exit_diagnosis.diagnose(
                code,
                self.output.failed,
                killed_by_us=self.killed_by_us,
                micro_batch=self.output.micro_batch,
            )
            if diagnosis.verdict != "smaller":
                return diagnosis
            smaller = exit_diagnosis.halved(self.output.micro_batch)
            self.writer.progress["micro_batch_tokens"] = smaller
            self.writer.emit(exit_diagnosis.smaller_batch_event(smaller))
            self.output.failed = None
            config["settings"]["micro_batch_tokens"] = smaller
            self._finish_uploads(settings.JOBS["sigterm_grace_s"])
            if self.output.newest:
                config["resume_from"] = self.output.newest["path"]

    def _train_once(self, config: dict[str, Any]) -> int:
        """Runs one trainer process and returns its exit code."""
        path = self.folder / "run.json"
        path.write_text(json.dumps(config))
        self.child = child = prewarmed.take(config)
        self.output.begin()
        child.send({"config": str(path)})
        failpoints.hit("trainer started")
        while child.alive or not child.out.ended:
            self._turn()
            if not child.alive and self.output.seconds_since_exit(child) > 2:
                break  # a process that the trainer started keeps the pipe open
        self._read_output()
        if not self.output.ready and not self.stop_sent_at and not self.killed_by_us:
            log.warning("%s: the trainer exited before it was ready", self.claim.job_id)
        child.kill()
        self.child = None
        assert child.process.returncode is not None
        return child.process.returncode

    def _succeed(self, config: dict[str, Any]) -> None:
        failpoints.hit("trainer done")
        done = self.output.done
        assert done
        prefix = f"{self.claim.prefix}final/"
        folder = Path(done["path"])
        until = time.monotonic() + UPLOAD_RETRY_S
        self._finish_uploads(5)
        while True:
            try:
                files = self._in_background(lambda: artifacts.put_verified(folder, prefix, done["files"]))
                break
            except artifacts.STORAGE_ERRORS as error:
                if time.monotonic() > until:
                    raise
                log.warning("%s: the model could not be stored yet: %s", self.claim.job_id, error)
                self._wait(2)
        result: dict[str, Any] = {
            name: done[name] for name in ("step", "kept_step", "early", "metrics", "fidelity") if name in done
        }
        if self.output.verdict:
            result["verdict"] = self.output.verdict
        self.writer.report_unfinished(self.output.resume_check)
        self._flush()
        failpoints.hit("model stored")
        self._retry_write(
            lambda: self.claim.finish(JobStatus.SUCCEEDED, result=result | {"prefix": prefix, "files": files})
        )

    def _finish(self, diagnosis: ExitDiagnosis) -> None:
        """Ends an attempt that did not succeed."""
        if diagnosis.verdict == "stopped" or self.claim.desired == "cancel":
            self._finish_uploads(5)
            self._flush(10)
            if self.claim.desired == "run":
                self._retry_write(self.claim.give_back)
            elif self.claim.desired == "pause":
                self._retry_write(lambda: self.claim.finish(JobStatus.PAUSED))
            else:
                self._retry_write(lambda: self.claim.finish(JobStatus.CANCELLED))
            return
        self._finish_uploads(settings.JOBS["sigterm_grace_s"])
        self.writer.report_unfinished(self.output.resume_check)
        if not self.output.failed:
            self._emit("log", diagnosis.message, level="error")
        self._flush()
        reason, message, advice = diagnosis.reason, diagnosis.message, diagnosis.advice
        if diagnosis.verdict == "fault":
            self._retry_write(
                lambda: self.claim.finish(JobStatus.FAILED, reason, message=message, advice=advice)
            )
        else:
            self._retry_write(lambda: self.claim.trainer_died(reason, message, advice))

    def aborted(self, error: Exception) -> None:
        """Reports an error of the worker itself, if the store can be reached."""
        diagnosis = exit_diagnosis.diagnose_error(error)
        try:
            self.claim.trainer_died(diagnosis.reason, diagnosis.message, diagnosis.advice)
        except Exception:
            log.warning(
                "%s: the error could not be recorded; the reconciler will handle the job", self.claim.job_id
            )

    def close(self) -> None:
        if self.child:
            self.child.kill()

    # ---- turns -------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """One turn of a tenth of a second: reads output, writes to the store, copies files, carries out requests and checks
        limits."""
        self._read_output(TURN_S)
        self.writer.progress["seconds"] = round(self.ran_before + time.monotonic() - self.started_at, 1)
        self._report_silence()
        self.writer.write()
        self._uploads()
        if self.child:
            if time.monotonic() - self.pinged_at > settings.JOBS["heartbeat_s"]:
                self.pinged_at = time.monotonic()
                self.child.heartbeat()
            self._follow_requests(self.child)
            self._enforce_limits(self.child)

    def _read_output(self, wait: float = 0.0) -> None:
        if self.child is None:
            time.sleep(wait)
            return
        for checkpoint in self.output.read(self.child, wait):
            self.waiting = artifacts.queue(
                self.waiting, artifacts.set_aside(checkpoint, self.folder / "outbox")
            )

    def _uploads(self) -> None:
        """Moves the pointer once a checkpoint is stored and verified, then uploads the next one."""
        if self.upload and self.upload.done():
            future, self.upload = self.upload, None
            try:
                self.writer.pointer = future.result()
            except Exception as error:
                log.warning("%s: a checkpoint could not be stored: %s", self.claim.job_id, error)
                why = exit_diagnosis.diagnose_error(error).message
                self._emit(
                    "log",
                    f"A checkpoint could not be stored. The worker will store the next one. {why}",
                    level="warning",
                )
        if self.waiting and self.upload is None and self.writer.pointer is None:
            checkpoint = self.waiting.pop(0)
            self.upload = _in_thread(lambda: artifacts.put_checkpoint(checkpoint, self.claim.prefix))
        self._delete_superseded()

    def _delete_superseded(self) -> None:
        """Deletes superseded checkpoints. Any that cannot be deleted now are deleted with the next ones or after the job's end."""
        if self.deleting and self.deleting.done():
            if error := self.deleting.exception():
                log.warning("%s: superseded checkpoints could not be deleted: %s", self.claim.job_id, error)
            self.deleting = None
        if self.writer.pointer_moved and self.deleting is None:
            self.writer.pointer_moved = False
            job = self.claim.job
            self.deleting = _in_thread(lambda: finalize.after_pointer(job))

    def _follow_requests(self, child: Child) -> None:
        """SIGTERM lets the trainer write a checkpoint. If it does not exit in time it is killed."""
        cancel = self.claim.desired == "cancel"
        if self.stop_sent_at is None and (self.stop.is_set() or self.claim.desired != "run"):
            self.stop_sent_at = time.monotonic()
            child.signal(signal.SIGTERM)
        grace = settings.JOBS["cancel_grace_s" if cancel else "sigterm_grace_s"]
        if self.stop_sent_at is not None and time.monotonic() - self.stop_sent_at > grace and child.alive:
            log.warning("%s: the trainer did not stop in time and is killed", self.claim.job_id)
            child.kill_group()

    def _enforce_limits(self, child: Child) -> None:
        """Stops a trainer that stalls, runs too long or prints too much."""
        if self.stop_sent_at is not None or self.killed_by_us:
            return
        limits = settings.JOBS
        if self.output.silent_for() > self._silence_limit():
            self.killed_by_us = "stalled"
        elif self.writer.progress["seconds"] > limits["max_runtime_s"]:
            self.killed_by_us = "time_limit"
        elif self.writer.next_seq > limits["max_events"]:
            self.killed_by_us = "too_many_events"
        if self.killed_by_us:
            child.kill_group()

    def _stall_limit(self) -> float:
        """The longest silence allowed during training. The notice on the page and the stall limit both use it."""
        limits = settings.JOBS
        return float(max(limits["stall_s"], limits["stall_steps"] * self.output.expected_silence()))

    def _silence_limit(self) -> float:
        """The longest silence allowed in the current phase. Times from an earlier attempt may be those of another machine, so
        they can only raise the limit."""
        if self.writer.phase == "training" and self.output.step_time_known:
            return self._stall_limit()
        return float(max(settings.JOBS["quiet_s"], self._stall_limit()))

    def _report_silence(self) -> None:
        """Reports the trainer's silence to the page, which then hides the outdated estimate of the time left."""
        progress = self.writer.progress
        silent = self.output.silent_for() if self.child else 0.0
        if silent > SILENCE_SHOWN_AFTER * self._stall_limit():
            progress |= {"silent_s": round(silent, 1), "silent_limit_s": round(self._silence_limit(), 1)}
        else:
            for name in ("silent_s", "silent_limit_s"):
                progress.pop(name, None)

    # ---- helpers -------------------------------------------------------------------------------------------

    def _in_background(self, work: Callable[[], Result]) -> Result:
        """Runs `work` in a thread while the lease is renewed."""
        future = _in_thread(work)
        while not future.done():
            self._turn()
        return future.result()

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._turn()
            self._check_stop()

    def _check_stop(self) -> None:
        if self.stop.is_set() or self.claim.desired != "run":
            raise _StopRequested

    def _finish_uploads(self, seconds: float) -> None:
        """Waits for uploads, moves the pointer, and deletes superseded checkpoints."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and (
            self.upload or self.waiting or self.writer.pointer or self.writer.pointer_moved or self.deleting
        ):
            self._turn()

    def _flush(self, seconds: float = 3600) -> None:
        """Waits until all events are stored. The store may be down for a long time; waiting ends if the lease is lost."""
        until = time.monotonic() + seconds
        self.writer.flushing = True
        while self.writer.unwritten and time.monotonic() < until:
            self._turn()
            if self.stop.is_set():
                until = min(until, time.monotonic() + 10)

    def _retry_write(self, move: Callable[[], Any]) -> None:
        """Makes the last move of the attempt. It is repeated while the store cannot be reached, with the same write each time."""
        until = time.monotonic() + (10 if self.stop.is_set() else 3600)
        while True:
            try:
                log.info("%s: %s", self.claim.job_id, move())
                return
            except PynamoDBException:
                if time.monotonic() > until:
                    raise
                time.sleep(1)

    def _report_damaged(self, prepared: prepare.Prepared) -> None:
        checkpoint = prepared.checkpoint
        if prepared.damaged:
            start = f"step {checkpoint['step']}" if checkpoint else "the beginning"
            self._emit(
                "log", f"The last checkpoint is damaged. Training resumes from {start}.", level="warning"
            )
            self._retry_write(lambda: self.claim.pointer_back(checkpoint and artifacts.entry(checkpoint)))

    def _emit(self, kind: str, message: str, **more: Any) -> None:
        self.writer.emit({"t": kind, "message": message, **more})

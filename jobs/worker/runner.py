"""One attempt at a job: from a claim to its end, beside a trainer that is a child of this process.

The trainer has no credentials and no store. It reads files, writes files and prints lines; this module fetches what it
needs, numbers and stores what it says, uploads what it makes and obeys what people want (`desired`). One thread does it
all in small turns (`_turn`), so the lease is renewed whatever else goes on; only copying of files has threads of its own.
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
from jobs.worker import artifacts, exit_diagnosis, prepare, prewarmed
from jobs.worker.attempt_writer import Writer
from jobs.worker.exit_diagnosis import Diagnosis
from jobs.worker.trainer_output import Listener
from training.plan.events import Failure

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

TURN_S = 0.1
UPLOAD_TRIES_S = 600  # the object storage may be away for so long at the end of a job
SAID_AFTER = 0.25  # of the limit while training: from then on the page says that nothing moves


def run(claim: Claim, stop: threading.Event | None = None) -> None:
    """Runs the claimed job until it ends, is paused or cancelled, is lost to another lease_owner, or `stop` is set (then it
    is given back within 30 s). Must be called from the main thread: the trainer dies with the thread that starts it.
    Never raises for anything that happens to the job; what it can't write down, the reconciler finds."""
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
            "%s: the lease with fencing token %s is lost; stopping its trainer",
            claim.job_id,
            claim.fencing_token,
        )
    except Exception as error:
        log.exception("%s: the attempt broke off", claim.job_id)
        attempt.broke_off(error)


def _in_thread(work: Callable[[], Answer]) -> Future[Answer]:
    """A thread that doesn't keep the process from ending (an executor's would: a stuck copy must not)."""
    future: Future[Answer] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="files", daemon=True).start()
    return future


class _Asked(Exception):
    """The attempt is to stop while no trainer runs."""


class _Attempt:
    def __init__(self, claim: Claim, stop: threading.Event, folder: Path) -> None:
        self.claim, self.stop, self.folder = claim, stop, folder
        self.child: Child | None = None
        self.writer = Writer(claim)
        self.listener = Listener(self.writer)
        self.upload: Future[dict[str, Any]] | None = None  # one at a time
        self.deleting: Future[None] | None = None  # superseded checkpoints
        self.waiting: list[
            dict[str, Any]
        ] = []  # checkpoints to be uploaded: the best one and the newest, no more
        self.told_at: float | None = None  # when the trainer was asked to stop
        self.killed_by_us = ""
        self.beat_at = 0.0
        self.began = time.monotonic()
        self.ran_before = float((claim.job.progress or {}).get("seconds") or 0)

    # ---- the story, top to bottom ------------------------------------------------------------------------------

    def run(self) -> None:
        job = self.claim.job
        number = int(job.attempts) + 1
        before = f" Before: {job.message}" if number > 1 and job.message else ""
        self._say(
            "attempt",
            f"Attempt {number} (lease {self.claim.fencing_token}) on {job.worker}.{before}",
            attempt=number,
        )
        try:
            found = self._beside(lambda: prepare.prepare(job, self.folder, self._unless_asked))
            self._tell_of(found)
            self.listener.proof = found.proof
            diagnosis = self._train(found.config)
            if diagnosis.verdict == "done":
                self._succeed(found.config)
                return
        except _Asked:
            diagnosis = Diagnosis("stopped")
        except (Failure, OSError, PynamoDBException, *artifacts.STORAGE_ERRORS) as error:
            log.warning("%s: %s: %s", self.claim.job_id, type(error).__name__, error)
            diagnosis = exit_diagnosis.of_error(error)
        self._settle(diagnosis)

    def _train(self, config: dict[str, Any]) -> Diagnosis:
        """Trains, with smaller micro-batches if memory runs out."""
        while True:
            code = self._train_once(config)
            if self.told_at is not None and code != 0:
                return Diagnosis("stopped")  # with a checkpoint, or killed because it took too long
            diagnosis = exit_diagnosis.diagnose(
                code,
                self.listener.failed,
                killed_by_us=self.killed_by_us,
                micro_batch=self.listener.micro_batch,
            )
            if diagnosis.verdict != "smaller":
                return diagnosis
            smaller = exit_diagnosis.halved(self.listener.micro_batch)
            self.writer.progress["micro_batch_tokens"] = smaller
            self.writer.say(exit_diagnosis.told_smaller(smaller))
            self.listener.failed = None
            config["settings"]["micro_batch_tokens"] = smaller
            self._finish_uploads(settings.JOBS["sigterm_grace_s"])
            if self.listener.newest:
                config["resume_from"] = self.listener.newest["path"]

    def _train_once(self, config: dict[str, Any]) -> int:
        """One trainer from its start to its exit code."""
        path = self.folder / "run.json"
        path.write_text(json.dumps(config))
        self.child = child = prewarmed.take(config)
        self.listener.begin()
        child.send({"config": str(path)})
        failpoints.hit("trainer started")
        while child.alive or not child.out.ended:
            self._turn()
            if not child.alive and self.listener.deaf_since(child) > 2:
                break  # a grandchild holds the pipe open
        self._hear()
        if not self.listener.ready and not self.told_at and not self.killed_by_us:
            log.warning("%s: the trainer ended before it was ready", self.claim.job_id)
        child.kill()
        self.child = None
        assert child.process.returncode is not None
        return child.process.returncode

    def _succeed(self, config: dict[str, Any]) -> None:
        failpoints.hit("trainer done")
        done = self.listener.done
        assert done
        prefix = f"{self.claim.prefix}final/"
        folder = Path(done["path"])
        until = time.monotonic() + UPLOAD_TRIES_S
        self._finish_uploads(5)
        while True:
            try:
                files = self._beside(lambda: artifacts.put_verified(folder, prefix, done["files"]))
                break
            except artifacts.STORAGE_ERRORS as error:
                if time.monotonic() > until:
                    raise
                log.warning("%s: the model can't be stored yet: %s", self.claim.job_id, error)
                self._wait(2)
        result: dict[str, Any] = {
            name: done[name] for name in ("step", "metrics", "fidelity") if name in done
        }
        if self.listener.verdict:
            result["verdict"] = self.listener.verdict
        self.writer.end_proof(self.listener.proof)
        self._flush()
        failpoints.hit("model stored")
        self._insist(
            lambda: self.claim.finish("succeeded", result=result | {"prefix": prefix, "files": files})
        )

    def _settle(self, diagnosis: Diagnosis) -> None:
        """Every ending but success."""
        if diagnosis.verdict == "stopped" or self.claim.desired == "cancel":
            self._finish_uploads(5)
            self._flush(10)
            if self.claim.desired == "run":
                self._insist(self.claim.give_back)
            elif self.claim.desired == "pause":
                self._insist(lambda: self.claim.finish("paused"))
            else:
                self._insist(lambda: self.claim.finish("cancelled"))
            return
        self._finish_uploads(settings.JOBS["sigterm_grace_s"])
        self.writer.end_proof(self.listener.proof)
        if not self.listener.failed:
            self._say("log", diagnosis.message, level="error")
        self._flush()
        reason, message, advice = diagnosis.reason, diagnosis.message, diagnosis.advice
        if diagnosis.verdict == "fault":
            self._insist(lambda: self.claim.finish("failed", reason, message=message, advice=advice))
        else:
            self._insist(lambda: self.claim.trainer_died(reason, message, advice))

    def broke_off(self, error: Exception) -> None:
        """A fault of ours: say so, if anybody still listens."""
        diagnosis = exit_diagnosis.of_error(error)
        try:
            self.claim.trainer_died(diagnosis.reason, diagnosis.message, diagnosis.advice)
        except Exception:
            log.warning("%s: left to the reconciler", self.claim.job_id)

    def close(self) -> None:
        if self.child:
            self.child.kill()

    # ---- turns -------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """A tenth of a second of everything: hear the trainer, write to the store, copy files, obey, watch."""
        self._hear(TURN_S)
        self.writer.progress["seconds"] = round(self.ran_before + time.monotonic() - self.began, 1)
        self._note_silence()
        self.writer.write()
        self._uploads()
        if self.child:
            if time.monotonic() - self.beat_at > settings.JOBS["heartbeat_s"]:
                self.beat_at = time.monotonic()
                self.child.heartbeat()
            self._obey(self.child)
            self._watch(self.child)

    def _hear(self, wait: float = 0.0) -> None:
        if self.child is None:
            time.sleep(wait)
            return
        for checkpoint in self.listener.hear(self.child, wait):
            self.waiting = artifacts.queue(
                self.waiting, artifacts.set_aside(checkpoint, self.folder / "outbox")
            )

    def _uploads(self) -> None:
        """The pointer moves once the bytes are stored and verified; then the next waiting checkpoint has its turn."""
        if self.upload and self.upload.done():
            future, self.upload = self.upload, None
            try:
                self.writer.pointer = future.result()
            except Exception as error:
                log.warning("%s: a checkpoint was not stored: %s", self.claim.job_id, error)
                why = exit_diagnosis.of_error(error).message
                self._say(
                    "log",
                    f"A checkpoint could not be stored; the next one will be tried. {why}",
                    level="warning",
                )
        if self.waiting and self.upload is None and self.writer.pointer is None:
            checkpoint = self.waiting.pop(0)
            self.upload = _in_thread(lambda: artifacts.put_checkpoint(checkpoint, self.claim.prefix))
        self._delete_superseded()

    def _delete_superseded(self) -> None:
        """What can't be deleted now is deleted with the next ones, at the latest when the job has ended."""
        if self.deleting and self.deleting.done():
            if error := self.deleting.exception():
                log.warning("%s: superseded checkpoints are left: %s", self.claim.job_id, error)
            self.deleting = None
        if self.writer.pointer_moved and self.deleting is None:
            self.writer.pointer_moved = False
            job = self.claim.job
            self.deleting = _in_thread(lambda: finalize.after_pointer(job))

    def _obey(self, child: Child) -> None:
        """SIGTERM lets the trainer write a checkpoint; who doesn't end in time is killed."""
        cancel = self.claim.desired == "cancel"
        if self.told_at is None and (self.stop.is_set() or self.claim.desired != "run"):
            self.told_at = time.monotonic()
            child.signal(signal.SIGTERM)
        grace = settings.JOBS["cancel_grace_s" if cancel else "sigterm_grace_s"]
        if self.told_at is not None and time.monotonic() - self.told_at > grace and child.alive:
            log.warning("%s: the trainer does not stop and is killed", self.claim.job_id)
            child.kill_group()

    def _watch(self, child: Child) -> None:
        """Stalls, endless runs and endless talk."""
        if self.told_at is not None or self.killed_by_us:
            return
        limits = settings.JOBS
        if self.listener.silent_for() > self._patience():
            self.killed_by_us = "stalled"
        elif self.writer.progress["seconds"] > limits["max_runtime_s"]:
            self.killed_by_us = "time_limit"
        elif self.writer.next_seq > limits["max_events"]:
            self.killed_by_us = "too_many_events"
        if self.killed_by_us:
            child.kill_group()

    def _stall_limit(self) -> float:
        """The longest silence of a trainer that trains. The page and the end of a stalled one both follow from it."""
        limits = settings.JOBS
        return float(max(limits["stall_s"], limits["stall_steps"] * self.listener.expected_silence()))

    def _patience(self) -> float:
        """The longest silence now. What an earlier attempt measured may have been another machine's, so it only adds."""
        if self.writer.phase == "training" and self.listener.knows_its_step:
            return self._stall_limit()
        return float(max(settings.JOBS["quiet_s"], self._stall_limit()))

    def _note_silence(self) -> None:
        """For the page: a time left that was told long ago is no news."""
        progress = self.writer.progress
        silent = self.listener.silent_for() if self.child else 0.0
        if silent > SAID_AFTER * self._stall_limit():
            progress |= {"silent_s": round(silent, 1), "silent_limit_s": round(self._patience(), 1)}
        else:
            for name in ("silent_s", "silent_limit_s"):
                progress.pop(name, None)

    # ---- small parts -------------------------------------------------------------------------------------------

    def _beside(self, work: Callable[[], Answer]) -> Answer:
        """Does `work` in a thread while the lease is renewed."""
        future = _in_thread(work)
        while not future.done():
            self._turn()
        return future.result()

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._turn()
            self._unless_asked()

    def _unless_asked(self) -> None:
        if self.stop.is_set() or self.claim.desired != "run":
            raise _Asked

    def _finish_uploads(self, seconds: float) -> None:
        """Waits for what is being stored, moves the pointer, and deletes what it no longer names."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and (
            self.upload or self.waiting or self.writer.pointer or self.writer.pointer_moved or self.deleting
        ):
            self._turn()

    def _flush(self, seconds: float = 3600) -> None:
        """Until everything said is stored. The store may be away long; the lease decides whether we may go on."""
        until = time.monotonic() + seconds
        self.writer.hurry = True
        while self.writer.unwritten and time.monotonic() < until:
            self._turn()
            if self.stop.is_set():
                until = min(until, time.monotonic() + 10)

    def _insist(self, move: Callable[[], Any]) -> None:
        """The last move. Repeated while the store is away: it is the same write each time."""
        until = time.monotonic() + (10 if self.stop.is_set() else 3600)
        while True:
            try:
                log.info("%s: %s", self.claim.job_id, move())
                return
            except PynamoDBException:
                if time.monotonic() > until:
                    raise
                time.sleep(1)

    def _tell_of(self, found: prepare.Prepared) -> None:
        if found.bad:
            where = f"step {found.used['step']}" if found.used else "the beginning"
            self._say(
                "log", f"The last checkpoint does not verify; training goes on from {where}.", level="warning"
            )
            self._insist(lambda: self.claim.pointer_back(found.used and artifacts.entry(found.used)))

    def _say(self, kind: str, message: str, **more: Any) -> None:
        self.writer.say({"t": kind, "message": message, **more})

"""What a Celery worker process runs in addition to its tasks: the reconciler, a prewarmed trainer, the inference worker.

A training worker runs one task at a time in its main thread (`-P solo`), because a trainer must be the child of a thread that
lives as long as the process. STOP is set when the worker is asked to stop.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import random
import shutil
import threading
import time
from dataclasses import asdict
from pathlib import Path

from django.conf import settings
from pynamodb.exceptions import PynamoDBException

from jobs.inference import inference_worker
from jobs.lifecycle import transitions
from jobs.store import blobs, redis_client
from jobs.store.queue import WorkerInfo
from jobs.store.tables import Worker
from jobs.worker import prewarmed

log = logging.getLogger(__name__)

_started_at = time.time()
STOP = threading.Event()  # set by SIGTERM
EXIT_DEADLINE_S = (
    40.0  # a job is back in the queue after at most 30 s, and a supervisor kills the worker after 45 s
)
UNSIGN_OF_LIFE_S = (
    60.0  # if a message waits this long while the worker is idle, the worker's subscription is broken
)
SIGN_OF_LIFE_S = 15.0  # between two updates of the worker's row
_busy = threading.Event()  # run_next is running
_current_job = ""


def start(queues: set[str]) -> None:
    """Called in the worker's main thread when it is ready."""
    clear_leftovers()
    if "training" in queues:
        prewarmed.warm_up()
        notify_self()
    if "inference" in queues:
        inference_worker.SERVER.start()
    threading.Thread(target=_reconcile, args=(queues,), name="reconciler", daemon=True).start()
    threading.Thread(target=_exit_in_time, name="exit-deadline", daemon=True).start()


def _exit_in_time() -> None:
    """Ends a process that hangs after SIGTERM. Its lease then expires like that of any lost worker."""
    STOP.wait()
    time.sleep(EXIT_DEADLINE_S)
    log.error("this worker did not stop in time; its stack traces follow")
    faulthandler.dump_traceback()
    os._exit(1)


def finish() -> None:
    """Called last when a worker stops."""
    inference_worker.SERVER.stop()
    prewarmed.shut_down()


class Busy:
    """`with Busy():` surrounds the work of a training worker, so that the subscription check ignores the worker meanwhile."""

    def __enter__(self) -> None:
        _busy.set()

    def __exit__(self, *_: object) -> None:
        _busy.clear()


def capabilities() -> WorkerInfo:
    """This worker and the hardware that it offers to jobs."""
    here = prewarmed.machine()
    return transitions.this_worker(memory=here.memory, gpu=here.device == "cuda", devices=here.count)


def set_current_job(job_id: str) -> None:
    global _current_job
    _current_job = job_id


def _sign_of_life(queues: set[str]) -> None:
    """Updates this worker's row, which tells pages and estimates which workers exist and what hardware they have."""
    for kind in queues:
        Worker(
            kind,
            transitions.this_worker().name,
            info={"machine": asdict(prewarmed.machine(idle=not _busy.is_set()))}
            if kind == "training"
            else {},
            job_id=_current_job,
            started_at=_started_at,
            last_seen=time.time(),
        ).save()


def notify_self() -> None:
    """Makes a worker look for work when it starts, without waiting for a message."""
    redis_client.enqueue_training(1)


def _reconcile(queues: set[str]) -> None:
    from jobs.worker.reconciler import Reconciler

    reconciler = Reconciler()
    subscription = _SubscriptionCheck(queues)
    signed = -SIGN_OF_LIFE_S
    while not STOP.is_set():
        try:
            if time.monotonic() - signed > SIGN_OF_LIFE_S:
                _sign_of_life(queues)
                signed = time.monotonic()
            pause = reconciler.tick()
        except PynamoDBException as error:
            log.warning("reconciler: the store cannot be reached: %s", str(error)[:200])
            pause = None
        except Exception:  # a bug: try again in the next round
            log.exception("reconciler")
            pause = None
        subscription.check()
        longest = settings.JOBS["reconcile_s"] * random.uniform(0.8, 1.2)  # noqa: S311  jitter need not be secret
        STOP.wait(min(longest, pause) if pause is not None else longest)


class _SubscriptionCheck:
    """Detects that a worker no longer receives messages from its queue (a connection can die silently), and exits: the
    supervisor restarts it."""

    def __init__(self, queues: set[str]) -> None:
        self.queue = "training" if "training" in queues else None
        self.since: float | None = None

    def check(self) -> None:
        if self.queue is None:
            return
        try:
            waiting = int(redis_client.client().llen(self.queue))
        except Exception:
            waiting = 0
        if not waiting or _busy.is_set():
            self.since = None
        elif self.since is None:
            self.since = time.monotonic()
        elif time.monotonic() - self.since > UNSIGN_OF_LIFE_S:
            log.error(
                "a message is waiting in the queue but this idle worker does not receive it; restarting the worker"
            )
            os._exit(1)


def clear_leftovers() -> None:
    """Removes work folders of attempts whose worker is gone (a running one holds its lock), and partly stored files."""
    for folder in Path(settings.WORK_DIR).glob("ftjob-*/e*"):
        with prewarmed.folder_lock(folder) as locked:
            if locked:
                shutil.rmtree(folder, ignore_errors=True)
    blobs.sweep_unfinished()

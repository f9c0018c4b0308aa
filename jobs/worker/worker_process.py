"""What a Celery worker process has beside its tasks: the reconciler's thread, a warm trainer, or the relay to the server.

A training worker runs one task at a time in its main thread (`-P solo`), since the trainer must be a child of a thread
that lives as long as the process. It knows that it is asked to stop by STOP.
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
OUT_S = 40.0  # a supervisor waits 45 s before it kills; a job is given back within 30
DEAF_S = 60.0  # idle for so long beside a bell that lies in the list: the subscription is broken
HEARD_S = 15.0  # between two signs of life in the list of workers
_busy = threading.Event()  # run_next is at work
_job = ""  # what it works on


def start(queues: set[str]) -> None:
    """Called in the worker's main thread when it is ready."""
    clear_leftovers()
    if "training" in queues:
        prewarmed.warm_up()
        ring_self()
    if "inference" in queues:
        inference_worker.RELAY.start()
    threading.Thread(target=_reconcile, args=(queues,), name="reconciler", daemon=True).start()
    threading.Thread(target=_leave_in_time, name="leave", daemon=True).start()


def _leave_in_time() -> None:
    """Whatever hangs after SIGTERM hangs no longer than this. The lease then runs out, as that of any lost worker."""
    STOP.wait()
    time.sleep(OUT_S)
    log.error("this worker did not stop in time; where it stands follows")
    faulthandler.dump_traceback()
    os._exit(1)


def finish() -> None:
    """The last act of a worker that was asked to stop."""
    inference_worker.RELAY.stop()
    prewarmed.let_go()


class Busy:
    """`with Busy():` around what a training worker does; the canary leaves it alone meanwhile."""

    def __enter__(self) -> None:
        _busy.set()

    def __exit__(self, *_: object) -> None:
        _busy.clear()


def as_asked() -> WorkerInfo:
    """This worker, as one that asks for a job."""
    here = prewarmed.machine()
    return transitions.this_worker(memory=here.memory, gpu=here.device == "cuda", devices=here.count)


def holds(job_id: str) -> None:
    global _job
    _job = job_id


def _sign_of_life(queues: set[str]) -> None:
    """For people and for estimates: what workers there are, and what they compute on."""
    for kind in queues:
        Worker(
            kind,
            transitions.this_worker().name,
            info={"machine": asdict(prewarmed.machine(idle=not _busy.is_set()))}
            if kind == "training"
            else {},
            job_id=_job,
            started_at=_started_at,
            last_seen=time.time(),
        ).save()


def ring_self() -> None:
    """A worker that starts looks for work without waiting for a bell."""
    redis_client.enqueue_training(1)


def _reconcile(queues: set[str]) -> None:
    from jobs.worker.reconciler import Reconciler

    reconciler = Reconciler()
    canary = _Canary(queues)
    signed = -HEARD_S
    while not STOP.is_set():
        try:
            if time.monotonic() - signed > HEARD_S:
                _sign_of_life(queues)
                signed = time.monotonic()
            pause = reconciler.tick()
        except PynamoDBException as error:
            log.warning("reconciler: the store is away: %s", str(error)[:200])
            pause = None
        except Exception:  # a fault of ours: the next round comes
            log.exception("reconciler")
            pause = None
        canary.look()
        longest = settings.JOBS["reconcile_s"] * random.uniform(0.8, 1.2)  # noqa: S311  jitter needs no secrecy
        STOP.wait(min(longest, pause) if pause is not None else longest)


class _Canary:
    """Finds out that a worker no longer hears its queue (a connection can die without a word), and ends it: what
    watches over the workers starts it again."""

    def __init__(self, queues: set[str]) -> None:
        self.queue = "training" if "training" in queues else None
        self.since: float | None = None

    def look(self) -> None:
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
        elif time.monotonic() - self.since > DEAF_S:
            log.error("a bell lies in the queue and this idle worker doesn't hear it: starting again")
            os._exit(1)


def clear_leftovers() -> None:
    """Work folders of attempts whose worker is gone (a running one holds its lock), and files they had half stored."""
    for folder in Path(settings.WORK_DIR).glob("ftjob-*/e*"):
        with prewarmed.folder_lock(folder) as mine:
            if mine:
                shutil.rmtree(folder, ignore_errors=True)
    blobs.sweep_unfinished()

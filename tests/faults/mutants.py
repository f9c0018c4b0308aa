"""Mutation tests of the fault injection: twelve bugs, planted into the product's processes, which it must catch.

A mutant is code that runs at the start of a process (`tests/faults/planted_settings.py`, chosen by the variable MUTANT),
never in the product; three are rules of the protocol, switched off in this process (tests/jobs/lifecycle/planted.py). Each
has a fault that must find violations. Without mutants the same faults must find none.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from django.apps import AppConfig


class MutantConfig(AppConfig):
    name, label = "tests.faults", "mutants"

    def ready(self) -> None:
        IN_PROCESSES[os.environ["MUTANT"]]()


# ---- in workers ------------------------------------------------------------------------------------------------------


def leases_end_by_the_wall_clock() -> None:
    """A lease contains the time at which it expires, and each worker compares that with its own clock."""
    from django.conf import settings

    from jobs.lifecycle import moves, transitions
    from jobs.worker.reconciler import Reconciler

    real = Reconciler._job

    def job(self: Reconciler, job: Any) -> None:
        if job.status == "running" and time.time() > float(job.lease):
            transitions.lose_lease(job)
        else:
            real(self, job)

    moves.new_lease = lambda: str(time.time() + settings.JOBS["lease_s"])
    Reconciler._job = job  # type: ignore[method-assign]


def pointer_before_upload() -> None:
    """The row names a checkpoint as soon as it is written; its bytes are uploaded later."""
    from jobs.worker import artifacts

    real = artifacts.put_checkpoint

    def put(checkpoint: dict[str, Any], prefix: str) -> dict[str, Any]:
        import threading

        threading.Timer(1.5, real, (checkpoint, prefix)).start()
        name = os.path.basename(checkpoint["path"])
        key = f"{prefix}checkpoints/{name}"
        fencing_token = int(prefix.rstrip("/").rpartition("/e")[2])
        return artifacts.entry(checkpoint | {"key": key, "epoch": fencing_token}) | {
            "after": checkpoint["after"]
        }

    artifacts.put_checkpoint = put


def random_states_left_out() -> None:
    """A resumed trainer continues with other random numbers."""
    import subprocess

    from jobs.store import child_process

    def popen(argv: list[str], **options: Any) -> Any:
        return subprocess.Popen(
            ["tests.faults.planted_trainer" if a == "training" else a for a in argv], **options
        )

    replacement = SimpleNamespace(Popen=popen, PIPE=subprocess.PIPE, run=subprocess.run)
    patch.object(child_process, "subprocess", replacement).start()


def heartbeats_stop_on_sigterm() -> None:
    from jobs.worker import worker_process
    from jobs.worker.attempt_writer import Writer

    real = Writer.write
    Writer.write = lambda self: not worker_process.STOP.is_set() and real(self)  # type: ignore[method-assign]


def no_lease_before_the_first_heartbeat() -> None:
    """A claim sets no lease, and the reconciler ignores jobs without one."""
    from jobs.lifecycle import claims
    from jobs.store.tables import Job
    from jobs.worker.reconciler import Reconciler

    claim, real = claims.claim, Reconciler._job

    def claim_only(job: Any, worker: Any) -> Any:
        claimed = claim(job, worker)
        if claimed:
            claimed.job.update(actions=[Job.lease.remove()])
        return claimed

    claims.claim = claim_only
    Reconciler._job = lambda self, job: None if job.status == "running" and not job.lease else real(self, job)  # type: ignore[method-assign]


def rows_written_in_batches() -> None:
    """A heartbeat writes the whole row as its lease owner last knew it, by `batch_write`, which has no conditions."""
    from jobs.lifecycle.transitions import Claim
    from jobs.store.tables import Job

    real = Claim.heartbeat

    def heartbeat(self: Claim, progress: Any = None, metrics: Any = None, *seq: Any, **more: Any) -> str:
        known = self.job
        real(self, progress, metrics, *seq, **more)
        known.progress, known.last_seq = dict(progress or {}), self.job.last_seq
        with Job.batch_write() as batch:
            batch.save(known)
        self.job = known
        return known.desired

    Claim.heartbeat = heartbeat  # type: ignore[method-assign, assignment]


def duplicate_messages_are_trusted() -> None:
    """A message that is delivered again (Celery acknowledges late) starts a job that already runs."""
    from jobs.lifecycle import claims, moves
    from jobs.store import queue
    from jobs.store.tables import Job

    claim = claims.claim

    def claim_any(job: Any, worker: Any) -> Any:
        job.status = "queued"
        return claim(job, worker)

    queue.in_order = lambda jobs, served=None: [job for job in jobs if job.status in ("queued", "running")]
    moves.as_seen = lambda job: Job.version == job.version
    claims.claim = claim_any


# ---- in the web process ----------------------------------------------------------------------------------------------


def streams_share_their_events() -> None:
    """All open streams of the process share one set of watchers."""
    from jobs.events import event_log

    shared: set[Any] = set()
    real = event_log._Tailer.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        self.watchers = shared

    event_log._Tailer.__init__ = init  # type: ignore[method-assign]


def ownership_is_not_checked() -> None:
    """Signed-in users can read every job."""
    from jobs.store import access, queue, tables

    real = access.get_job_for

    def get_job_for(owner: str, job_id: str) -> Any:
        owners = [row.owner for row in queue.index_rows() if row.job_id == job_id]
        return real(owners[0] if owners else owner, job_id)

    access.get_job_for = get_job_for
    assert tables


IN_PROCESSES: dict[str, Callable[[], None]] = {
    "leases end by the wall clock": leases_end_by_the_wall_clock,
    "pointer before upload": pointer_before_upload,
    "random states left out": random_states_left_out,
    "heartbeats stop on SIGTERM": heartbeats_stop_on_sigterm,
    "no lease before the first heartbeat": no_lease_before_the_first_heartbeat,
    "rows written in batches": rows_written_in_batches,
    "duplicate messages are trusted": duplicate_messages_are_trusted,
    "streams share their events": streams_share_their_events,
    "ownership is not checked": ownership_is_not_checked,
}
# Rules of the protocol switched off (tests/jobs/lifecycle/planted.py), and the check that must notice it.
IN_PROTOCOL = {
    "heartbeats without a condition": ("fencing token is not checked", "stale_worker"),
    "events without a condition": ("chunks overwrite", "stale_worker"),
    "retries not idempotent": ("replies are believed", "claim"),
}


# ---- catching them ---------------------------------------------------------------------------------------------------


def catch(scenario: Any, only: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each bug (whose name contains one of `only`) with the violations. An empty list means that it was not caught."""
    from tests.faults import processes, user_actions, web

    faults: dict[str, Callable[[Any], Any]] = {
        "leases end by the wall clock": processes.clocks_differ,
        "pointer before upload": processes.worker_killed,
        "random states left out": processes.worker_killed,
        "heartbeats stop on SIGTERM": processes.terminated_slowly,
        "no lease before the first heartbeat": lambda scenario: processes.failpoint(scenario, "claimed"),
        "rows written in batches": lambda scenario: user_actions.cancelled(scenario, 1, "training"),
        "duplicate messages are trusted": user_actions.duplicate_messages,
        "streams share their events": web.strangers,
        "ownership is not checked": web.strangers,
    }
    scenario.run_workers(0)  # other workers would take the jobs
    for name in [*IN_PROTOCOL, *faults]:
        if any(part in name for part in only):
            yield (
                name,
                _in_protocol(*IN_PROTOCOL[name])
                if name in IN_PROTOCOL
                else _in_processes(scenario, name, faults[name]),
            )


def _in_processes(scenario: Any, name: str, fault: Callable[[Any], Any]) -> list[str]:
    scenario.run_workers(0)
    scenario.environment.variables |= {
        "DJANGO_SETTINGS_MODULE": "tests.faults.planted_settings",
        "MUTANT": name,
    }
    try:
        measured = fault(scenario)
        return list(measured.violations)
    except TimeoutError as error:  # the job never ends
        return [str(error)]
    finally:
        for variable in ("DJANGO_SETTINGS_MODULE", "MUTANT"):
            del scenario.environment.variables[variable]
        scenario.abandon()


def _in_protocol(bug: str, check: str) -> list[str]:
    from tests.faults import lost_responses
    from tests.jobs.lifecycle.planted import PLANTED

    with ExitStack() as stack:
        for target, name, new in PLANTED[bug](None):
            stack.enter_context(patch.object(target, name, new))
        return [violation for n in range(5) for violation in getattr(lost_responses, check)(random.Random(n))]

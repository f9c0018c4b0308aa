"""The outbox: short work that must not be lost, such as dataset checks, deletions and notifications.

A message is a row in the partition `work`, which is put before the work begins and removed when it is done. A worker claims
the row and renews its lease while it works. If the lease does not change for 30 s, the reconciler enqueues the message again.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from django.conf import settings
from pynamodb.exceptions import PynamoDBException

from jobs.store import redis_client, tables
from jobs.store.tables import JobIndex

log = logging.getLogger(__name__)

PARTITION = "work"
KINDS = ("check", "report", "delete", "deliver", "leave", "expire", "import")

Handler = Callable[[str, str], bool]  # (owner, id) -> whether the work is done
_handlers: dict[str, Handler] = {}
_deletions: dict[str, Handler] = {}  # by ID prefix


def handler(kind: str) -> Callable[[Handler], Handler]:
    """Registers the handler of a kind of work. jobs/apps.py imports every module that has one."""

    def register(function: Handler) -> Handler:
        _handlers[kind] = function
        return function

    return register


def deletion_handler(prefix: str) -> Callable[[Handler], Handler]:
    """Registers the function that deletes the bytes of rows whose ID begins with `prefix`. It returns False while
    something still needs them."""

    def register(function: Handler) -> Handler:
        _deletions[prefix] = function
        return function

    return register


@handler("delete")
def delete_bytes(owner: str, id: str) -> bool:
    """Deletes the bytes, the last step of a deletion: the outbox row is put first, then the tombstone."""
    return next(delete for prefix, delete in _deletions.items() if id.startswith(prefix))(owner, id)


def put(kind: str, owner: str, id: str) -> None:
    """Records the work before it begins. Idempotent."""
    tables.put_new(JobIndex(PARTITION, f"{kind}#{id}", owner=owner))


def enqueue(kind: str, owner: str, id: str, lease: str = "") -> None:
    """Sends the task message, after everything is written. Best effort."""
    if kind == "deliver":
        redis_client.enqueue("deliver", owner, id, lease)
    else:
        redis_client.enqueue("errand", kind, owner, id, lease)


def run(kind: str, owner: str, id: str, lease: str) -> None:
    """Handles the message unless a worker already does. `lease` is the row's lease when the message was sent."""
    row = JobIndex(PARTITION, f"{kind}#{id}", owner=owner)
    mine = secrets.token_hex(8)
    unchanged = JobIndex.lease == lease if lease else JobIndex.lease.does_not_exist()
    condition = JobIndex.owner.exists() & unchanged
    if not tables.update(row, [JobIndex.lease.set(mine)], condition, lambda current: current.lease == mine):
        return
    with _renewed(row):
        done = _handlers[kind](owner, id)
    if done:
        tables.remove(JobIndex, PARTITION, f"{kind}#{id}")


def pending() -> list[JobIndex]:
    return list(tables.rows(JobIndex, PARTITION))


def put_delayed(kind: str, owner: str, id: str, until: float) -> None:
    """Records work for later: the reconciler does not enqueue it before `until`."""
    put(kind, owner, f"{int(until)}#{id}")


def is_due(row: JobIndex) -> bool:
    until = row.job_id.partition("#")[2].partition("#")[0]
    return not until.isdigit() or time.time() >= int(until)


def parse(row: JobIndex) -> tuple[str, str, str]:
    """(kind, owner, id), the arguments of `enqueue`."""
    kind, _, id = row.job_id.partition("#")
    return kind, row.owner, id


@contextmanager
def _renewed(row: JobIndex) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=partial(_renew, row, stop), name="outbox-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _renew(row: JobIndex, stop: threading.Event) -> None:
    while not stop.wait(settings.JOBS["heartbeat_s"]):
        try:
            if not tables.update(row, [JobIndex.lease.set(secrets.token_hex(8))], JobIndex.owner.exists()):
                return
        except PynamoDBException:
            log.warning("could not renew the lease of %s: the store is unreachable", row.job_id)

"""Short work that must not be forgotten: checks of datasets, deletions, notices.

An errand is a row in the list `work`, put before the work it stands for and removed after it. Whoever does it claims
the row and renews its lease meanwhile; when a lease stands still for 30 s the reconciler rings for the errand again.
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
KINDS = ("check", "report", "delete", "deliver", "leave", "expire")

Handler = Callable[[str, str], bool]  # (owner, id) -> nothing is left to do
_handlers: dict[str, Handler] = {}
_deletions: dict[str, Handler] = {}  # by how the ids of what is deleted begin


def handler(kind: str) -> Callable[[Handler], Handler]:
    """Registers a function as what does this kind of work. jobs/apps.py imports every module that has one."""

    def register(function: Handler) -> Handler:
        _handlers[kind] = function
        return function

    return register


def deletion_handler(prefix: str) -> Callable[[Handler], Handler]:
    """Registers a function as what deletes the bytes behind ids that begin so. It returns False while something still
    needs them."""

    def register(function: Handler) -> Handler:
        _deletions[prefix] = function
        return function

    return register


@handler("delete")
def delete_bytes(owner: str, id: str) -> bool:
    """The last part of a deletion: entry first, then the tombstone, then the bytes."""
    return next(delete for prefix, delete in _deletions.items() if id.startswith(prefix))(owner, id)


def put(kind: str, owner: str, id: str) -> None:
    """Before the work begins. Again is harmless."""
    tables.put_new(JobIndex(PARTITION, f"{kind}#{id}", owner=owner))


def enqueue(kind: str, owner: str, id: str, lease: str = "") -> None:
    """Best effort, after everything is written."""
    if kind == "deliver":
        redis_client.enqueue("deliver", owner, id, lease)
    else:
        redis_client.enqueue("errand", kind, owner, id, lease)


def run(kind: str, owner: str, id: str, lease: str) -> None:
    """Does the errand if nobody does: `lease` is what the row said when the bell was rung."""
    row = JobIndex(PARTITION, f"{kind}#{id}", owner=owner)
    mine = secrets.token_hex(8)
    unchanged = JobIndex.lease == lease if lease else JobIndex.lease.does_not_exist()
    condition = JobIndex.owner.exists() & unchanged
    if not tables.update(row, [JobIndex.lease.set(mine)], condition, lambda found: found.lease == mine):
        return
    with _renewed(row):
        done = _handlers[kind](owner, id)
    if done:
        tables.remove(JobIndex, PARTITION, f"{kind}#{id}")


def pending() -> list[JobIndex]:
    return list(tables.rows(JobIndex, PARTITION))


def put_delayed(kind: str, owner: str, id: str, until: float) -> None:
    """An errand for later: nobody rings for it before that time."""
    put(kind, owner, f"{int(until)}#{id}")


def is_due(row: JobIndex) -> bool:
    until = row.job_id.partition("#")[2].partition("#")[0]
    return not until.isdigit() or time.time() >= int(until)


def parse(row: JobIndex) -> tuple[str, str, str]:
    """(kind, owner, id), as `enqueue` takes them."""
    kind, _, id = row.job_id.partition("#")
    return kind, row.owner, id


@contextmanager
def _renewed(row: JobIndex) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=partial(_renew, row, stop), name="errand", daemon=True)
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
            log.warning("errand %s: the store is away", row.job_id)

"""Quotas per user. A quota is a set of IDs, with its limit in the condition of the write: unlike a counter it stays
correct when a response is lost and the write is sent again. An hourly audit removes IDs of work that has ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.conf import settings
from pynamodb.expressions.condition import size

from jobs.store import tables
from jobs.store.tables import Dataset, Job, TunedModel, Usage

_size: Callable[[Any], Any] = size  # PynamoDB has no type for it
CHECKPOINTS = "checkpoints#"  # + job ID: total bytes of its checkpoints


class OverQuota(Exception):
    """The user has reached a limit. The message says which limit and what to do."""


QUOTAS = {
    "jobs": ("max_jobs_per_owner", "jobs that have not ended", "Wait for one to end, or cancel one."),
    "datasets": ("max_datasets_per_owner", "datasets", "Delete some that you no longer need."),
    "tests": ("max_webhook_tests_per_owner", "webhook tests", "Wait a minute."),
}


def take(owner: str, what: str, id: str) -> None:
    """Counts `id` against the quota. Idempotent. Raises OverQuota."""
    limit = _limit(what)
    free = Usage.ids.does_not_exist() | (_size(Usage.ids) < limit) | Usage.ids.contains(id)
    if not limit or not tables.update(
        Usage(owner, what), [Usage.ids.add({id})], free, lambda row: id in (row.ids or ())
    ):
        raise _over(what)


def _limit(what: str) -> int:
    return int(settings.JOBS[QUOTAS[what][0]])


def check(owner: str, what: str) -> None:
    """Raises OverQuota if there is no room for one more. An early check, before anything is written: only `take` is binding."""
    if len(held(owner, what)) >= _limit(what):
        raise _over(what)


def release(owner: str, what: str, id: str) -> None:
    """Removes `id` from the quota. Idempotent."""
    Usage(owner, what).update(actions=[Usage.ids.delete({id})])


def held(owner: str, what: str) -> set[str]:
    row = tables.get(Usage, owner, what)
    return set(row.ids or ()) if row else set()


def check_room(owner: str) -> None:
    """Raises OverQuota if there is no room for more bytes or another model. Called before a job or a file of unknown size is
    accepted."""
    limit, max_models = (
        int(settings.JOBS["max_stored_bytes_per_owner"]),
        int(settings.JOBS["max_models_per_owner"]),
    )
    models = _sizes(TunedModel, owner)
    if stored_bytes(owner, models) >= limit:
        raise _full(limit)
    if len(models) >= max_models:
        raise OverQuota(f"You have reached the limit of {max_models:,} models. Delete some first.")


def check_fits(owner: str) -> None:
    """Called after a file of unknown size was received, since several may have arrived at once. Raises OverQuota."""
    limit = int(settings.JOBS["max_stored_bytes_per_owner"])
    if stored_bytes(owner) > limit:
        raise _full(limit)


def stored_bytes(owner: str, models: list[int] | None = None) -> int:
    """Total bytes of a user's files, models and checkpoints. Pass the `models`' sizes if you have read them already."""
    models = _sizes(TunedModel, owner) if models is None else models
    return sum(_sizes(Dataset, owner)) + sum(models) + checkpoint_bytes(owner)


def checkpoint_bytes(owner: str) -> int:
    usage = tables.rows(Usage, owner, Usage.what.startswith(CHECKPOINTS))
    return sum(int((row.data or {})["bytes"]) for row in usage)


def record_checkpoint_bytes(job: Job) -> None:
    """Records the total bytes of a job's checkpoints in a separate row, because adding them up from the jobs themselves
    would read a megabyte per hundred jobs. Idempotent; an outdated job never overwrites newer data."""
    own = [entry for entry in job.checkpoints if str(entry["key"]).startswith(f"jobs/{job.job_id}/")]
    total = 0 if job.deleted else sum(int(entry.get("bytes") or 0) for entry in own)
    row = Usage(job.owner, CHECKPOINTS + job.job_id, data={"bytes": total}, version=job.version)
    tables.put_if(row, Usage.version.does_not_exist() | (Usage.version < job.version), lambda current: True)


def _full(limit: int) -> OverQuota:
    return OverQuota(
        f"Your files, models and checkpoints have reached your storage limit of {limit:,} bytes. "
        "Delete files, models or jobs first."
    )


def reserve(owner: str, id: str, size: int) -> None:
    """Reserves bytes for an upload. Idempotent. Concurrent reservations are serialized, so together they cannot exceed the
    limit. Raises OverQuota."""
    limit = int(settings.JOBS["max_stored_bytes_per_owner"])
    while True:
        row, reserved = _reservations(owner)
        if reserved.get(id) == size:
            return
        room = limit - stored_bytes(owner) - sum(reserved.values()) + reserved.get(id, 0)
        if size > room:
            raise OverQuota(
                f"The file has {size:,} bytes, but only {max(0, room):,} of your {limit:,} are free. "
                "Delete some files, models or jobs first."
            )
        if _write_reservations(
            owner, row, reserved | {id: size}, lambda current: (current.data or {}).get(id) == size
        ):
            return


def unreserve(owner: str, id: str) -> None:
    """Releases a reservation. Idempotent."""
    while True:
        row, reserved = _reservations(owner)
        if id not in reserved:
            return
        reserved.pop(id)
        if _write_reservations(owner, row, reserved, lambda current: id not in (current.data or {})):
            return


def _reservations(owner: str) -> tuple[Usage | None, dict[str, int]]:
    row = tables.get(Usage, owner, "bytes")
    return row, dict(row.data or {}) if row else {}


def _write_reservations(
    owner: str, row: Usage | None, reserved: dict[str, int], already_applied: Callable[[Usage], bool]
) -> Usage | None:
    """Returns None if another writer was first."""
    if row is None:
        return tables.put_new(Usage(owner, "bytes", data=reserved, version=1), already_applied)
    actions = [Usage.data.set(reserved), Usage.version.add(1)]
    return tables.update(row, actions, Usage.version == row.version, already_applied)


def _sizes(table: type[Dataset] | type[TunedModel], owner: str) -> list[int]:
    rows = table.query(owner, consistent_read=True, attributes_to_get=["bytes", "gone"])
    return [int(row.bytes or 0) for row in rows if not row.deleted]


def audit(owner: str, what: str, has_ended: Callable[[str], bool]) -> None:
    """Removes the IDs of work that has ended. A submission takes the quota before it puts its job, so an ID whose job is
    missing stays."""
    for id in held(owner, what):
        if has_ended(id):
            release(owner, what, id)


def _over(what: str) -> OverQuota:
    setting, name, advice = QUOTAS[what]
    return OverQuota(f"You have reached the limit of {settings.JOBS[setting]:,} {name}. {advice}")

"""How much a person may have at once. A quota is a set of ids with its limit in the condition of the write: unlike a
counter it stays right when a reply is lost and the write is sent again. An hourly audit removes ids of what has ended."""

from __future__ import annotations

from collections.abc import Callable

from django.conf import settings
from pynamodb.expressions.condition import size

from jobs.store import tables
from jobs.store.tables import Dataset, Job, TunedModel, Usage

CHECKPOINTS = "checkpoints#"  # and the job's id: how many bytes its checkpoints hold


class OverQuota(Exception):
    """The person has as many as they may; the message says of what, and what to do."""


WORDS = {
    "jobs": ("max_jobs_per_owner", "jobs that have not ended", "Wait for one to end, or cancel one."),
    "datasets": ("max_datasets_per_owner", "datasets", "Delete some that are no longer needed."),
    "tests": ("max_webhook_tests_per_owner", "webhook tests", "Wait a minute."),
}


def take(owner: str, what: str, id: str) -> None:
    """Counts `id` against the quota; again is harmless. Raises OverQuota."""
    setting, _, _ = WORDS[what]
    limit = int(settings.JOBS[setting])
    free = Usage.ids.does_not_exist() | (size(Usage.ids) < limit) | Usage.ids.contains(id)
    if not limit or not tables.update(
        Usage(owner, what), [Usage.ids.add({id})], free, lambda row: id in (row.ids or ())
    ):
        raise over(what)


def check(owner: str, what: str) -> None:
    """Is there room for one more? Asked before anything is written; `take` is what decides."""
    if len(held(owner, what)) >= int(settings.JOBS[WORDS[what][0]]):
        raise over(what)


def release(owner: str, what: str, id: str) -> None:
    """Gives the place back; again is harmless."""
    Usage(owner, what).update(actions=[Usage.ids.delete({id})])


def held(owner: str, what: str) -> set[str]:
    row = tables.get(Usage, owner, what)
    return set(row.ids or ()) if row else set()


def check_room(owner: str) -> None:
    """Is there room for more bytes and one more model? Asked before a job is taken on, or a file of unknown size."""
    limit, most = int(settings.JOBS["max_stored_bytes_per_owner"]), int(settings.JOBS["max_models_per_owner"])
    models = _sizes(TunedModel, owner)
    if stored_bytes(owner, models) >= limit:
        raise _full(limit)
    if len(models) >= most:
        raise OverQuota(f"You have {most:,} models, the most at a time. Delete some first.")


def check_fits(owner: str) -> None:
    """Asked after a file of unknown size was received: do all that came at the same time fit together?"""
    limit = int(settings.JOBS["max_stored_bytes_per_owner"])
    if stored_bytes(owner) > limit:
        raise _full(limit)


def stored_bytes(owner: str, models: list[int] | None = None) -> int:
    """What a person's files, models and checkpoints hold. `models`: their sizes, where the caller has read them."""
    models = _sizes(TunedModel, owner) if models is None else models
    return sum(_sizes(Dataset, owner)) + sum(models) + checkpoint_bytes(owner)


def checkpoint_bytes(owner: str) -> int:
    notes = tables.rows(Usage, owner, Usage.what.startswith(CHECKPOINTS))
    return sum(int((note.data or {})["bytes"]) for note in notes)


def record_checkpoint_bytes(job: Job) -> None:
    """Notes what a job's checkpoints hold, in a row of its own: reading whole jobs to add up would cost a megabyte for
    every hundred. Again is harmless, and so is an old sight of the job: a newer one stays."""
    own = [entry for entry in job.checkpoints if str(entry["key"]).startswith(f"jobs/{job.job_id}/")]
    size = 0 if job.deleted else sum(int(entry.get("bytes") or 0) for entry in own)
    note = Usage(job.owner, CHECKPOINTS + job.job_id, data={"bytes": size}, version=job.version)
    tables.put_if(note, Usage.version.does_not_exist() | (Usage.version < job.version), lambda found: True)


def _full(limit: int) -> OverQuota:
    return OverQuota(
        f"Your files, models and checkpoints fill the {limit:,} bytes you may store. Delete files, models or jobs first."
    )


def reserve(owner: str, id: str, size: int) -> None:
    """Sets bytes aside for what is about to come; again is harmless. Two at once are told one after the other, so together
    they can't pass the limit. Raises OverQuota."""
    limit = int(settings.JOBS["max_stored_bytes_per_owner"])
    while True:
        row, kept = _set_aside(owner)
        if kept.get(id) == size:
            return
        room = limit - stored_bytes(owner) - sum(kept.values()) + kept.get(id, 0)
        if size > room:
            raise OverQuota(
                f"The file has {size:,} bytes, and {max(0, room):,} of your {limit:,} are free. Delete some files, models or jobs first."
            )
        if _write_aside(owner, row, kept | {id: size}, lambda found: (found.data or {}).get(id) == size):
            return


def unreserve(owner: str, id: str) -> None:
    """Gives them back; again is harmless."""
    while True:
        row, kept = _set_aside(owner)
        if id not in kept:
            return
        kept.pop(id)
        if _write_aside(owner, row, kept, lambda found: id not in (found.data or {})):
            return


def _set_aside(owner: str) -> tuple[Usage | None, dict[str, int]]:
    row = tables.get(Usage, owner, "bytes")
    return row, dict(row.data or {}) if row else {}


def _write_aside(
    owner: str, row: Usage | None, kept: dict[str, int], already_applied: Callable[[Usage], bool]
) -> Usage | None:
    """None when somebody else was first."""
    if row is None:
        return tables.put_new(Usage(owner, "bytes", data=kept, version=1), already_applied)
    actions = [Usage.data.set(kept), Usage.version.add(1)]
    return tables.update(row, actions, Usage.version == row.version, already_applied)


def _sizes(table: type[Dataset] | type[TunedModel], owner: str) -> list[int]:
    found = table.query(owner, consistent_read=True, attributes_to_get=["bytes", "gone"])
    return [int(row.bytes or 0) for row in found if not row.deleted]


def audit(owner: str, what: str, is_over: Callable[[str], bool]) -> None:
    """Removes ids of what has ended. A submission puts the id before its job, so the caller asks twice, hours apart."""
    for id in held(owner, what):
        if is_over(id):
            release(owner, what, id)


def over(what: str) -> OverQuota:
    setting, words, advice = WORDS[what]
    return OverQuota(f"You have {settings.JOBS[setting]:,} {words}, the most at a time. {advice}")

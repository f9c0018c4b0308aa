"""Fetching through the owner: what belongs to somebody else does not exist.

Lists are newest first and cost one read, plus one for each page of deleted rows that lies between.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from operator import and_
from typing import Generic, TypeVar

from pynamodb.expressions.condition import Condition
from pynamodb.expressions.operand import Path

from jobs.store import tables
from jobs.store.tables import Dataset, Job, Table, TunedModel

SEARCHED = 5000  # rows after which an answer reads no further, once it has found something


class NotFound(Exception):
    """There is none of this id, or it is another's. The message is fit for a person."""


Row = TypeVar("Row", bound=Table)


@dataclass(frozen=True)
class Page(Generic[Row]):
    """Rows newest first; `after` for the next page is the last one's id."""

    rows: list[Row]
    has_more: bool

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def get_dataset_for(owner: str, dataset_id: str) -> Dataset:
    return _get(Dataset, owner, dataset_id, lambda row: not row.deleted, "dataset")


def get_job_for(owner: str, job_id: str) -> Job:
    return _get(Job, owner, job_id, is_visible, "job")


def get_model_for(owner: str, model_id: str) -> TunedModel:
    return _get(TunedModel, owner, model_id, lambda row: not row.deleted, "model")


def list_datasets(
    owner: str, limit: int = 20, after: str | None = None, *, purpose: str | None = None
) -> Page[Dataset]:
    if purpose is not None:
        return _search(Dataset, owner, limit, after, Dataset.purpose == purpose, lambda row: not row.deleted)
    return _list(Dataset, owner, limit, after, lambda row: not row.deleted)


def list_oldest_datasets(
    owner: str, limit: int = 20, after: str | None = None, *, purpose: str | None = None
) -> Page[Dataset]:
    """The other way round: oldest first."""
    rows = tables.rows(Dataset, owner, Dataset.dataset_id > after if after is not None else None)
    shown = (row for row in rows if not row.deleted and purpose in (None, row.purpose))
    found = list(islice(shown, limit + 1))
    return Page(found[:limit], len(found) > limit)


def list_jobs(
    owner: str,
    limit: int = 20,
    after: str | None = None,
    *,
    status: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Page[Job]:
    """With `status` or `metadata`, a page may have fewer rows than `limit` although there are more."""
    conditions: list[Condition] = [Job.status == status] if status is not None else []
    wanted = dict(metadata or {})
    # Stored as JSON text. A text that holds the pair may still be another's, so the rows are compared once more.
    conditions += [
        Path("metadata").contains(f"{json.dumps(name)}: {json.dumps(value)}")
        for name, value in wanted.items()
    ]
    if not conditions:
        return _list(Job, owner, limit, after, is_visible)
    return _search(
        Job,
        owner,
        limit,
        after,
        reduce(and_, conditions),
        lambda job: is_visible(job) and wanted.items() <= (job.metadata or {}).items(),
    )


def list_models(owner: str, limit: int = 20, after: str | None = None) -> Page[TunedModel]:
    """A model's id begins with its base, not with a time, so all of the owner's are read (the quota bounds them)."""
    models = [row for row in tables.rows(TunedModel, owner) if not row.deleted]
    models.sort(key=lambda row: (row.created_at, row.model_id), reverse=True)
    start = next((i + 1 for i, row in enumerate(models) if row.model_id == after), 0)
    return Page(models[start : start + limit], len(models) > start + limit)


def is_visible(job: Job) -> bool:
    """Deleted jobs are tombstones, and a void one never came to be."""
    return not job.deleted and job.status != "void"


def _get(table: type[Row], owner: str, id: str, shown: Callable[[Row], bool], word: str) -> Row:
    row = tables.get(table, owner, id) if id.isascii() and 0 < len(id) <= 1024 else None
    if row is None or not shown(row):
        raise NotFound(f"There is no {word} {id}.")
    return row


def _list(
    table: type[Row], owner: str, limit: int, after: str | None, shown: Callable[[Row], bool]
) -> Page[Row]:
    found: list[Row] = []
    for row in tables.newest(table, owner, limit + 1, after):
        if shown(row):
            found.append(row)
            if len(found) > limit:
                break
    return Page(found[:limit], len(found) > limit)


def _search(
    table: type[Row],
    owner: str,
    limit: int,
    after: str | None,
    where: Condition,
    shown: Callable[[Row], bool],
) -> Page[Row]:
    """Rows that are few among many. An empty page would end the list for OpenAI's clients, so it reads on until there is
    something to show, or nothing left; with something to show it stops after SEARCHED rows, and the next page goes on."""
    found: list[Row] = []
    for rows, read in tables.search(table, owner, where, after):
        found += [row for row in rows if shown(row)]
        if len(found) > limit or (found and read >= SEARCHED):
            return Page(found[:limit], True)
    return Page(found, False)

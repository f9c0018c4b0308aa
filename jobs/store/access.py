"""Access by owner: other users' rows do not exist.

Lists are newest first and cost one read, plus one for each page of deleted rows in between.
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
from jobs.store.states import JobStatus
from jobs.store.tables import Dataset, Job, Table, TunedModel

SEARCH_LIMIT = 5000  # the most rows read for one page once there is a match


class NotFound(Exception):
    """There is no row with this ID, or it belongs to another user. The message is shown to the user."""


Row = TypeVar("Row", bound=Table)


@dataclass(frozen=True)
class Page(Generic[Row]):
    """Rows, newest first. For the next page, pass the last row's ID as `after`."""

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
    """Oldest first."""
    rows = tables.rows(Dataset, owner, Dataset.dataset_id > after if after is not None else None)
    visible = (row for row in rows if not row.deleted and purpose in (None, row.purpose))
    matches = list(islice(visible, limit + 1))
    return Page(matches[:limit], len(matches) > limit)


def list_jobs(
    owner: str,
    limit: int = 20,
    after: str | None = None,
    *,
    status: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Page[Job]:
    """With `status` or `metadata`, a page may have fewer rows than `limit` even if more pages follow."""
    conditions: list[Condition] = [Job.status == status] if status is not None else []
    wanted = dict(metadata or {})
    # The attribute is JSON text, in which a pair may also match inside a value. So the rows are compared again below.
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
    """A model's ID begins with its base and not with a time, so all of the owner's models are read. A quota limits them."""
    models = [row for row in tables.rows(TunedModel, owner) if not row.deleted]
    models.sort(key=lambda row: (row.created_at, row.model_id), reverse=True)
    start = next((i + 1 for i, row in enumerate(models) if row.model_id == after), 0)
    return Page(models[start : start + limit], len(models) > start + limit)


def is_visible(job: Job) -> bool:
    """Deleted jobs are tombstones, and void ones were never fully submitted."""
    return not job.deleted and job.status != JobStatus.VOID


def _get(table: type[Row], owner: str, id: str, is_visible: Callable[[Row], bool], kind: str) -> Row:
    row = tables.get(table, owner, id) if id.isascii() and 0 < len(id) <= 1024 else None
    if row is None or not is_visible(row):
        raise NotFound(f"There is no {kind} {id}.")
    return row


def _list(
    table: type[Row], owner: str, limit: int, after: str | None, is_visible: Callable[[Row], bool]
) -> Page[Row]:
    matches: list[Row] = []
    for row in tables.newest(table, owner, limit + 1, after):
        if is_visible(row):
            matches.append(row)
            if len(matches) > limit:
                break
    return Page(matches[:limit], len(matches) > limit)


def _search(
    table: type[Row],
    owner: str,
    limit: int,
    after: str | None,
    where: Condition,
    is_visible: Callable[[Row], bool],
) -> Page[Row]:
    """A page of rows that may be rare. OpenAI's clients take an empty page for the end of the list, so it reads until there is
    a match or nothing is left. Once there is a match, it stops after SEARCH_LIMIT rows; the next page continues there."""
    matches: list[Row] = []
    for rows, read in tables.search(table, owner, where, after):
        matches += [row for row in rows if is_visible(row)]
        if len(matches) > limit or (matches and read >= SEARCH_LIMIT):
            return Page(matches[:limit], True)
    return Page(matches, False)

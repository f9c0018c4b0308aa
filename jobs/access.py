"""Fetching through the owner: what belongs to somebody else does not exist.

Lists are newest first and cost one read, plus one for each page of deleted rows that lies between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from jobs import tables
from jobs.tables import Dataset, Job, Table, TunedModel


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
    return _get(Dataset, owner, dataset_id, lambda row: not row.gone, "dataset")


def get_job_for(owner: str, job_id: str) -> Job:
    return _get(Job, owner, job_id, is_shown, "job")


def get_model_for(owner: str, model_id: str) -> TunedModel:
    return _get(TunedModel, owner, model_id, lambda row: not row.gone, "model")


def list_datasets(owner: str, limit: int = 20, after: str | None = None) -> Page[Dataset]:
    return _list(Dataset, owner, limit, after, lambda row: not row.gone)


def list_jobs(owner: str, limit: int = 20, after: str | None = None) -> Page[Job]:
    return _list(Job, owner, limit, after, is_shown)


def list_models(owner: str, limit: int = 20, after: str | None = None) -> Page[TunedModel]:
    """A model's id begins with its base, not with a time, so all of the owner's are read (the quota bounds them)."""
    models = [row for row in tables.rows(TunedModel, owner) if not row.gone]
    models.sort(key=lambda row: (row.created_at, row.model_id), reverse=True)
    start = next((i + 1 for i, row in enumerate(models) if row.model_id == after), 0)
    return Page(models[start : start + limit], len(models) > start + limit)


def is_shown(job: Job) -> bool:
    """Deleted jobs are tombstones, and a void one never came to be."""
    return not job.gone and job.status != "void"


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

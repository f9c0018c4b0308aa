"""`/files/{file_id}/versions`, `/split` and `/merge`: new files made from others. OpenAI's API has nothing like them."""

from __future__ import annotations

from typing import Any

from ninja import Router

from jobs.api import paging
from jobs.api.caller import WRITE, CallerRequest
from jobs.api.errors import bad
from jobs.api.files import find, show
from jobs.api.schemas.common import Error, Page
from jobs.api.schemas.files import File, FileMerge, FileSplit, VersionCreate
from jobs.datasets import versions
from jobs.store.errors import Refused
from jobs.store.tables import Dataset

router = Router(auth=WRITE)
Json = dict[str, Any]


@router.post(
    "/{file_id}/versions",
    response={200: File, 400: Error, 404: Error, 429: Error},
    summary="Edit, add or exclude rows",
)
def create_version(request: CallerRequest, file_id: str, body: VersionCreate) -> Json:
    """Makes a new file with these changes. The file itself stays unchanged. The same request twice makes one new file.

    JSONL, JSON arrays and tables keep their format; others are saved as JSONL."""
    dataset = find(request, file_id)
    versions.check_ready(dataset)
    edited, excluded = [change.row for change in body.edit], set(body.exclude)
    if len(edited) + len(excluded) != len({*edited, *excluded}):
        raise bad("Each row can be edited or excluded only once.", "edit")
    columns = versions.table_columns(dataset)
    for number, edit in enumerate(body.edit):
        _check(dataset, edit.content, f"edit.{number}.content", columns)
    for number, content in enumerate(body.add):
        _check(dataset, content, f"add.{number}", columns)
    rows: dict[str, Any] = {str(change.row): change.content for change in body.edit}
    rows |= {str(row): None for row in body.exclude}
    return show(versions.begin_edit(dataset, {"rows": rows, "added": body.add}))


@router.post(
    "/{file_id}/split",
    response={200: Page[File], 400: Error, 404: Error, 429: Error},
    summary="Split a file in two",
)
def split_file(request: CallerRequest, file_id: str, body: FileSplit) -> Json:
    """Makes two new files: the first for training, the second for validation (`validation_file` of a job)."""
    split = versions.Split(body.percent, body.seed, body.lines or "")
    pair = versions.begin_split(find(request, file_id), split)
    return paging.page([show(part) for part in pair], False)


@router.post(
    "/{file_id}/merge", response={200: File, 400: Error, 404: Error, 429: Error}, summary="Merge two files"
)
def merge_files(request: CallerRequest, file_id: str, body: FileMerge) -> Json:
    """Makes a new JSONL file with the rows of both, which must be of the same kind. Fields of the second file that have the
    same role as one of the first get its name."""
    dataset = find(request, file_id)
    return show(versions.begin_merge(dataset, find(request, body.file_id), body.filename or ""))


def _check(dataset: Dataset, content: Json, param: str, columns: list[str]) -> None:
    try:
        versions.check_change(dataset, content, 0, columns)
    except Refused as refused:
        raise bad(str(refused), param) from refused

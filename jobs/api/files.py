"""`/files`: datasets in OpenAI's format, and the result files of jobs, which are generated on request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import IO, Annotated, Any, Literal
from urllib.parse import quote

from django.http import HttpResponse, HttpResponseBase, StreamingHttpResponse
from ninja import FileEx, Form, P, Query, Router, UploadedFile

from jobs.api import paging, results
from jobs.api.caller import READ, WRITE, CallerRequest
from jobs.api.errors import bad, not_found
from jobs.api.schemas.common import Deleted, Error, Page
from jobs.api.schemas.files import File
from jobs.datasets import datasets
from jobs.store import access, blobs, tables
from jobs.store.states import DatasetStatus
from jobs.store.tables import Dataset

router = Router(auth=READ)
Json = dict[str, Any]
STATUS: dict[str, str] = {
    DatasetStatus.RECEIVING: "uploaded",
    DatasetStatus.CHECKING: "uploaded",
    DatasetStatus.READY: "processed",
    DatasetStatus.REJECTED: "error",
}
CHUNK = 256 * 1024
MAX_NAME = 255


@router.post("", response={200: File, 400: Error, 413: Error}, auth=WRITE, summary="Upload a file")
def create_file(
    request: CallerRequest,
    purpose: Annotated[str, Form(description="`fine-tune`")],
    file: FileEx[
        UploadedFile, P(description="JSONL, CSV, TSV, Parquet, plain text or a ZIP archive of plain texts")
    ],
    anchor: Annotated[Literal["created_at"] | None, Form(alias="expires_after[anchor]")] = None,
    seconds: Annotated[int | None, Form(alias="expires_after[seconds]", ge=3600, le=2_592_000)] = None,
) -> Json:
    """With `expires_after`, the file is deleted that many seconds after it was created."""
    check_purpose(purpose)
    check_name(file.name or "")
    if (anchor is None) != (seconds is None):
        raise bad("expires_after requires both anchor and seconds.", "expires_after")
    expires_at = time.time() + seconds if seconds is not None else None
    dataset = datasets.receive(
        request.auth.owner,
        datasets.name_in_form(file.name or "file"),
        file,
        purpose=purpose,
        expires_at=expires_at,
    )
    return show(dataset)


@router.get("", response={200: Page[File], 400: Error}, summary="List files")
def list_files(
    request: CallerRequest,
    after: paging.After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> Json:
    owner = request.auth.owner
    if purpose == results.PURPOSE:
        items, has_more = results.list_files(owner, limit, after)
        return paging.page(items, has_more)
    paging.check_after(tables.Dataset, owner, after)
    fetch = access.list_datasets if order == "desc" else access.list_oldest_datasets
    rows = fetch(owner, limit, after, purpose=purpose)
    return paging.page([show(row) for row in rows], rows.has_more)


@router.get("/{file_id}", response={200: File, 404: Error}, summary="Retrieve a file")
def retrieve_file(request: CallerRequest, file_id: str) -> Json:
    if results.is_result(file_id):
        return results.describe(request.auth.owner, file_id)
    return show(find(request, file_id))


@router.delete(
    "/{file_id}", response={200: Deleted, 400: Error, 404: Error}, auth=WRITE, summary="Delete a file"
)
def delete_file(request: CallerRequest, file_id: str) -> Json:
    if results.is_result(file_id):
        results.describe(request.auth.owner, file_id)
        raise bad("A result file belongs to its job and is deleted with it.", "file_id", "not_deletable")
    dataset = find(request, file_id)
    datasets.delete(request.auth.owner, dataset.dataset_id)
    return {"id": file_id, "object": "file", "deleted": True}


@router.get(
    "/{file_id}/content",
    response={200: str, 404: Error},
    openapi_extra={
        "responses": {
            200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
        }
    },
    summary="Download a file",
)
def file_content(request: CallerRequest, file_id: str) -> HttpResponseBase:
    if results.is_result(file_id):
        text = results.content(request.auth.owner, file_id)
        return _attachment(HttpResponse(text, content_type="application/octet-stream"), f"{file_id}.csv")
    dataset = find(request, file_id)
    if not dataset.key:
        raise bad("The file is still being uploaded. Try again in a moment.", "file_id", "not_ready")
    response = StreamingHttpResponse(
        _chunks(blobs.open_file(dataset.key)), content_type="application/octet-stream"
    )
    if dataset.bytes:
        response["Content-Length"] = str(int(dataset.bytes))
    return _attachment(response, dataset.name)


async def _chunks(source: IO[bytes]) -> AsyncIterator[bytes]:
    """Yields the file in chunks. A thread is used only during each read, and the whole file is never in memory."""
    try:
        while chunk := await asyncio.to_thread(source.read, CHUNK):
            yield chunk
    finally:
        source.close()


def _attachment(response: HttpResponseBase, name: str) -> HttpResponseBase:
    response["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(name, safe='')}"
    response["X-Content-Type-Options"] = "nosniff"
    return response


def find(request: CallerRequest, file_id: str) -> Dataset:
    try:
        return access.get_dataset_for(request.auth.owner, file_id)
    except access.NotFound as error:
        raise not_found("File object") from error


def check_purpose(purpose: str) -> None:
    if purpose != "fine-tune":
        raise bad(f"The purpose '{purpose[:64]}' is not supported. Use 'fine-tune'.", "purpose")


def check_name(name: str) -> None:
    if not name or len(name) > MAX_NAME or any(ord(character) < 32 for character in name):
        raise bad("The file name must have 1 to 255 characters, none of them control characters.", "filename")


def show(dataset: Any) -> Json:
    extras: Json = {"status": dataset.status}
    extras |= {name: value for name in ("format", "summary") if (value := getattr(dataset, name)) is not None}
    if dataset.sha256:
        extras["sha256"] = dataset.sha256
    return {
        "id": dataset.dataset_id,
        "object": "file",
        "bytes": int(dataset.bytes),
        "created_at": int(dataset.created_at),
        "filename": dataset.name,
        "purpose": dataset.purpose,
        "status": STATUS.get(dataset.status, "uploaded"),
        "expires_at": int(dataset.expires_at) if dataset.expires_at else None,
        "status_details": dataset.error or None,
        "llmtuner": extras,
    }


def concatenated(sources: Iterable[IO[bytes]]) -> Iterable[bytes]:
    for source in sources:
        with source:
            while chunk := source.read(CHUNK):
                yield chunk

"""`/uploads`: large files, sent in parts. Each part can be sent again, and the last call assembles the file."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from typing import Any

from django.conf import settings
from ninja import FileEx, P, Router, UploadedFile

from jobs.api import files
from jobs.api.caller import WRITE, CallerRequest
from jobs.api.errors import ApiError, bad, not_found
from jobs.api.schemas.common import Error
from jobs.api.schemas.files import Upload, UploadComplete, UploadCreate, UploadPart
from jobs.datasets import datasets, multipart
from jobs.store import blobs, outbox, quotas, tables
from jobs.store.tables import Upload as Row

router = Router(auth=WRITE)
Json = dict[str, Any]
LIFETIME_S = 3600
MAX_PARTS = 10_000
MAX_PART = 64 * 1024 * 1024
MAX_OPEN = 20  # open uploads per user; no other quota limits their parts


@router.post("", response={200: Upload, 400: Error}, summary="Create an upload")
def create_upload(request: CallerRequest, body: UploadCreate) -> Json:
    files.check_purpose(body.purpose)
    files.check_name(body.filename)
    limit = int(settings.JOBS["max_upload_bytes"])
    if body.bytes > limit:
        raise bad(f"A file can have at most {limit:,} bytes. Split it.", "bytes", "file_too_large")
    owner = request.auth.owner
    if sum(_status(row) == "pending" for row in tables.rows(Row, owner)) >= MAX_OPEN:
        raise quotas.OverQuota(f"You have {MAX_OPEN} open uploads. Complete or cancel one first.")
    row = Row(
        owner,
        tables.new_id("upload"),
        filename=body.filename,
        bytes=body.bytes,
        mime_type=body.mime_type[:100],
        purpose=body.purpose,
        keep_s=body.expires_after.seconds if body.expires_after else None,
        expires_at=time.time() + LIFETIME_S,
    )
    outbox.put("delete", owner, row.upload_id)  # deletes the parts even if the upload is abandoned
    quotas.reserve(owner, row.upload_id, body.bytes)
    tables.put_new(row)
    return show(row)


@router.post("/{upload_id}/parts", response={200: UploadPart, 400: Error, 404: Error}, summary="Add a part")
def add_part(
    request: CallerRequest,
    upload_id: str,
    data: FileEx[UploadedFile, P(description="The bytes of the part, at most 64 MB")],
) -> Json:
    row = _pending(request, upload_id)
    size = data.size or 0
    if not 0 < size <= MAX_PART:
        raise bad("A part must have at least 1 byte and at most 64 MB.", "data")
    received = sum(bytes_of(part) for part in row.part_ids or ())
    # Twice the size, because a part whose response was lost is sent again under a new id.
    if received + size > 2 * row.bytes or len(row.part_ids or ()) >= MAX_PARTS:
        raise bad("The parts exceed the declared size of the upload.", "data", "too_many_bytes")
    part_id = tables.new_id("part")
    blobs.put_file(_key(row, part_id), data)
    entry = {f"{part_id}:{size}"}
    added = tables.update(
        row,
        [Row.part_ids.add(entry)],
        Row.status == "pending",
        lambda stored: entry <= (stored.part_ids or set()),
    )
    if added is None:
        blobs.delete_prefix(_key(row, part_id))
        raise bad("This upload is no longer open. Create a new one.", "upload_id", "upload_not_pending")
    return {"id": part_id, "object": "upload.part", "created_at": int(time.time()), "upload_id": upload_id}


@router.post(
    "/{upload_id}/complete", response={200: Upload, 400: Error, 404: Error}, summary="Complete an upload"
)
def complete_upload(request: CallerRequest, upload_id: str, body: UploadComplete) -> Json:
    row = _find(request, upload_id)
    if row.status == "completed":  # a repeated request: the first response was lost
        return show(row, _dataset(row))
    row = _pending(request, upload_id)
    sizes = {part.rpartition(":")[0]: bytes_of(part) for part in row.part_ids or ()}
    unknown = [part for part in body.part_ids if part not in sizes]
    if unknown or len(set(body.part_ids)) != len(body.part_ids):
        raise bad(
            "Each part ID must belong to this upload and can appear only once.", "part_ids", "unknown_part"
        )
    total = sum(sizes[part] for part in body.part_ids)
    if total != row.bytes:
        raise bad(
            f"The parts have {total:,} bytes in total, but the upload was declared with {int(row.bytes):,}.",
            "part_ids",
            "wrong_size",
        )
    if body.md5 and body.md5.lower() != _md5(row, body.part_ids):
        raise bad("The md5 does not match the assembled file.", "md5", "checksum_mismatch")
    # The request that sets `completing` assembles the file; a concurrent one fails here.
    claimed = tables.update(row, [Row.status.set("completing")], Row.status == "pending")
    if claimed is None:
        raise ApiError(
            503, "Another request is completing this upload. Try again.", code="busy", retry_after=1
        )
    try:
        dataset = datasets.receive(
            row.owner,
            row.filename,
            _bytes(row, body.part_ids),
            purpose=row.purpose,
            expires_at=time.time() + row.keep_s if row.keep_s else None,
            reserved=True,
        )
    except BaseException:
        tables.update(claimed, [Row.status.set("pending")], Row.status == "completing")
        raise
    completed = tables.update(
        claimed,
        [Row.status.set("completed"), Row.dataset_id.set(dataset.dataset_id)],
        Row.status == "completing",
        lambda stored: stored.dataset_id == dataset.dataset_id,
    )
    multipart.discard(row)
    return show(completed or claimed, dataset)


@router.post(
    "/{upload_id}/cancel", response={200: Upload, 400: Error, 404: Error}, summary="Cancel an upload"
)
def cancel_upload(request: CallerRequest, upload_id: str) -> Json:
    row = _find(request, upload_id)
    if _status(row) == "cancelled":
        return show(row)
    row = _pending(request, upload_id)
    cancelled = tables.update(
        row,
        [Row.status.set("cancelled")],
        Row.status == "pending",
        lambda stored: stored.status == "cancelled",
    )
    if cancelled is None:
        raise bad("This upload is no longer open. Create a new one.", "upload_id", "upload_not_pending")
    multipart.discard(row)
    return show(cancelled)


# ---- helpers -----------------------------------------------------------------------------------


def _find(request: CallerRequest, upload_id: str) -> Row:
    row = tables.get(Row, request.auth.owner, upload_id)
    if row is None:
        raise not_found("upload")
    return row


def _pending(request: CallerRequest, upload_id: str) -> Row:
    row = _find(request, upload_id)
    if _status(row) != "pending":
        raise bad(f"This upload is {_status(row)}. Create a new one.", "upload_id", "upload_not_pending")
    return row


def _status(row: Row) -> str:
    if row.status == "pending" and row.expires_at < time.time():
        return "expired"
    return "pending" if row.status == "completing" else str(row.status)


def bytes_of(part: str) -> int:
    return int(part.rpartition(":")[2])


def _folder(row: Row) -> str:
    return f"uploads/{row.upload_id}/"


def _key(row: Row, part_id: str) -> str:
    return f"{_folder(row)}{part_id}"


def _bytes(row: Row, part_ids: list[str]) -> Iterator[bytes]:
    yield from files.concatenated(blobs.open_file(_key(row, part_id)) for part_id in part_ids)


def _md5(row: Row, part_ids: list[str]) -> str:
    # OpenAI's API requires MD5; the object storage checks SHA-256.
    digest = hashlib.md5(usedforsecurity=False)
    for chunk in _bytes(row, part_ids):
        digest.update(chunk)
    return digest.hexdigest()


def _dataset(row: Row) -> Any:
    return tables.get(tables.Dataset, row.owner, row.dataset_id)


def show(row: Row, dataset: Any = None) -> Json:
    return {
        "id": row.upload_id,
        "object": "upload",
        "bytes": int(row.bytes),
        "created_at": int(row.created_at),
        "expires_at": int(row.expires_at),
        "filename": row.filename,
        "purpose": row.purpose,
        "status": _status(row),
        "file": files.show(dataset) if dataset is not None else None,
    }

"""`/uploads`: a large file in parts, each sent again as often as it takes, put together at the end."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from typing import Any

from django.conf import settings
from ninja import File as Part
from ninja import Router, UploadedFile

from jobs.api import files
from jobs.api.caller import WRITE, CallerRequest
from jobs.api.errors import ApiError, bad, not_found
from jobs.api.schemas import Error, Upload, UploadComplete, UploadCreate, UploadPart
from jobs.datasets import datasets, multipart
from jobs.store import blobs, outbox, quotas, tables
from jobs.store.tables import Upload as Row

router = Router(auth=WRITE)
Json = dict[str, Any]
LIFETIME_S = 3600
MAX_PARTS = 10_000
MAX_PART = 64 * 1024 * 1024
MAX_OPEN = 20  # uploads of one person at a time: their parts count towards no other quota


@router.post("", response={200: Upload, 400: Error}, summary="Begin an upload in parts")
def create_upload(request: CallerRequest, body: UploadCreate) -> Json:
    files.check_purpose(body.purpose)
    files.check_name(body.filename)
    limit = int(settings.JOBS["max_upload_bytes"])
    if body.bytes > limit:
        raise bad(f"A file may have at most {limit:,} bytes here.", "bytes", "file_too_large")
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
    outbox.put("delete", owner, row.upload_id)  # the parts, also of an upload that nobody comes back to
    quotas.reserve(owner, row.upload_id, body.bytes)
    tables.put_new(row)
    return show(row)


@router.post("/{upload_id}/parts", response={200: UploadPart, 400: Error, 404: Error}, summary="Send a part")
def add_part(
    request: CallerRequest,
    upload_id: str,
    data: UploadedFile = Part(..., description="The bytes, at most 64 MB"),  # noqa: B008  ninja's way
) -> Json:
    row = _pending(request, upload_id)
    size = data.size or 0
    if not 0 < size <= MAX_PART:
        raise bad("A part has 1 byte to 64 MB.", "data")
    taken = sum(bytes_of(part) for part in row.part_ids or ())
    # Twice, because a part whose answer was lost is sent again under a new id.
    if taken + size > 2 * row.bytes or len(row.part_ids or ()) >= MAX_PARTS:
        raise bad("The parts are larger than the upload was announced.", "data", "too_many_bytes")
    part_id = tables.new_id("part")
    blobs.put_file(_key(row, part_id), data)
    entry = {f"{part_id}:{size}"}
    kept = tables.update(
        row,
        [Row.part_ids.add(entry)],
        Row.status == "pending",
        lambda found: entry <= (found.part_ids or set()),
    )
    if kept is None:
        blobs.delete_prefix(_key(row, part_id))
        raise bad("This upload is no longer open.", "upload_id", "upload_not_pending")
    return {"id": part_id, "object": "upload.part", "created_at": int(time.time()), "upload_id": upload_id}


@router.post(
    "/{upload_id}/complete", response={200: Upload, 400: Error, 404: Error}, summary="Put the parts together"
)
def complete_upload(request: CallerRequest, upload_id: str, body: UploadComplete) -> Json:
    row = _find(request, upload_id)
    if row.status == "completed":  # asked twice: the first answer got lost
        return show(row, _dataset(row))
    row = _pending(request, upload_id)
    sizes = {part.rpartition(":")[0]: bytes_of(part) for part in row.part_ids or ()}
    unknown = [part for part in body.part_ids if part not in sizes]
    if unknown or len(set(body.part_ids)) != len(body.part_ids):
        raise bad("Each part id must be one of this upload's, and stand once.", "part_ids", "unknown_part")
    total = sum(sizes[part] for part in body.part_ids)
    if total != row.bytes:
        raise bad(
            f"The parts have {total:,} bytes together, {int(row.bytes):,} were announced.",
            "part_ids",
            "wrong_size",
        )
    if body.md5 and body.md5.lower() != _md5(row, body.part_ids):
        raise bad("The md5 of the parts put together is another one.", "md5", "checksum_mismatch")
    # Whoever sets `completing` puts the parts together; a second request at the same time finds it taken.
    claimed = tables.update(row, [Row.status.set("completing")], Row.status == "pending")
    if claimed is None:
        raise ApiError(
            503, "This upload is being completed by another request. Ask again.", code="busy", retry_after=1
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
    done = tables.update(
        claimed, [Row.status.set("completed"), Row.dataset_id.set(dataset.dataset_id)], Row.status == "completing",
        lambda found: found.dataset_id == dataset.dataset_id,
    )  # fmt: skip
    multipart.discard(row)
    return show(done or claimed, dataset)


@router.post(
    "/{upload_id}/cancel", response={200: Upload, 400: Error, 404: Error}, summary="Give an upload up"
)
def cancel_upload(request: CallerRequest, upload_id: str) -> Json:
    row = _find(request, upload_id)
    if _status(row) == "cancelled":
        return show(row)
    row = _pending(request, upload_id)
    cancelled = tables.update(
        row, [Row.status.set("cancelled")], Row.status == "pending", lambda found: found.status == "cancelled"
    )
    if cancelled is None:
        raise bad("This upload is no longer open.", "upload_id", "upload_not_pending")
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
        raise bad(f"This upload is {_status(row)}.", "upload_id", "upload_not_pending")
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
    digest = hashlib.md5(usedforsecurity=False)  # what the caller's field is; the store checks sha256
    for piece in _bytes(row, part_ids):
        digest.update(piece)
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

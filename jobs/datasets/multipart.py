"""Resumable uploads from a page: a file is sent in parts, which are then combined.

With S3, the parts are those of a multipart upload. The browser sends them directly to the bucket through presigned links, or
through this server if it cannot reach the bucket. Otherwise each part is a separate object. Sending a part again is
idempotent, and choosing the same file again resumes its upload. `/v1/uploads` uses the same table.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any

from django.conf import settings
from pynamodb.expressions.update import Action

from jobs.datasets import datasets
from jobs.datasets.datasets import Rejected
from jobs.store import access, blobs, outbox, quotas, tables
from jobs.store.states import DatasetStatus
from jobs.store.tables import Dataset, Upload, new_id

PART = 5 << 20  # bytes: S3's minimum, except for the last part. Up to three parts are in memory at once.
LIFETIME_S = 24 * 3600  # how long an upload stays open after its last part
MAX_OPEN = 20  # per user
BASE = "base-model"  # the purpose of an upload that becomes a base model: see jobs/datasets/model_imports.py
LINKS = 64  # links that are signed per request
COMBINE_S = 3600  # maximum time to combine the parts of an upload


def begin(
    owner: str, name: str, size: int, fingerprint: str = "", base: Mapping[str, str] | None = None
) -> Upload:
    """Starts an upload, or returns the open one of the same file (with the same fingerprint, name and size). `base` says that
    it is a base model: {"name", "license"}. Raises Rejected, OverQuota."""
    limit = int(settings.JOBS["max_upload_bytes"])
    if size <= 0:
        raise Rejected("The file is empty. Choose another file.")
    if size > limit:
        advice = "Import it on the server, with manage.py import_base." if base else "Split it."
        raise Rejected(f"The file has {size:,} bytes; the limit is {limit:,}. {advice}")
    purpose = BASE if base else "fine-tune"
    uploads = [row for row in tables.rows(Upload, owner) if row.target and is_open(row)]
    same = (fingerprint, size, datasets.display_name(name), dict(base or {}))
    for row in uploads:
        if fingerprint and (row.fingerprint, row.bytes, row.filename, row.base or {}) == same:
            return row
    if len(uploads) >= MAX_OPEN:
        raise quotas.OverQuota(f"You have {MAX_OPEN} open uploads. Complete or cancel one first.")
    if not base:
        quotas.check(owner, "datasets")
    row = Upload(
        owner,
        new_id("upload"),
        filename=datasets.display_name(name),
        bytes=size,
        fingerprint=fingerprint,
        purpose=purpose,
        base=dict(base) if base else None,
    )
    row.expires_at, row.target = time.time() + LIFETIME_S, new_id("file")
    outbox.put("delete", owner, row.upload_id)  # deletes the parts even if the upload is abandoned
    quotas.reserve(owner, row.upload_id, size)
    if blobs.takes_parts():
        row.multipart = blobs.begin_parts(key_of(row))
    tables.put_new(row)
    return row


def list_open(owner: str) -> list[Upload]:
    """The uploads of datasets that can be resumed on a page, newest first."""
    rows = [row for row in tables.rows(Upload, owner) if row.target and row.purpose != BASE and is_open(row)]
    return sorted(rows, key=lambda row: row.upload_id, reverse=True)


def is_open(row: Upload) -> bool:
    return row.status == "pending" and row.expires_at > time.time()


def get_for(owner: str, upload_id: str) -> Upload:
    """Raises NotFound."""
    row = tables.get(Upload, owner, upload_id)
    if row is None or not row.target:
        raise access.NotFound(f"There is no upload {upload_id}.")
    return row


def part_count(row: Upload) -> int:
    return -(-int(row.bytes) // PART)


def part_size(row: Upload, number: int) -> int:
    """The size in bytes of the part with this number, counted from 1. Raises Rejected if the file has no such part."""
    if not 0 < number <= part_count(row):
        raise Rejected("The file has no such part. Choose it again.")
    return min(PART, int(row.bytes) - (number - 1) * PART)


def received_parts(row: Upload) -> dict[int, int]:
    """The size in bytes of each part received so far."""
    if row.multipart:
        return blobs.parts_of(key_of(row), row.multipart)
    sizes: dict[int, int] = {}
    for entry in row.part_ids or ():
        name, _, size = entry.rpartition(":")
        sizes[int(name[1:6])] = int(size)
    return sizes


def part_links(row: Upload, numbers: list[int]) -> dict[int, str]:
    """Presigned links for these parts; empty if the browser must send them to this server."""
    _must_be_open(row)
    if not row.multipart:
        return {}
    return {
        number: blobs.part_link(key_of(row), row.multipart, number, part_size(row, number))
        for number in numbers[:LINKS]
    }


def put_part(row: Upload, number: int, file: IO[bytes], sha256: str = "") -> None:
    """Stores a part that was sent through this server. `sha256` is the hash that the sender computed. Raises Rejected."""
    _must_be_open(row)
    size = part_size(row, number)
    data = file.read(size + 1)  # a part fits in memory
    if len(data) != size:
        raise Rejected(f"Part {number} has {len(data):,} bytes instead of {size:,}. Send it again.")
    digest = hashlib.sha256(data).hexdigest()
    if sha256 and sha256.lower() != digest:
        raise Rejected(f"Part {number} was damaged in transit. Send it again.")
    if row.multipart:
        blobs.put_part(key_of(row), row.multipart, number, data)
        entry: set[str] = set()
    else:
        name = f"p{number:05}-{digest}"
        blobs.put_file(f"{_folder(row)}{name}", iter([data]), max_bytes=size)
        entry = {f"{name}:{size}"}
    actions: list[Action] = [Upload.expires_at.set(time.time() + LIFETIME_S)]
    if entry:
        actions.append(Upload.part_ids.add(entry))
    if tables.update(row, actions, Upload.status == "pending") is None:
        raise Rejected("This upload was completed or cancelled in the meantime. Choose the file again.")


def complete(row: Upload) -> Dataset:
    """Combines the parts and returns the dataset. Idempotent. Raises Rejected, OverQuota."""
    if row.status == "completed":
        return access.get_dataset_for(row.owner, row.dataset_id)
    must_be_whole(row)
    claimed = tables.update(row, [Upload.status.set("completing")], Upload.status == "pending")
    if claimed is None:
        raise Rejected("The upload is already being completed. Check your datasets in a moment.")
    try:
        dataset = _received(row)
    except BaseException:
        tables.update(claimed, [Upload.status.set("pending")], Upload.status == "completing")
        raise
    tables.update(
        claimed,
        [Upload.status.set("completed"), Upload.dataset_id.set(dataset.dataset_id)],
        Upload.status == "completing",
        lambda current: current.dataset_id == dataset.dataset_id,
    )
    quotas.unreserve(row.owner, row.upload_id)
    blobs.delete_prefix(_folder(row))
    return dataset


def must_be_whole(row: Upload) -> None:
    """Raises Rejected if the upload has ended or lacks a part."""
    _must_be_open(row)
    received = received_parts(row)
    missing = [n for n in range(1, part_count(row) + 1) if received.get(n) != part_size(row, n)]
    if missing:
        raise Rejected(f"Part {missing[0]} is missing. Choose the file again to resume the upload.")


def _received(row: Upload) -> Dataset:
    if row.multipart:
        return datasets.receive_multipart(
            row.owner,
            row.target,
            row.filename,
            int(row.bytes),
            lambda: blobs.finish_parts(key_of(row), row.multipart),
            fingerprint=row.fingerprint,
        )
    return datasets.receive(row.owner, row.filename, content(row), fingerprint=row.fingerprint, reserved=True)


def cancel(row: Upload) -> None:
    """Deletes the parts. Idempotent."""
    cancelled = tables.update(
        row,
        [Upload.status.set("cancelled")],
        Upload.status == "pending",
        lambda current: current.status == "cancelled",
    )
    if cancelled is not None:
        discard(row)


def discard(row: Upload) -> None:
    """Deletes the parts of an ended upload and releases its reserved bytes."""
    if row.multipart:
        blobs.drop_parts(key_of(row), row.multipart)
    blobs.delete_prefix(_folder(row))
    quotas.unreserve(row.owner, row.upload_id)


def find_duplicate(owner: str, size: int, fingerprint: str) -> Dataset | None:
    """The dataset with the same file, if this user has one. It is found by SHA-256 if the fingerprint is one, or else by the
    fingerprint."""
    if not fingerprint:
        return None
    kind, _, digest = fingerprint.partition(":")
    for dataset in access.list_datasets(owner, 100):
        same = dataset.sha256 == digest if kind == "sha256" else dataset.fingerprint == fingerprint
        if same and dataset.bytes == size and dataset.status != DatasetStatus.REJECTED:
            return dataset
    return None


def _must_be_open(row: Upload) -> None:
    if not is_open(row):
        raise Rejected("This upload has ended. Choose the file again.")


def content(row: Upload) -> Iterator[bytes]:
    """The parts in order, or the file that S3 combined. Raises Rejected if a part was sent twice with different bytes, because
    which one is newer is unknown."""
    if row.multipart:
        yield from blobs.blocks(key_of(row))
    names: dict[int, str] = {}
    for entry in sorted(row.part_ids or ()):
        name = entry.rpartition(":")[0]
        if names.setdefault(int(name[1:6]), name) != name:
            raise Rejected("The file changed during the upload. Cancel this upload and send the file again.")
    for number in sorted(names):
        yield from blobs.blocks(f"{_folder(row)}{names[number]}")


def _folder(row: Upload) -> str:
    return f"uploads/{row.upload_id}/"


def key_of(row: Upload) -> str:
    """Where S3 combines the parts: a dataset's own key, or a temporary one of a base model, which is unpacked by its check."""
    if row.purpose == BASE:
        return f"{_folder(row)}file"
    return datasets.key_of(row.owner, row.target)


def progress(row: Upload) -> dict[str, Any]:
    """The state of an upload, for the page that resumes it."""
    received = sum(received_parts(row).values())
    return {"upload": row, "came": received, "percent": int(100 * received / max(1, int(row.bytes)))}


@outbox.deletion_handler("upload-")
def _delete_parts(owner: str, upload_id: str) -> bool:
    """Deletes an upload's parts once it is completed, cancelled or expired, or once its owner is deleted."""
    row = tables.get(Upload, owner, upload_id)
    if (
        row
        and row.status in {"pending", "completing", "checking"}
        and time.time() < row.expires_at + COMBINE_S
    ):
        return False
    if row is not None:
        discard(row)
    quotas.unreserve(owner, upload_id)  # also if the upload failed before its row was put
    blobs.delete_prefix(f"uploads/{upload_id}/")
    return True

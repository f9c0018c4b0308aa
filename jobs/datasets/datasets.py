"""Uploaded files: received, checked in a separate process (jobs/datasets/checks.py), deleted.

receiving ──► checking ──► ready | rejected        Deleted datasets are tombstones.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any

from django.conf import settings

from jobs.datasets import drafts
from jobs.datasets.signals import dataset_settled
from jobs.store import access, blobs, outbox, queue, quotas, tables
from jobs.store.quotas import OverQuota
from jobs.store.states import DatasetStatus, JobStatus
from jobs.store.tables import Dataset, DatasetReport, new_id

__all__ = ["OverQuota", "Rejected", "create_pending", "delete", "finish_check", "receive", "store_content"]

STALE_UPLOAD_S = 6 * 3600  # an upload that is still incomplete after this long is abandoned
MAX_SUMMARY = 64 * 1024  # bytes of the report that are kept in the row; the full report is in object storage


class Rejected(Exception):
    """The file was rejected. The message says why and what to do."""


def name_in_form(name: str) -> str:
    """The name of a file in a multipart body as its user typed it: browsers and clients send a `"` there as %22."""
    return name.replace("%22", '"')


def receive(
    owner: str,
    filename: str,
    file: IO[bytes] | Iterable[bytes],
    *,
    purpose: str = "fine-tune",
    format: Mapping[str, Any] | None = None,
    expires_at: float | None = None,
    fingerprint: str = "",
    reserved: bool = False,
) -> Dataset:
    """Stores the file and enqueues its check. Raises Rejected or OverQuota, in which case nothing is kept.

    If the size is known, its bytes are reserved first, unless the caller has done so (`reserved`)."""
    quotas.check(owner, "datasets")
    dataset_id = new_id("file")
    size = 0 if reserved else int(getattr(file, "size", 0) or 0)
    if not reserved and not size:
        quotas.check_room(owner)
    dataset = Dataset(owner, dataset_id, name=display_name(filename), purpose=purpose, created_at=time.time())
    dataset.format, dataset.fingerprint = dict(format) if format else None, fingerprint
    if expires_at is not None:
        dataset.expires_at = expires_at
        outbox.put_delayed("expire", owner, dataset_id, expires_at)
    outbox.put("check", owner, dataset_id)
    quotas.take(owner, "datasets", dataset_id)
    tables.put_new(dataset)
    try:
        if size:
            quotas.reserve(owner, dataset_id, size)
        stored = blobs.put_file(
            key_of(owner, dataset_id), file, max_bytes=int(settings.JOBS["max_upload_bytes"])
        )
        if not stored.bytes:
            raise Rejected("The file is empty. Choose a file with one example per row.")
    except blobs.TooLarge:
        _mark_deleted(owner, dataset_id)
        raise Rejected(
            f"The file is larger than {settings.JOBS['max_upload_bytes']:,} bytes. Split it."
        ) from None
    except BaseException:
        _mark_deleted(owner, dataset_id)
        raise
    actions = [
        Dataset.status.set(DatasetStatus.CHECKING),
        Dataset.key.set(stored.key),
        Dataset.bytes.set(stored.bytes),
        Dataset.sha256.set(stored.sha256),
    ]
    received = tables.update(
        dataset, actions, Dataset.status == DatasetStatus.RECEIVING, lambda current: current.key == stored.key
    )
    if size:
        quotas.unreserve(owner, dataset_id)
    if received is None:
        raise Rejected("The upload took too long. Upload it again.")
    try:
        quotas.check_fits(owner)  # concurrent uploads may together exceed the limit
    except OverQuota:
        _mark_deleted(owner, dataset_id)
        raise
    outbox.enqueue("check", owner, dataset_id)
    return received


def receive_multipart(
    owner: str,
    dataset_id: str,
    filename: str,
    size: int,
    combine: Callable[[], None],
    *,
    fingerprint: str = "",
) -> Dataset:
    """Like `receive` for a file sent directly to the bucket; `combine` makes its parts one object. The check computes its
    SHA-256. Raises Rejected, OverQuota."""
    key = key_of(owner, dataset_id)
    outbox.put("check", owner, dataset_id)
    quotas.take(owner, "datasets", dataset_id)
    tables.put_new(
        Dataset(
            owner, dataset_id, name=display_name(filename), fingerprint=fingerprint, created_at=time.time()
        )
    )
    if blobs.size_of(key) is None:  # else a retry: the parts were already combined
        combine()
    if blobs.size_of(key) != size:
        _mark_deleted(owner, dataset_id)
        raise Rejected("The stored size does not match the file. Upload it again.")
    actions = [Dataset.status.set(DatasetStatus.CHECKING), Dataset.key.set(key), Dataset.bytes.set(size)]
    wanted = (Dataset.status == DatasetStatus.RECEIVING) & (Dataset.deleted == False)  # noqa: E712  a condition expression
    current = tables.update(Dataset(owner, dataset_id), actions, wanted, lambda current: current.key == key)
    if current is None:
        raise Rejected("The upload took too long. Upload it again.")
    outbox.enqueue("check", owner, dataset_id)
    return current


def find_duplicate(dataset: Dataset) -> Dataset | None:
    """Another dataset of this user with the same content, if any."""
    for other in access.list_datasets(dataset.owner, 100):
        if other.dataset_id != dataset.dataset_id and other.sha256 == dataset.sha256 != "":
            return other
    return None


def create_pending(owner: str, pending: Sequence[Dataset]) -> None:
    """Creates datasets whose content does not exist yet: their check will make it (jobs/datasets/versions.py). Creates all of
    them or none. Idempotent. Raises OverQuota."""
    quotas.check_room(owner)
    try:
        for dataset in pending:
            outbox.put("check", owner, dataset.dataset_id)
            quotas.take(owner, "datasets", dataset.dataset_id)
    except OverQuota:
        for dataset in pending:
            if tables.get(Dataset, owner, dataset.dataset_id) is None:
                quotas.release(owner, "datasets", dataset.dataset_id)
        raise
    for dataset in pending:
        tables.put_new(dataset)
        outbox.enqueue("check", owner, dataset.dataset_id)


def store_content(
    dataset: Dataset, file: IO[bytes], origin: Mapping[str, Any], format: Mapping[str, Any] | None = None
) -> Dataset | None:
    """Stores the content of a pending dataset. Idempotent. Returns None if it was deleted in the meantime. Raises TooLarge."""
    key = key_of(dataset.owner, dataset.dataset_id)
    stored = blobs.put_file(key, file, max_bytes=int(settings.JOBS["max_upload_bytes"]))
    actions = [
        Dataset.key.set(stored.key),
        Dataset.bytes.set(stored.bytes),
        Dataset.sha256.set(stored.sha256),
        Dataset.origin.set(dict(origin)),
    ]
    if format:
        actions.append(Dataset.format.set(dict(format)))
    wanted = (Dataset.status == DatasetStatus.CHECKING) & (Dataset.deleted == False)  # noqa: E712  a condition expression
    filled = tables.update(dataset, actions, wanted)
    if filled is None:
        blobs.delete_file(key)
    return filled


def finish_check(
    owner: str,
    dataset_id: str,
    status: str,
    *,
    summary: Mapping[str, Any] | None = None,
    format: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
    error: str = "",
    keep: bool = False,
    sha256: str = "",
) -> Dataset | None:
    """Sets the dataset to ready or rejected, with its report, and lets waiting jobs proceed. A rejected file is deleted unless
    the user may choose other columns (`keep`). Returns None if the dataset was deleted in the meantime."""
    key = key_of(owner, dataset_id)
    actions = [Dataset.status.set(status), Dataset.error.set(error[:2000])]
    if report is not None:
        text = json.dumps(report, ensure_ascii=False).encode("utf-8", "replace")
        report_key = _report_key(owner, dataset_id, hashlib.sha256(text).hexdigest())
        actions.append(Dataset.report_key.set(blobs.put_file(report_key, io.BytesIO(text)).key))
    if summary is not None:
        actions.append(Dataset.summary.set(trim_summary(summary)))
    if format is not None:
        actions.append(Dataset.format.set(dict(format)))
    if sha256:
        actions.append(Dataset.sha256.set(sha256))
    condition = (Dataset.status == DatasetStatus.CHECKING) & (Dataset.deleted == False)  # noqa: E712  a condition expression
    current = tables.update(Dataset(owner, dataset_id), actions, condition, lambda row: row.status == status)
    if current and status == DatasetStatus.REJECTED and not keep:
        blobs.delete_file(key)
    if current:
        dataset_settled.send(Dataset, owner=owner, dataset_id=dataset_id)
    return current


def recheck(owner: str, dataset_id: str, format: Mapping[str, Any]) -> Dataset:
    """Checks the file again with another format, which means with other columns. Raises NotFound, Rejected."""
    dataset = access.get_dataset_for(owner, dataset_id)
    active = (job for job in queue.active_of(owner) if not job.ended)
    if any(dataset_id in (job.dataset_id, job.validation_dataset_id) for job in active):
        raise Rejected(
            "A job that has not ended uses this dataset. Wait until it ends, or upload the file again."
        )
    if drafts.get(dataset):
        raise Rejected(
            "Some rows have changes that are not saved. Save them as a new version, or discard them."
        )
    if not dataset.key or blobs.size_of(dataset.key) is None:
        raise Rejected("The file of this dataset was deleted. Upload it again.")
    outbox.put("check", owner, dataset_id)
    wanted = Dataset.status.is_in(DatasetStatus.READY, DatasetStatus.REJECTED) & (Dataset.deleted == False)  # noqa: E712  a condition expression
    actions = [
        Dataset.status.set(DatasetStatus.CHECKING),
        Dataset.format.set(dict(format)),
        Dataset.summary.remove(),
        Dataset.report_key.set(""),
        Dataset.error.set(""),
    ]
    again = tables.update(dataset, actions, wanted, lambda current: current.format == dict(format))
    if again is None:
        raise Rejected("The dataset is being checked. Wait for its report.")
    for row in tables.rows(DatasetReport, dataset_id):
        tables.remove(DatasetReport, dataset_id, row.base)
    outbox.enqueue("check", owner, dataset_id)
    return again


def abandon_stale(owner: str, dataset_id: str) -> None:
    """Deletes an upload that was interrupted long ago. Called if the dataset is still receiving when its check starts."""
    if time.time() - tables.time_of(dataset_id) > STALE_UPLOAD_S:
        _mark_deleted(owner, dataset_id)


def delete(owner: str, dataset_id: str) -> None:
    """Deletes a dataset. It is hidden at once, and its file is deleted when no checked job needs it. Raises NotFound."""
    access.get_dataset_for(owner, dataset_id)
    _mark_deleted(owner, dataset_id)
    dataset_settled.send(Dataset, owner=owner, dataset_id=dataset_id)


@outbox.handler("expire")
def expire(owner: str, id: str) -> bool:
    """Deletes a file whose requested lifetime has expired."""
    with contextlib.suppress(access.NotFound):
        delete(owner, id.partition("#")[2])
    return True


def get_for_job(owner: str, dataset_id: str) -> Dataset:
    """A job's dataset, for the worker. It may have been deleted after the job was checked; its file is then still stored."""
    dataset = tables.get(Dataset, owner, dataset_id)
    if dataset is None or not dataset.key:
        raise access.NotFound(f"There is no dataset {dataset_id}.")
    return dataset


def _mark_deleted(owner: str, dataset_id: str) -> None:
    outbox.put("delete", owner, dataset_id)
    tables.update(Dataset(owner, dataset_id), [Dataset.deleted.set(True)], Dataset.dataset_id.exists())
    quotas.release(owner, "datasets", dataset_id)
    quotas.unreserve(owner, dataset_id)
    outbox.enqueue("delete", owner, dataset_id)


@outbox.deletion_handler("file-")
def _delete_bytes(owner: str, dataset_id: str) -> bool:
    dataset = tables.get(Dataset, owner, dataset_id)
    if dataset is None or not dataset.deleted:
        return True
    checked = (job for job in queue.active_of(owner) if not job.ended and job.status != JobStatus.VALIDATING)
    if any(dataset_id in (job.dataset_id, job.validation_dataset_id) for job in checked):
        return False  # a checked job still needs it
    for row in tables.rows(DatasetReport, dataset_id):
        tables.remove(DatasetReport, dataset_id, row.base)
    drafts.discard(owner, dataset_id)
    blobs.delete_prefix(f"datasets/{owner}/{dataset_id}/")
    return True


def trim_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Drops the largest entries of an unusually large report, because rows are read often. The full report has everything."""
    kept = dict(summary)
    while len(json.dumps(kept)) > MAX_SUMMARY:
        kept.pop(max(kept, key=lambda name: len(json.dumps(kept[name]))))
    return kept


def display_name(filename: str) -> str:
    """The name to display; it is never used as a path."""
    name = unicodedata.normalize("NFC", filename).replace("\\", "/").rpartition("/")[2]
    name = "".join(letter for letter in name if unicodedata.category(letter)[0] != "C")
    return name.strip()[:200] or "dataset"


def key_of(owner: str, dataset_id: str) -> str:
    return f"datasets/{owner}/{dataset_id}/data"


def _report_key(owner: str, dataset_id: str, digest: str) -> str:
    """Each report has its own key, because readers cache reports by key."""
    return f"datasets/{owner}/{dataset_id}/report-{digest[:16]}.json"

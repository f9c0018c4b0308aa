"""Uploaded files: received, checked in a process of their own (`tasks.check_dataset`), deleted.

receiving ──► checking ──► ready | rejected        deleted ones are tombstones
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

from jobs.datasets.signals import dataset_settled
from jobs.store import access, blobs, outbox, queue, quotas, tables
from jobs.store.quotas import OverQuota
from jobs.store.tables import Dataset, DatasetReport, new_id

__all__ = ["OverQuota", "Rejected", "create_pending", "delete", "finish_check", "receive", "store_content"]

BROKEN_OFF_S = 6 * 3600  # so long after its beginning an upload that never ended is given up
MAX_SUMMARY = 64 * 1024  # bytes of the report that stand in the row; all of it is an object


class Rejected(Exception):
    """The file is refused; the message says why and what to do."""


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
    """Stores the file and rings for its check. Raises Rejected, OverQuota; nothing stays behind then.

    Where the size is known its bytes are set aside first, unless the caller has (`reserved`)."""
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
            raise Rejected("The file is empty. Choose one with a row for each example.")
    except blobs.TooLarge:
        _forget(owner, dataset_id)
        raise Rejected(
            f"The file is larger than {settings.JOBS['max_upload_bytes']:,} bytes. Split it."
        ) from None
    except BaseException:
        _forget(owner, dataset_id)
        raise
    actions = [
        Dataset.status.set("checking"),
        Dataset.key.set(stored.key),
        Dataset.bytes.set(stored.bytes),
        Dataset.sha256.set(stored.sha256),
    ]
    received = tables.update(
        dataset, actions, Dataset.status == "receiving", lambda found: found.key == stored.key
    )
    if size:
        quotas.unreserve(owner, dataset_id)
    if received is None:
        raise Rejected("The upload took too long. Send it again.")
    try:
        quotas.check_fits(owner)  # several may have come at once, each while there was room
    except OverQuota:
        _forget(owner, dataset_id)
        raise
    outbox.enqueue("check", owner, dataset_id)
    return received


def receive_multipart(
    owner: str, dataset_id: str, filename: str, size: int, end: Callable[[], None], *, fingerprint: str = ""
) -> Dataset:
    """The same for bytes that went straight to their place in the bucket; `end` makes them one object there. Their sha256
    is known when they are read, at their check. Raises Rejected, OverQuota."""
    key = key_of(owner, dataset_id)
    outbox.put("check", owner, dataset_id)
    quotas.take(owner, "datasets", dataset_id)
    tables.put_new(
        Dataset(
            owner, dataset_id, name=display_name(filename), fingerprint=fingerprint, created_at=time.time()
        )
    )
    if blobs.size_of(key) is None:  # asked again after the answer was lost: it is whole already
        end()
    if blobs.size_of(key) != size:
        _forget(owner, dataset_id)
        raise Rejected("The bucket holds another number of bytes than the file has. Send it again.")
    actions = [Dataset.status.set("checking"), Dataset.key.set(key), Dataset.bytes.set(size)]
    wanted = (Dataset.status == "receiving") & (Dataset.deleted == False)  # noqa: E712  an expression
    found = tables.update(Dataset(owner, dataset_id), actions, wanted, lambda found: found.key == key)
    if found is None:
        raise Rejected("The upload took too long. Send it again.")
    outbox.enqueue("check", owner, dataset_id)
    return found


def find_duplicate(dataset: Dataset) -> Dataset | None:
    """Another dataset of the same bytes, if this person has one."""
    for other in access.list_datasets(dataset.owner, 100):
        if other.dataset_id != dataset.dataset_id and other.sha256 == dataset.sha256 != "":
            return other
    return None


def create_pending(owner: str, promised: Sequence[Dataset]) -> None:
    """Takes on datasets whose bytes a check makes first (jobs/datasets/versions.py): all of them or none, again is harmless.
    Raises OverQuota."""
    quotas.check_room(owner)
    try:
        for dataset in promised:
            outbox.put("check", owner, dataset.dataset_id)
            quotas.take(owner, "datasets", dataset.dataset_id)
    except OverQuota:
        for dataset in promised:
            if tables.get(Dataset, owner, dataset.dataset_id) is None:
                quotas.release(owner, "datasets", dataset.dataset_id)
        raise
    for dataset in promised:
        tables.put_new(dataset)
        outbox.enqueue("check", owner, dataset.dataset_id)


def store_content(dataset: Dataset, file: IO[bytes], origin: Mapping[str, Any]) -> Dataset | None:
    """The bytes of a promised one; the same again is harmless. None when it was deleted meanwhile. Raises TooLarge."""
    key = key_of(dataset.owner, dataset.dataset_id)
    stored = blobs.put_file(key, file, max_bytes=int(settings.JOBS["max_upload_bytes"]))
    actions = [
        Dataset.key.set(stored.key),
        Dataset.bytes.set(stored.bytes),
        Dataset.sha256.set(stored.sha256),
        Dataset.origin.set(dict(origin)),
    ]
    wanted = (Dataset.status == "checking") & (Dataset.deleted == False)  # noqa: E712  an expression
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
    """ready or rejected, with the report. What can't be used isn't kept, unless another choice of columns may help. Then the jobs that wait for it move. None when it was deleted meanwhile."""
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
    condition = (Dataset.status == "checking") & (Dataset.deleted == False)  # noqa: E712  an expression
    found = tables.update(Dataset(owner, dataset_id), actions, condition, lambda row: row.status == status)
    if found and status == "rejected" and not keep:
        blobs.delete_file(key)
    if found:
        dataset_settled.send(Dataset, owner=owner, dataset_id=dataset_id)
    return found


def recheck(owner: str, dataset_id: str, format: Mapping[str, Any]) -> Dataset:
    """Reads the file in another way (other columns) from now on: checked again. Raises NotFound, Rejected."""
    dataset = access.get_dataset_for(owner, dataset_id)
    active = (job for job in queue.active_of(owner) if not job.ended)
    if any(dataset_id in (job.dataset_id, job.validation_dataset_id) for job in active):
        raise Rejected(
            "A job that hasn't ended reads this dataset as it is. Wait for its end, or upload the file again."
        )
    if not dataset.key or blobs.size_of(dataset.key) is None:
        raise Rejected("The file of this dataset was not kept. Upload it again.")
    outbox.put("check", owner, dataset_id)
    wanted = Dataset.status.is_in("ready", "rejected") & (Dataset.deleted == False)  # noqa: E712  an expression
    actions = [
        Dataset.status.set("checking"),
        Dataset.format.set(dict(format)),
        Dataset.summary.remove(),
        Dataset.report_key.set(""),
        Dataset.error.set(""),
    ]
    again = tables.update(dataset, actions, wanted, lambda found: found.format == dict(format))
    if again is None:
        raise Rejected("The dataset is being checked just now. Wait for its report.")
    for row in tables.rows(DatasetReport, dataset_id):
        tables.remove(DatasetReport, dataset_id, row.base)
    outbox.enqueue("check", owner, dataset_id)
    return again


def abandon_stale(owner: str, dataset_id: str) -> None:
    """An upload that broke off long ago leaves nothing behind. Called where a check finds it still receiving."""
    if time.time() - tables.time_of(dataset_id) > BROKEN_OFF_S:
        _forget(owner, dataset_id)


def delete(owner: str, dataset_id: str) -> None:
    """Gone at once for people; the bytes go when no job that was already checked needs them. Raises NotFound."""
    access.get_dataset_for(owner, dataset_id)
    _forget(owner, dataset_id)
    dataset_settled.send(Dataset, owner=owner, dataset_id=dataset_id)


@outbox.handler("expire")
def expire(owner: str, id: str) -> bool:
    """The errand of a file that its owner wanted kept until a time, which has come."""
    with contextlib.suppress(access.NotFound):
        delete(owner, id.partition("#")[2])
    return True


def get_for_job(owner: str, dataset_id: str) -> Dataset:
    """For the worker: also one that was deleted after the job was checked, whose bytes still stand."""
    dataset = tables.get(Dataset, owner, dataset_id)
    if dataset is None or not dataset.key:
        raise access.NotFound(f"There is no dataset {dataset_id}.")
    return dataset


def _forget(owner: str, dataset_id: str) -> None:
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
    checked = (job for job in queue.active_of(owner) if not job.ended and job.status != "validating")
    if any(dataset_id in (job.dataset_id, job.validation_dataset_id) for job in checked):
        return False  # a job that was already checked still reads it
    for row in tables.rows(DatasetReport, dataset_id):
        tables.remove(DatasetReport, dataset_id, row.base)
    blobs.delete_prefix(f"datasets/{owner}/{dataset_id}/")
    return True


def is_being_checked(owner: str, dataset_id: str) -> bool:
    dataset = tables.get(Dataset, owner, dataset_id)
    return dataset is not None and not dataset.deleted and dataset.status in {"receiving", "checking"}


def trim_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Rows are read often: the largest entries of an unusual report stand in its object only."""
    kept = dict(summary)
    while len(json.dumps(kept)) > MAX_SUMMARY:
        kept.pop(max(kept, key=lambda name: len(json.dumps(kept[name]))))
    return kept


def display_name(filename: str) -> str:
    """What people see; it is never a path."""
    name = unicodedata.normalize("NFC", filename).replace("\\", "/").rpartition("/")[2]
    name = "".join(letter for letter in name if unicodedata.category(letter)[0] != "C")
    return name.strip()[:200] or "dataset"


def key_of(owner: str, dataset_id: str) -> str:
    return f"datasets/{owner}/{dataset_id}/data"


def _report_key(owner: str, dataset_id: str, digest: str) -> str:
    """Another report is another object: readers remember what stands in one."""
    return f"datasets/{owner}/{dataset_id}/report-{digest[:16]}.json"

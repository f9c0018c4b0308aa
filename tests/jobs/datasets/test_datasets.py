"""Datasets: upload, check, quotas, deletion."""

from __future__ import annotations

import io
import time

import pytest

from jobs.datasets import datasets
from jobs.lifecycle import finalize
from jobs.store import access, blobs, outbox, quotas, tables
from jobs.store.tables import Dataset
from tests.jobs.makers import ROWS, make_claim, make_job, make_owner

pytestmark = pytest.mark.usefixtures("stores")


def receive(owner=None, name="rows.jsonl", data=ROWS):
    return datasets.receive(owner or make_owner(), name, io.BytesIO(data))


def stored_keys(dataset):
    return blobs.list_keys(f"datasets/{dataset.owner}/{dataset.dataset_id}/")


def test_an_upload_is_stored_hashed_and_queued_for_its_check():
    dataset = receive()
    assert (dataset.status, dataset.bytes, len(dataset.sha256)) == ("checking", len(ROWS), 64)
    assert blobs.open_file(dataset.key).read() == ROWS
    assert any(row.job_id == f"check#{dataset.dataset_id}" for row in outbox.pending())


def test_a_passed_check_makes_the_dataset_ready():
    dataset = receive()
    report = {"findings": [{"line": 1, "message": "ü"}]}
    ready = datasets.finish_check(
        dataset.owner,
        dataset.dataset_id,
        "ready",
        summary={"examples": 1},
        format={"kind": "jsonl"},
        report=report,
    )
    assert (ready.status, ready.summary, ready.format) == ("ready", {"examples": 1}, {"kind": "jsonl"})
    assert len(stored_keys(dataset)) == 2
    assert datasets.finish_check(dataset.owner, dataset.dataset_id, "ready") is not None  # checked twice


def test_a_rejected_file_is_deleted():
    dataset = receive()
    datasets.finish_check(dataset.owner, dataset.dataset_id, "rejected", error="Line 1: no JSON.")
    assert stored_keys(dataset) == []
    assert access.get_dataset_for(dataset.owner, dataset.dataset_id).error == "Line 1: no JSON."


@pytest.mark.parametrize("data", [b"", bytes(2000)])
def test_an_empty_or_oversized_file_leaves_nothing(data, settings):
    settings.JOBS = settings.JOBS | {"max_upload_bytes": 1000}
    owner = make_owner()
    with pytest.raises(datasets.Rejected):
        receive(owner, data=data)
    assert list(access.list_datasets(owner)) == []
    assert quotas.held(owner, "datasets") == set()
    for row in outbox.pending():
        if row.owner == owner and row.job_id.startswith("delete#"):
            outbox.run(*outbox.parse(row), row.lease or "")
    assert blobs.list_keys(f"datasets/{owner}/") == []


def test_an_interrupted_upload_leaves_nothing():
    def chunks():
        yield b"half"
        raise ConnectionResetError

    owner = make_owner()
    with pytest.raises((ConnectionResetError, blobs.StorageError)):
        datasets.receive(owner, "x", chunks())
    assert list(access.list_datasets(owner)) == []


def test_the_number_of_datasets_is_limited(settings):
    settings.JOBS = settings.JOBS | {"max_datasets_per_owner": 1}
    dataset = receive()
    with pytest.raises(datasets.OverQuota):
        receive(dataset.owner)
    datasets.delete(dataset.owner, dataset.dataset_id)
    receive(dataset.owner)


def test_stored_bytes_are_limited(settings):
    dataset = receive()
    settings.JOBS = settings.JOBS | {"max_stored_bytes_per_owner": len(ROWS)}
    with pytest.raises(datasets.OverQuota):
        receive(dataset.owner)
    datasets.delete(dataset.owner, dataset.dataset_id)
    receive(dataset.owner)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\x\\rows.csv", "rows.csv"),
        ("a\0b\r\nc.txt", "abc.txt"),
        ("", "dataset"),
        ("/", "dataset"),
        ("\u202egnp.exe", "gnp.exe"),
        ("e\u0301.txt", "é.txt"),
        ("x" * 300, "x" * 200),
    ],
)
def test_display_names_are_never_paths(name, shown):
    assert datasets.display_name(name) == shown


def test_files_are_kept_until_no_job_needs_them():
    dataset = receive()
    datasets.finish_check(dataset.owner, dataset.dataset_id, "ready")
    job = make_job(dataset.owner, dataset_id=dataset.dataset_id)
    datasets.delete(dataset.owner, dataset.dataset_id)
    with pytest.raises(access.NotFound):
        access.get_dataset_for(dataset.owner, dataset.dataset_id)
    assert not outbox.delete_bytes(dataset.owner, dataset.dataset_id)
    assert datasets.get_for_job(dataset.owner, dataset.dataset_id).key == dataset.key
    claim = make_claim(job)
    claim.finish("failed", "bad_data")
    finalize.after_end(job.owner, job.job_id)
    assert outbox.delete_bytes(dataset.owner, dataset.dataset_id)
    assert stored_keys(dataset) == []


def test_a_late_check_does_not_restore_a_deleted_dataset():
    dataset = receive()
    datasets.delete(dataset.owner, dataset.dataset_id)
    assert datasets.finish_check(dataset.owner, dataset.dataset_id, "ready") is None
    assert tables.get(Dataset, dataset.owner, dataset.dataset_id).deleted


def test_an_oversized_summary_is_shortened():
    dataset = receive()
    summary = {"examples": 3, "histogram": ["x" * 1000] * 1000}
    ready = datasets.finish_check(dataset.owner, dataset.dataset_id, "ready", summary=summary)
    assert ready.summary == {"examples": 3}


@pytest.mark.parametrize(
    ("status", "age", "deleted"),
    [("pending", 0, False), ("completing", 0, False), ("pending", 3 * 3600, True), ("cancelled", 0, True)],
)
def test_upload_parts_are_deleted_once_the_upload_is_over(status: str, age: float, deleted: bool):
    owner, upload_id = make_owner(), tables.new_id("upload")
    tables.Upload(owner, upload_id, status=status, expires_at=time.time() + 60 - age).save()
    part = blobs.put_file(f"uploads/{upload_id}/part-1", io.BytesIO(b"abc"))
    assert outbox.delete_bytes(owner, upload_id) is deleted
    assert (blobs.size_of(part.key) is None) is deleted


def test_upload_parts_without_an_upload_are_deleted():
    part = blobs.put_file("uploads/upload-GONE/part-1", io.BytesIO(b"abc"))
    assert outbox.delete_bytes(make_owner(), "upload-GONE")
    assert blobs.size_of(part.key) is None


def test_concurrent_uploads_share_the_storage_quota(settings):
    """Each starts while there is room for it, but together they exceed the quota."""
    settings.JOBS = settings.JOBS | {"max_stored_bytes_per_owner": 2 * len(ROWS) - 1}
    owner = make_owner()

    def slow_upload():
        receive(owner, "meanwhile.jsonl")
        yield ROWS

    with pytest.raises(datasets.OverQuota):
        datasets.receive(owner, "late.jsonl", slow_upload())
    assert [row.name for row in access.list_datasets(owner)] == ["meanwhile.jsonl"]
    assert quotas.held(owner, "datasets") == {row.dataset_id for row in access.list_datasets(owner)}

"""Factories of stored rows, with plain arguments."""

from __future__ import annotations

from typing import Any

from django.core.files.storage import Storage, storages

from jobs.datasets import datasets
from jobs.lifecycle import transitions
from jobs.lifecycle.transitions import Claim, JobRequest, WorkerInfo
from jobs.store import tables
from jobs.store.tables import Dataset, Job, new_id

WORKER = WorkerInfo(name="host/1", process="process-1")
ROWS = b'{"prompt": "a", "completion": "b"}\n'


def make_owner() -> str:
    return new_id("user")


def make_dataset(owner: str, status: str = "ready") -> Dataset:
    dataset = Dataset(owner, new_id("file"), name="rows.jsonl", status=status, key="datasets/none", bytes=35)
    tables.put_new(dataset)
    return dataset


def make_request(owner: str, **fields: Any) -> JobRequest:
    if "dataset_id" not in fields:
        fields["dataset_id"] = make_dataset(owner, fields.pop("dataset_status", "ready")).dataset_id
    return JobRequest(**{"base": "starter", "name": "orders", **fields})


def make_job(owner: str | None = None, **fields: Any) -> Job:
    owner = owner or make_owner()
    return transitions.submit(owner, make_request(owner, **fields))


def make_claim(job: Job | None = None) -> Claim:
    job = job or make_job()
    claim = transitions.claim(read(job), WORKER)
    assert claim is not None
    return claim


def checkpoint(claim: Claim, step: int, **fields: Any) -> dict[str, Any]:
    return {
        "key": f"{claim.prefix}checkpoints/s{step}",
        "step": step,
        "epoch": claim.fencing_token,
        "sha256": "0" * 64,
    } | fields


def read(job: Job) -> Job:
    row = tables.get(Job, job.owner, job.job_id)
    assert row is not None
    return row


def result(claim: Claim) -> dict[str, Any]:
    files = [{"name": "config.json", "bytes": 2, "sha256": "0" * 64}]
    return {"prefix": f"{claim.prefix}final", "files": files, "step": 3, "metrics": {"loss": 1.5}}


def make_s3_storage(port: int, key: str, secret: str) -> Storage:
    options = {
        "bucket_name": "bucket",
        "endpoint_url": f"http://127.0.0.1:{port}",
        "access_key": key,
        "secret_key": secret,
        "region_name": "us-east-1",
    }
    return storages.create_storage({"BACKEND": "storages.backends.s3.S3Storage", "OPTIONS": options})


def finish_upload(dataset: Dataset) -> None:
    assert datasets.finish_check(dataset.owner, dataset.dataset_id, "ready", summary={"examples": 1})

"""Datasets, jobs and models in any state that a page may show, written directly to the tables."""

from __future__ import annotations

import io
import json
import time
from typing import Any

from django.test import Client
from django.urls import reverse

from jobs.datasets import datasets
from jobs.store import access, blobs, outbox, tables
from jobs.store.tables import Dataset, EstimateRecord, EventChunk, Job, JobIndex, TunedModel, month_of, new_id

SAMPLE = {
    "line": 1,
    "preview": "Where is it?",
    "tokens": [{"text": "Where", "trained": False}, {"text": " Here", "trained": True}],
}
SUMMARY = {
    "examples": 120,
    "tokens": 4800,
    "trained_tokens": 1200,
    "longest": 64,
    "kind": "completion",
    "histogram": [0, 40, 80],
}


def make_dataset(owner: str, name: str = "rows.jsonl", status: str = "ready", **fields: Any) -> Dataset:
    dataset_id = new_id("file")
    report = {**SUMMARY, "findings": [], "samples": [SAMPLE], **fields.pop("report", {})}
    key = f"datasets/{owner}/{dataset_id}/report.json"
    blobs.put_file(key, io.BytesIO(json.dumps(report).encode()))
    dataset = Dataset(
        owner, dataset_id, name=name, status=status, bytes=999, sha256="ab" * 32, key="none", **fields
    )
    dataset.report_key = key
    dataset.summary = report
    tables.put_new(dataset)
    return dataset


def upload_dataset(owner: str, content: bytes, name: str) -> Dataset:
    """An uploaded dataset after its checks."""
    return run_checks(datasets.receive(owner, name, io.BytesIO(content)))


def run_checks(dataset: Dataset) -> Dataset:
    """Do what a checks worker does when it is notified, or when the reconciler notifies it again."""
    outbox.run("check", dataset.owner, dataset.dataset_id, "")
    return access.get_dataset_for(dataset.owner, dataset.dataset_id)


def make_job(
    owner: str, status: str = "running", lines: list[dict[str, Any]] | None = None, **fields: Any
) -> Job:
    """A job with its events; `lines` are what the trainer printed."""
    lines = [{"time": time.time(), **line} for line in lines or []]
    values: dict[str, Any] = {
        "name": "Orders",
        "base": "starter",
        "dataset_id": new_id("file"),
        "started_at": time.time() - 60,
    } | fields
    job = Job(owner, new_id("ftjob"), status=status, last_seq=len(lines), **values)
    if job.ended:
        job.ended_at = time.time()
    for first in range(0, len(lines), 100):
        chunk = [json.dumps(line) for line in lines[first : first + 100]]
        EventChunk(
            job.job_id, first + 1, last_seq=first + len(chunk), fencing_token=1, lease_owner="x", lines=chunk
        ).save()
    for partition in (f"all#{month_of(job.created_at)}", *(() if job.ended else ("active#0",))):
        JobIndex(partition, job.job_id, owner=owner, name=job.name, base=job.base).save()
    tables.put_new(job)
    return job


def make_model(owner: str, name: str = "Orders", root: str = "starter", **fields: Any) -> TunedModel:
    files: list[dict[str, Any]] = []
    model_id = f"ft:{root}:alice:orders:{new_id('x')[-8:].lower()}"
    for file, content in (("config.json", b"{}"), ("model.safetensors", b"weights" * 1000)):
        stored = blobs.put_file(f"models/{owner}/{model_id}/{file}", io.BytesIO(content))
        files.append({"name": file, "bytes": stored.bytes, "sha256": stored.sha256})
    values: dict[str, Any] = {
        "base": "starter",
        "job_id": new_id("ftjob"),
        "metrics": {"loss": 1.25, "exact_match": 0.93},
    } | fields
    size = sum(file["bytes"] for file in files)
    model = TunedModel(
        owner, model_id, name=name, prefix=f"models/{owner}/{model_id}", files=files, bytes=size, **values
    )
    tables.put_new(model)
    return model


def metric(step: int, loss: float = 2.0, **fields: Any) -> dict[str, Any]:
    numbers = {
        "lr": 1e-4,
        "grad_norm": 0.5,
        "tokens": 100 * step,
        "tokens_per_s": 900.0,
        "memory": 2**29,
        "epoch": 0.1,
    }
    return {"t": "metric", "step": step, "loss": loss, "loss_hex": loss.hex(), **numbers, **fields}


def make_estimate_record(kind: str, actual: float, number: int = 0, **fields: object) -> str:
    """Store the record of an estimate, for a kind of machine or an owner, and return the ID of its job."""
    job_id = f"{new_id('ftjob')[:-2]}{number:02d}"
    data = {
        "predicted": 100.0, "p90": 120.0, "actual": actual, "peak": 2 << 30, "peak_predicted": 2 << 30,
        "base": "starter", "method": "full", "when": 1_700_000_000.0,
    } | fields  # fmt: skip
    EstimateRecord(kind=kind, job_id=job_id, data=data).save()
    return job_id


def page_text(response: Any) -> str:
    """The HTML with every run of whitespace as one space, as a browser shows it."""
    return " ".join(response.content.decode().split())


def dataset_page(client: Client, dataset: Dataset) -> str:
    return page_text(client.get(reverse("jobs:dataset", args=[dataset.dataset_id])))

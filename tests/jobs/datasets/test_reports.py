"""A dataset read with another base's tokenizer: asked for, made once, waited for, and what the trainer must see."""

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
    found = tables.get(Dataset, owner, dataset.dataset_id)
    assert found is not None
    return found


def submit(owner: str, dataset: Dataset, facts: dict[str, Any], **asked: Any):
    HubModel(owner, "people/tiny", snapshot=facts).save()
    request = transitions.JobRequest(base="people/tiny", dataset_id=dataset.dataset_id, settings=asked)
    return transitions.submit(owner, request)


def errand(dataset: Dataset, facts: dict[str, Any]) -> str:
    return f"{dataset.dataset_id}@{base_models.tokenizer_family(facts)}"


def test_bases_that_read_alike_share_a_report():
    assert (
        base_models.tokenizer_family({"id": "gpt2-xl"})
        == base_models.tokenizer_family({"id": "distilgpt2"})
        == "gpt2"
    )
    assert reports.uses_default_tokenizer({"id": "starter"})
    assert reports.uses_default_tokenizer({"id": "ft:starter:a::b", "reads_as": "starter"})
    assert not reports.uses_default_tokenizer({"id": "gpt2"})


def test_a_job_waits_for_the_report_of_its_base_and_asks_for_it_once(tiny):
    owner = make_owner()
    dataset = make_dataset(owner)
    job = submit(owner, dataset, tiny)
    assert job.status == "validating"
    assert tables.get(JobIndex, "work", f"report#{errand(dataset, tiny)}")
    asked = reports.get(dataset.dataset_id, tiny).request_id
    assert transitions.validate(read(job)) is None
    assert reports.get(dataset.dataset_id, tiny).request_id == asked
    assert reports.build(owner, errand(dataset, tiny))
    assert read(job).status == "queued"
    assert submit(owner, dataset, tiny).status == "queued"  # it is there already


def test_its_counts_are_the_other_tokenizers(tiny):
    owner = make_owner()
    dataset = make_dataset(owner)
    reports.request_report(dataset, tiny)
    reports.build(owner, errand(dataset, tiny))
    counted, exact = reports.summary_for(dataset, tiny)
    assert exact
    assert counted["examples"] == dataset.summary["examples"] == len(ROWS)
    assert counted["tokens"] != dataset.summary["tokens"]
    assert reports.summary_for(dataset, {"id": "gpt2"}) == (dataset.summary, False)


def test_data_that_teaches_this_base_nothing_ends_the_job(tiny, monkeypatch):
    owner = make_owner()
    dataset = make_dataset(owner)
    job = submit(owner, dataset, tiny)
    monkeypatch.setattr(
        checks, "report_on", lambda *args, **more: {"ready": False, "verdict": "No token is left."}
    )
    reports.build(owner, errand(dataset, tiny))
    ended = read(job)
    assert (ended.status, ended.reason, ended.message) == ("failed", "dataset_rejected", "No token is left.")


def test_a_tokenizer_that_cannot_be_had_keeps_no_job_waiting_and_may_be_asked_for_again(tiny, monkeypatch):
    owner = make_owner()
    dataset = make_dataset(owner)
    job = submit(owner, dataset, tiny)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere")
    reports.build(owner, errand(dataset, tiny))
    failed = reports.get(dataset.dataset_id, tiny)
    assert (failed.status, bool(failed.error)) == ("failed", True)
    assert read(job).status == "queued"
    assert submit(owner, dataset, tiny).status == "validating"
    assert reports.get(dataset.dataset_id, tiny).status == "checking"


def test_a_report_of_what_was_deleted_is_nothing_to_do(tiny):
    owner = make_owner()
    dataset = make_dataset(owner)
    reports.request_report(dataset, tiny)
    datasets.delete(owner, dataset.dataset_id)
    assert reports.build(owner, errand(dataset, tiny))
    assert not reports.list_for(dataset.dataset_id)


@pytest.mark.slow
def test_the_trainer_sees_what_was_counted_or_does_not_start(tiny):
    owner = make_owner()
    dataset = make_dataset(owner)
    job = submit(owner, dataset, tiny, max_steps=1)
    reports.build(owner, errand(dataset, tiny))
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


def test_rows_held_out_that_are_also_learned_from_are_told():
    owner = make_owner()
    dataset = make_dataset(owner)
    held = make_dataset(owner, [*ROWS[:2], {"prompt": "other", "completion": "no"}, ROWS[5]])
    assert reports.request_leaks(dataset, held) is None
    assert reports.build(owner, f"{dataset.dataset_id}@{reports.LEAKS}{held.dataset_id}")
    assert reports.request_leaks(dataset, held) == {"count": 3, "lines": [1, 2, 4]}
    assert not reports.list_for(dataset.dataset_id)  # it is no base's


LONG = [{"prompt": f"{n} " + "is " * 70, "completion": " odd" if n % 2 else " even"} for n in range(12)]


def test_a_base_that_cuts_away_every_answer_ends_the_job_and_refuses_the_next(tiny):
    owner = make_owner()
    dataset = make_dataset(owner, LONG)
    assert (dataset.status, dataset.summary["trained_tokens"] > 0) == ("ready", True)  # the starter reads it
    job = submit(owner, dataset, tiny)
    reports.build(owner, errand(dataset, tiny))
    ended = read(job)
    words = "Every answer is cut off: the prompts alone fill the 64 tokens"
    assert (ended.status, ended.reason) == ("failed", "dataset_rejected")
    assert ended.message.startswith(words)
    with pytest.raises(transitions.Refused, match=words):
        submit(owner, dataset, tiny)


def test_a_job_that_waits_for_the_check_is_refused_by_its_words():
    owner = make_owner()
    text = "".join(json.dumps({**row, "prompt": row["prompt"] * 20}) + "\n" for row in LONG).encode()
    dataset = datasets.receive(owner, "rows.jsonl", iter([text]))
    job = transitions.submit(owner, transitions.JobRequest(base="starter", dataset_id=dataset.dataset_id))
    assert job.status == "validating"
    checks.check(owner, dataset.dataset_id)
    found = tables.get(Dataset, owner, dataset.dataset_id)
    assert (found.status, found.error) == ("ready", "")
    assert read(job).message.startswith("Every answer is cut off: the prompts alone fill the 512 tokens")

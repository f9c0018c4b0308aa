"""Each page takes few DynamoDB reads, however much a user has, and never a scan."""

from __future__ import annotations

import pytest
from django.test import Client
from django.urls import reverse

from accounts.models import User
from jobs.lifecycle import estimates
from jobs.store import tables
from tests.jobs.views.makers import make_dataset, make_job, make_model, metric

MAX_READS = {
    "datasets": 1,
    # the dataset, its reports for other bases, the imported bases and models of the Hub that can count its tokens, the
    # draft of changes
    "dataset": 5,
    "dataset_report": 5,
    # the dataset, the page of rows, the draft; and what the first request for a page writes
    "dataset_rows": 3,
    "dataset_merge": 2,  # the dataset, the others
    "jobs": 1,
    # datasets, tuned models, imported bases, models of the Hub; workers, history and the queue (5), which are cached
    "new_job": 11,
    "estimates": 2,  # the owner's records; the machine
    "job": 3,  # the job, the job again by the event log, its events (one read per megabyte)
    "job_actions": 1,
    "job_live": 3,
    "job_csv": 3,
    "job_log": 3,
    "models": 1,
    "model": 1,
    "playground": 2,  # tuned models, imported bases
    "notifications": 3,  # endpoints; the last deliveries for jobs, and for tests
}


@pytest.mark.parametrize("name", MAX_READS)
def test_a_page_takes_few_reads(alices: Client, alice: User, name: str) -> None:
    for n in range(12):
        dataset, job = make_dataset(alice.owner_id), make_job(alice.owner_id, lines=[metric(n + 1)] * 250)
        model = make_model(alice.owner_id)
    ids = {"dataset": dataset.dataset_id, "job": job.job_id, "model": model.model_id}
    kind = name.partition("_")[0]
    address = reverse(f"jobs:{name}", args=[ids[kind]] if kind in ids and name != "new_job" else [])
    estimates._cache.clear()
    with tables.count_calls() as counter:
        assert alices.get(address, headers={"HX-Request": "true"}).status_code == 200
    assert tables.reads(counter) <= MAX_READS[name], dict(counter)
    assert "Scan" not in counter


def test_a_very_long_job_takes_at_most_60_reads(alices: Client, alice: User) -> None:
    job = make_job(alice.owner_id, lines=[metric(n) for n in range(1, 12_001)])
    with tables.count_calls() as counter:
        response = alices.get(reverse("jobs:job", args=[job.job_id]))
    assert tables.reads(counter) <= 60, dict(counter)
    assert response.context["history"].seq == 12_000
    steps = response.context["chart"]["step"]
    assert (steps[0], steps[-1]) == (1, 12_000)


def test_updating_an_estimate_takes_one_read(alices: Client, alice: User) -> None:
    data = {"dataset": make_dataset(alice.owner_id).dataset_id, "base": "starter"}
    alices.post(reverse("jobs:estimate"), data, headers={"HX-Request": "true"})
    with tables.count_calls() as counter:
        alices.post(reverse("jobs:estimate"), data, headers={"HX-Request": "true"})
    assert tables.reads(counter) == 1


def test_the_admin_job_list_never_scans(sams: Client, alice: User) -> None:
    job = make_job(alice.owner_id)
    for query in ({}, {"state": "active"}, {"state": "failed"}, {"q": job.job_id}, {"q": alice.email}):
        with tables.count_calls() as counter:
            assert sams.get(reverse("admin:jobs_overseenjob_changelist"), query).status_code == 200
        assert tables.reads(counter) <= 5, (query, dict(counter))
        assert "Scan" not in counter

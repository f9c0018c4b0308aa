"""Lists: newest first, only the owner's, with few reads."""

from __future__ import annotations

import pytest

from jobs.datasets import datasets
from jobs.lifecycle import transitions
from jobs.store import access, tables
from jobs.store.tables import Job, TunedModel
from tests.jobs.makers import make_dataset, make_owner

pytestmark = pytest.mark.usefixtures("stores")


def make_jobs(owner, count, **fields):
    jobs = [Job(owner, f"ftjob-{n:026}", status="queued", **fields) for n in range(count)]
    for job in jobs:
        tables.put_new(job)
    return jobs


def test_jobs_come_newest_first_page_by_page():
    owner = make_owner()
    make_jobs(owner, 7)
    make_jobs(make_owner(), 3)
    seen, after, pages = [], None, 0
    while True:
        page = access.list_jobs(owner, 3, after)
        seen += [int(job.job_id[6:]) for job in page]
        pages += 1
        if not page.has_more:
            break
        after = page.rows[-1].job_id
    assert (seen, pages) == ([6, 5, 4, 3, 2, 1, 0], 3)


def test_a_page_takes_one_read():
    owner = make_owner()
    make_jobs(owner, 50)
    with tables.count_calls() as calls:
        assert len(access.list_jobs(owner, 20)) == 20
    assert tables.reads(calls) == 1
    with tables.count_calls() as calls:
        access.get_job_for(owner, f"ftjob-{1:026}")
    assert tables.reads(calls) == 1


def test_deleted_and_void_jobs_are_skipped_with_few_reads():
    owner = make_owner()
    make_jobs(owner, 30, deleted=True)
    tables.put_new(Job(owner, "ftjob-0", status="queued"))
    with tables.count_calls() as calls:
        assert [job.job_id for job in access.list_jobs(owner, 20)] == ["ftjob-0"]
    assert tables.reads(calls) <= 3


def test_models_come_newest_first_whatever_their_base():
    owner = make_owner()
    for n, base in enumerate(["b", "a", "c"]):
        tables.put_new(TunedModel(owner, f"ft:{base}:x::{n}", created_at=float(n)))
    page = access.list_models(owner, 2)
    assert [model.model_id[3] for model in page] == ["c", "a"]
    assert [m.model_id[3] for m in access.list_models(owner, 2, page.rows[-1].model_id)] == ["b"]


def test_datasets_belong_to_their_owner():
    owner, bob = make_owner(), make_owner()
    dataset = make_dataset(owner)
    assert [d.dataset_id for d in access.list_datasets(owner)] == [dataset.dataset_id]
    assert list(access.list_datasets(bob)) == []
    for get in (access.get_dataset_for, datasets.delete):
        with pytest.raises(access.NotFound):
            get(bob, dataset.dataset_id)


@pytest.mark.parametrize("id", ["", "x" * 2000, "ftjob-é", "\ud800", "../x", "ftjob-1\0"])
def test_malformed_ids_are_not_found(id):
    for get in (access.get_job_for, access.get_dataset_for, access.get_model_for):
        with pytest.raises(access.NotFound):
            get(make_owner(), id)


def test_a_cancelled_job_also_takes_one_read():
    owner = make_owner()
    (job,) = make_jobs(owner, 1)
    transitions.set_desired(owner, job.job_id, "cancel")
    with tables.count_calls() as calls:
        assert access.get_job_for(owner, job.job_id).status == "cancelled"
    assert tables.reads(calls) == 1

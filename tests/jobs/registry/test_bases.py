"""Which models a job may start from, and that training really starts from their weights."""

from __future__ import annotations

import pytest
from safetensors.numpy import load_file

from jobs.inference import generation
from jobs.lifecycle import finalize, transitions
from jobs.registry import base_models, tuned_models
from jobs.store import access, blobs, outbox
from jobs.store.states import JobStatus
from jobs.store.tables import DatasetReport, HubModel, Job, TunedModel
from jobs.worker import runner
from tests.jobs.makers import make_claim, make_dataset, make_job, make_owner, read, result
from tests.jobs.worker.test_runner import SETTINGS, again, claim_one
from training.plan.events import Failure

pytestmark = pytest.mark.usefixtures("stores")
SNAPSHOT = {"id": "people/tiny", "name": "people/tiny", "parameters": 1000, "layers": 2, "width": 8, "heads": 2, "context": 64, "vocab": 300, "revision": "0" * 40}  # fmt: skip


def add(owner: str, **fields: object) -> None:
    HubModel(owner, "people/tiny", snapshot=SNAPSHOT | fields).save()


def make_job_from_hub(owner: str) -> Job:
    """A job whose dataset already has a report with the tokenizer of this base."""
    dataset_id = make_dataset(owner).dataset_id
    DatasetReport(
        dataset_id, base_models.tokenizer_family(SNAPSHOT), owner=owner, status="ready", summary={}
    ).save()
    return make_job(owner, base="people/tiny", dataset_id=dataset_id)


def make_model(owner: str, **fields: object) -> TunedModel:
    claim = make_claim(make_job(owner))
    claim.finish(JobStatus.SUCCEEDED, result=result(claim))
    job = read(claim.job)
    tuned_models.create_from(job)
    return access.get_model_for(owner, job.model_id)


def test_a_hub_model_that_was_not_added_is_not_a_base():
    owner = make_owner()
    with pytest.raises(transitions.Refused, match="no base model people/tiny") as refused:
        make_job(owner, base="people/tiny")
    assert refused.value.field == "base"
    add(make_owner())  # another user did
    with pytest.raises(transitions.Refused, match="no base model people/tiny"):
        make_job(owner, base="people/tiny")


def test_an_added_model_is_pinned_to_the_revision_that_was_checked():
    owner = make_owner()
    add(owner)
    job = make_job_from_hub(owner)
    add(owner, revision="1" * 40)
    assert read(job).base_snapshot["revision"] == "0" * 40
    claim = make_claim(job)
    claim.finish(JobStatus.FAILED, "bad_data")
    assert transitions.retry(owner, job.job_id).base_snapshot["revision"] == "0" * 40


def test_a_model_the_operator_no_longer_allows_is_not_a_base(settings):
    owner = make_owner()
    add(owner)
    settings.HUB_MODELS = ["others/*"]
    assert base_models.find(owner, "people/tiny") is None
    with pytest.raises(Failure, match="does not allow this model"):
        base_models.folder("people/tiny", SNAPSHOT)


def test_a_worker_downloads_only_checked_models():
    with pytest.raises(Failure, match="has not been checked"):
        base_models.folder("people/tiny", None)


def test_generating_with_a_hub_model_requires_adding_it():
    owner = make_owner()
    with pytest.raises(access.NotFound):
        generation.check_model(owner, "people/tiny")
    add(owner)
    generation.check_model(owner, "people/tiny")


def test_another_users_model_looks_like_an_unknown_one():
    model = make_model(make_owner())
    messages = []
    for name in (model.model_id, model.model_id[:-1] + "~"):
        with pytest.raises(transitions.Refused) as refused:
            make_job(make_owner(), base=name)
        messages.append(refused.value.message.replace(name, "…"))
    assert messages[0] == messages[1]


def test_a_model_tuned_from_a_tuned_model_records_its_parent_and_keeps_the_root_name():
    owner = make_owner()
    parent = make_model(owner)
    job = make_job(owner, base=parent.model_id)
    assert job.model_id.startswith("ft:starter:")
    assert job.model_id.count("ft:") == 1
    assert base_models.of_job(job).layers == base_models.find(owner, "starter").layers
    claim = make_claim(job)
    claim.finish(JobStatus.SUCCEEDED, result=result(claim))
    tuned_models.create_from(read(job))
    child = access.get_model_for(owner, job.model_id)
    assert child.base == parent.model_id
    grandchild = make_job(owner, base=child.model_id)
    assert grandchild.model_id.startswith("ft:starter:")


def test_the_files_of_a_base_are_kept_until_its_jobs_have_ended(monkeypatch):
    owner = make_owner()
    parent = make_model(owner)
    job = make_job(owner, base=parent.model_id)
    key = blobs.join(parent.prefix, "config.json")
    blobs.put_file(key, iter([b"{}"]))
    monkeypatch.setattr(outbox, "enqueue", lambda *args: None)
    tuned_models.delete(owner, parent.model_id)
    transitions.delete(owner, parent.job_id)
    assert not outbox.delete_bytes(owner, parent.model_id)
    outbox.delete_bytes(owner, parent.job_id)
    assert blobs.size_of(key) == 2
    transitions.set_desired(owner, job.job_id, "cancel")
    assert outbox.delete_bytes(owner, parent.model_id)
    assert blobs.size_of(key) is None


@pytest.mark.slow
def test_training_starts_from_the_parents_weights(tmp_path):
    """With a tiny learning rate, the weights of the child stay those of the parent and differ from the starter's."""
    owner = make_owner()
    first = claim_one(owner=owner)
    runner.run(first)
    finalize.after_end(owner, first.job.job_id)
    parent = access.get_model_for(owner, first.job.model_id)

    no_change = {"learning_rate": 1e-8, "max_steps": 1, "dropout": 0.0, "keep_best": False}
    request = transitions.JobRequest(
        base=parent.model_id, dataset_id=read(first.job).dataset_id, settings=SETTINGS | no_change
    )
    second = again(transitions.submit(owner, request))
    runner.run(second)
    assert read(second.job).status == "succeeded", read(second.job).message
    finalize.after_end(owner, second.job.job_id)
    child = access.get_model_for(owner, second.job.model_id)
    assert child.base == parent.model_id

    starter, before, after = (
        load_file(folder / "model.safetensors")
        for folder in (
            base_models.folder("starter", None),
            tuned_models.fetch(parent),
            tuned_models.fetch(child),
        )
    )
    name = next(name for name in before if name.endswith("mlp.c_fc.weight"))
    assert abs(after[name] - before[name]).max() < 1e-6
    assert abs(after[name] - starter[name]).max() > 1e-4


def test_a_damaged_base_is_never_trained_from(tmp_path):
    owner = make_owner()
    parent = make_model(owner)
    blobs.put_file(blobs.join(parent.prefix, "config.json"), iter([b"[]"]))  # of the same size
    job = make_job(owner, base=parent.model_id)
    with pytest.raises(blobs.Damaged):
        base_models.folder(job.base, job.base_snapshot)


def test_a_base_whose_files_were_deleted_fails_with_a_reason():
    owner = make_owner()
    job = make_job(owner, base=make_model(owner).model_id)
    with pytest.raises(Failure, match="was deleted"):
        base_models.folder(job.base, job.base_snapshot)

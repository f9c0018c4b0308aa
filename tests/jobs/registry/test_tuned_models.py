"""Tuned models: created once, fetched and verified, streamed as a zip, deleted with their files."""

from __future__ import annotations

import io
import tracemalloc
import zipfile

import pytest

from jobs.registry import tuned_models
from jobs.store import access, blobs, outbox, tables
from jobs.store.tables import TunedModel
from tests.jobs.makers import checkpoint, make_claim, make_owner, result

pytestmark = pytest.mark.usefixtures("stores")


def make_model(files: dict[str, bytes], owner: str | None = None) -> TunedModel:
    owner = owner or make_owner()
    prefix = f"jobs/{tables.new_id('ftjob')}/e1/final"
    entries = []
    for name, data in files.items():
        stored = blobs.put_file(blobs.join(prefix, name), io.BytesIO(data))
        entries.append({"name": name, "bytes": stored.bytes, "sha256": stored.sha256})
    model = TunedModel(owner, f"ft:org/base:slug::{prefix[-20:-9].lower()}", prefix=prefix, files=entries)
    tables.put_new(model)
    return model


FILES = {
    "config.json": b"{}",
    "model.safetensors": bytes(3_000_000),
    "deep/merges.txt": b"a b\n",
    "empty": b"",
}


async def collect(parts):
    return b"".join([part async for part in parts])


async def test_the_zip_contains_every_file_and_has_the_announced_length():
    model = make_model(FILES)
    data = await collect(tuned_models.archive(model))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        names = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    assert names == FILES
    assert len(data) == tuned_models.archive_length(model)


async def test_a_damaged_file_aborts_the_zip():
    model = make_model(FILES)
    blobs.put_file(blobs.join(model.prefix, "config.json"), io.BytesIO(b"[]"))
    with pytest.raises(blobs.StorageError):
        await collect(tuned_models.archive(model))


async def test_a_large_zip_is_streamed_with_little_memory():
    prefix, block = f"jobs/{tables.new_id('ftjob')}/e1/final", bytes(1 << 20)
    stored = blobs.put_file(prefix + "/weights", (block for _ in range(64)))
    entry = {"name": "weights", "bytes": stored.bytes, "sha256": stored.sha256}
    model = TunedModel(make_owner(), "ft:x", prefix=prefix, files=[entry])
    tracemalloc.start()
    sent = 0
    async for part in tuned_models.archive(model):
        sent += len(part)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    blobs.delete_prefix(prefix + "/")
    assert sent == tuned_models.archive_length(model) > 64 << 20
    assert peak < 16 << 20


def test_a_model_is_fetched_once_and_verified(settings, tmp_path):
    settings.MODEL_CACHE_DIR = tmp_path
    model = make_model(FILES)
    folder = tuned_models.fetch(model)
    assert (folder / "deep" / "merges.txt").read_bytes() == b"a b\n"
    blobs.delete_prefix(model.prefix + "/")
    assert tuned_models.fetch(model) == folder
    damaged = make_model({"config.json": b"{}"})
    blobs.put_file(blobs.join(damaged.prefix, "config.json"), io.BytesIO(b"[]"))
    with pytest.raises(blobs.StorageError):
        tuned_models.fetch(damaged)


def test_a_deleted_model_loses_its_files_and_stays_deleted():
    model = make_model(FILES)
    tuned_models.delete(model.owner, model.model_id)
    with pytest.raises(access.NotFound):
        access.get_model_for(model.owner, model.model_id)
    assert outbox.delete_bytes(model.owner, model.model_id)
    assert blobs.list_keys(model.prefix) == []
    assert tables.put_new(TunedModel(model.owner, model.model_id), lambda row: False) is None


def test_deleting_a_job_keeps_its_model():
    from jobs.lifecycle import finalize, transitions

    claim = make_claim()
    outcome = result(claim)
    for name in ("final/config.json", "checkpoints/s1/weights"):
        blobs.put_file(claim.prefix + name, io.BytesIO(b"{}"))
    claim.move_pointer(checkpoint(claim, 1))
    claim.finish("succeeded", result=outcome)
    finalize.after_end(claim.owner, claim.job_id)
    assert len(blobs.list_keys(claim.prefix)) == 2
    transitions.delete(claim.owner, claim.job_id)
    outbox.delete_bytes(claim.owner, claim.job_id)
    assert blobs.list_keys(claim.prefix) == [claim.prefix + "final/config.json"]
    assert access.get_model_for(claim.owner, claim.job.model_id).prefix == outcome["prefix"]


@pytest.mark.parametrize("kind", ["chat", "completion", "text", ""])
def test_a_model_and_its_checkpoints_remember_what_they_were_trained_on(kind):
    from jobs.lifecycle import finalize
    from tests.jobs.makers import make_dataset, make_job

    owner = make_owner()
    dataset = make_dataset(owner)
    dataset.update(actions=[tables.Dataset.summary.set({"kind": kind} if kind else {})])
    claim = make_claim(make_job(owner, dataset_id=dataset.dataset_id))
    claim.move_pointer(checkpoint(claim, 5, files=[{"name": "x", "bytes": 3, "sha256": "0" * 64}]))
    assert tuned_models.get_for(owner, f"{claim.job.model_id}:ckpt-step-5").trained_on == kind
    claim.finish("succeeded", result=result(claim))
    finalize.after_end(owner, claim.job_id)
    assert access.get_model_for(owner, claim.job.model_id).trained_on == kind


def test_a_checkpoint_can_be_used_as_a_model():
    claim = make_claim()
    files = [{"name": "model.safetensors", "bytes": 3, "sha256": "0" * 64}]
    claim.move_pointer(checkpoint(claim, 5, files=files))
    model = tuned_models.get_for(claim.owner, f"{claim.job.model_id}:ckpt-step-5")
    assert (model.step, model.files) == (5, files)
    for owner, id in ((claim.owner, f"{claim.job.model_id}:ckpt-step-6"), (make_owner(), model.model_id)):
        with pytest.raises(access.NotFound):
            tuned_models.get_for(owner, id)

"""One attempt at a job with a real trainer: it succeeds, is given back, resumes exactly, is cancelled, fails or is retried."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from django.conf import settings

from jobs.datasets import datasets
from jobs.events import event_log
from jobs.lifecycle import finalize, transitions
from jobs.registry import tuned_models
from jobs.store import blobs, quotas, tables
from jobs.store.tables import new_id
from jobs.worker import prewarmed, runner, worker_process
from tests import services
from tests.jobs.makers import WORKER, make_owner, make_s3_storage, read

pytestmark = [pytest.mark.usefixtures("stores"), pytest.mark.slow]

STEPS = 40
SETTINGS = {
    "max_steps": STEPS,
    "batch_size": 2,
    "sequence_length": 32,
    "learning_rate": 1e-3,
    "validation_fraction": 0.0,
    "checkpoint_every_steps": 10,
    "checkpoint_every_s": 0,
    "dropout": 0.1,
    "seed": 3,
}


@pytest.fixture(scope="module", autouse=True)
def stop_prewarmed_trainers():
    yield
    prewarmed.shut_down()


@pytest.fixture(autouse=True)
def short_batches(monkeypatch):
    monkeypatch.setitem(settings.JOBS, "chunk_s", 0.1)


def claim_one(rows=None, owner=None, **fields):
    owner = owner or make_owner()
    rng = random.Random(5)
    rows = rows or [{"prompt": f"{rng.randrange(99)} is", "completion": " odd"} for _ in range(40)]
    dataset = datasets.receive(owner, "rows.jsonl", iter([json.dumps(row).encode() + b"\n" for row in rows]))
    datasets.finish_check(owner, dataset.dataset_id, "ready", summary={"examples": len(rows)})
    request = transitions.JobRequest(
        base="starter", dataset_id=dataset.dataset_id, settings=SETTINGS | fields
    )
    return again(transitions.submit(owner, request))


def again(job):
    claim = transitions.claim(read(job), WORKER)
    assert claim is not None
    return claim


def event_types(job):
    return [event.data["t"] for event in event_log.read(job.owner, job.job_id)]


def losses(job):
    events = event_log.read(job.owner, job.job_id)
    return {e.data["step"]: e.data["loss_hex"] for e in events if e.data["t"] == "metric"}


def weights(job):
    return {f["sha256"] for f in read(job).result["files"] if f["name"].endswith(".safetensors")}


def when_step(claim, step, action):
    """Calls `action` in a thread once the job has reached the step."""

    def watch():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and (read(claim.job).progress or {}).get("step", 0) < step:
            time.sleep(0.02)
        action()

    threading.Thread(target=watch, daemon=True).start()


@pytest.fixture(scope="module")
def undisturbed(stores):
    claim = claim_one()
    runner.run(claim)
    return claim.job


def test_a_job_runs_from_its_claim_to_its_model(undisturbed):
    job = read(undisturbed)
    assert job.status == "succeeded", job.message
    assert sorted(losses(job)) == list(range(1, STEPS + 1))
    types = event_types(job)
    assert types[0] == "attempt"
    assert types[-1] == "end"
    assert {"plan", "estimate", "checkpoint", "done"} <= set(types)
    assert job.progress["step"] == STEPS
    finalize.after_end(job.owner, job.job_id)
    model = tables.get(tables.TunedModel, job.owner, job.model_id)
    assert (tuned_models.fetch(model) / "config.json").is_file()


def test_a_job_that_stopped_early_shows_the_figures_of_the_kept_step():
    claim = claim_one(
        validation_fraction=0.2,
        eval_every=1,
        early_stopping_patience=2,
        learning_rate=0.5,
        schedule="constant",
    )
    runner.run(claim)
    job = read(claim.job)
    assert job.status == "succeeded", job.message
    assert job.result["early"] is True
    assert job.result["kept_step"] == job.result["step"] - 2
    assert job.metrics["eval_step"] == job.result["kept_step"]
    assert job.metrics["eval_loss"] == job.result["metrics"]["loss"]
    finalize.after_end(job.owner, job.job_id)
    model = tables.get(tables.TunedModel, job.owner, job.model_id)
    assert model.step == job.result["kept_step"]


def test_an_attempt_leaves_no_files_on_the_worker(undisturbed):
    assert not (Path(settings.WORK_DIR) / undisturbed.job_id / "e1").exists()


def test_events_contain_no_paths_of_the_worker(undisturbed):
    text = json.dumps([event.data for event in event_log.read(undisturbed.owner, undisturbed.job_id)])
    assert str(settings.WORK_DIR) not in text


def test_a_stopped_worker_returns_the_job_and_the_next_attempt_is_exact(undisturbed):
    claim, stop = claim_one(), threading.Event()
    when_step(claim, 12, stop.set)
    runner.run(claim, stop)
    job = read(claim.job)
    assert (job.status, job.attempts) == ("queued", 0)
    assert 0 < job.checkpoint_step < STEPS
    runner.run(again(job))
    assert read(job).status == "succeeded"
    assert losses(job) == losses(undisturbed)
    assert weights(job) == weights(undisturbed)


def stored_checkpoints(job):
    keys = blobs.list_keys(f"jobs/{job.job_id}/")
    return {key.rpartition("/")[0] for key in keys if "/checkpoints/" in key}


def test_only_checkpoints_that_may_be_needed_are_kept():
    """Superseded checkpoints are deleted while the job runs, not only by the sweep after its end."""
    claim = claim_one(checkpoint_every_steps=4)
    runner.run(claim)
    job = read(claim.job)
    kept = {entry["key"] for entry in job.checkpoints}
    assert 2 <= len(kept) <= 3
    deadline = time.monotonic() + 60  # they are deleted in a thread beside the training
    while time.monotonic() < deadline and stored_checkpoints(job) != kept:
        time.sleep(0.1)
    assert stored_checkpoints(job) == kept
    folders = blobs.local_path(job.checkpoint_key).parent
    assert {folder.name for folder in folders.iterdir()} == {key.rpartition("/")[2] for key in kept}
    assert quotas.stored_bytes(job.owner) >= sum(entry["bytes"] for entry in job.checkpoints) > 0


@pytest.mark.parametrize("cause", ["stop", "cancel", "stalled"])
def test_a_trainer_that_hangs_is_killed_and_the_job_moves_on(cause, monkeypatch):
    for name in ("sigterm_grace_s", "cancel_grace_s"):
        monkeypatch.setitem(settings.JOBS, name, 0.5)
    monkeypatch.setitem(settings.JOBS, "stall_s", 1.0 if cause == "stalled" else 120.0)
    monkeypatch.setitem(settings.JOBS, "stall_steps", 0)
    claim, stop = claim_one(max_steps=5000), threading.Event()
    attempt = runner._Attempt(claim, stop, runner.prepare.work_folder(claim.job_id, 1))

    def hang():
        os.kill(attempt.child.pid, signal.SIGSTOP)
        if cause == "stop":
            stop.set()
        elif cause == "cancel":
            transitions.set_desired(claim.owner, claim.job_id, "cancel")

    when_step(claim, 5, hang)
    attempt.run()
    attempt.close()
    job = read(claim.job)
    expected = {
        "stop": ("queued", 0, ""),
        "cancel": ("cancelled", 0, "cancelled"),
        "stalled": ("retrying", 1, "stalled"),
    }
    assert (job.status, job.attempts, job.reason) == expected[cause]


def slow_rows():
    """Rows so long that one step takes far longer than a round of the worker's loop."""
    rng = random.Random(7)
    words = ["lamp", "river", "stone", "quiet", "seven", "green", "door", "sail"]
    return [
        {
            "prompt": " ".join(rng.choices(words, k=150)),
            "completion": " " + " ".join(rng.choices(words, k=60)),
        }
        for _ in range(50)
    ]


def test_a_first_step_may_take_longer_than_the_minimum_stall_limit(monkeypatch):
    """Before the first step the limit is based on the rehearsal."""
    monkeypatch.setitem(settings.JOBS, "stall_s", 0.05)
    # A busy machine may take far longer than the rehearsal.
    monkeypatch.setitem(settings.JOBS, "stall_steps", 200.0)
    claim = claim_one(slow_rows(), max_steps=2, batch_size=50, sequence_length=256, checkpoint_every_steps=0)
    runner.run(claim)
    job = read(claim.job)
    assert job.estimate["step_s"] > 0.2  # otherwise this test proves nothing
    assert (job.status, job.attempts) == ("succeeded", 0), job.message


def test_the_progress_shows_silence_until_the_trainer_continues(monkeypatch):
    monkeypatch.setitem(settings.JOBS, "heartbeat_s", 0.2)
    monkeypatch.setattr(runner, "SILENCE_SHOWN_AFTER", 0.005)  # of at least 120 s
    claim = claim_one(max_steps=5000)
    attempt = runner._Attempt(claim, threading.Event(), runner.prepare.work_folder(claim.job_id, 1))
    seen = []

    def record_progress_when(condition):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not condition(read(claim.job).progress or {}):
            time.sleep(0.05)
        seen.append(read(claim.job).progress)

    def hang_and_continue():
        os.kill(attempt.child.pid, signal.SIGSTOP)
        record_progress_when(lambda progress: "silent_s" in progress)
        os.kill(attempt.child.pid, signal.SIGCONT)
        record_progress_when(lambda progress: "silent_s" not in progress)
        transitions.set_desired(claim.owner, claim.job_id, "cancel")

    when_step(claim, 5, hang_and_continue)
    attempt.run()
    attempt.close()
    silent, moving = seen
    assert 0 < silent["silent_s"] < silent["silent_limit_s"]
    assert silent["silent_limit_s"] >= 120
    assert "silent_s" not in moving
    assert read(claim.job).status == "cancelled"


def test_steps_of_a_lost_attempt_are_run_again_and_compared(undisturbed):
    """The worker dies between two checkpoints. The losses that it logged after the last one are compared."""
    claim, stop = claim_one(checkpoint_every_steps=25), threading.Event()
    when_step(claim, 30, stop.set)
    stale = runner._Attempt(claim, stop, runner.prepare.work_folder(claim.job_id, 1))
    stale._finish = lambda *_: None  # it does not give the job back, like a killed worker
    uploads = stale._uploads
    stale._uploads = lambda: uploads() if not stop.is_set() else None
    stale.run()
    stale.close()
    job = transitions.requeue(transitions.lose_lease(read(claim.job)))
    runner.run(again(job))
    job = read(job)
    assert job.status == "succeeded"
    assert losses(job) == losses(undisturbed) or job.resume_check["exact"]
    assert job.resume_check["equal"] == job.resume_check["steps"] > 0
    assert any("bit-identical" in str(e.data.get("message")) for e in event_log.read(job.owner, job.job_id))


def test_cancel_stops_the_trainer_and_ends_the_job():
    claim = claim_one(max_steps=5000)
    when_step(claim, 5, lambda: transitions.set_desired(claim.owner, claim.job_id, "cancel"))
    runner.run(claim)
    assert read(claim.job).status == "cancelled"


def test_pause_keeps_a_checkpoint():
    claim = claim_one(max_steps=5000)
    when_step(claim, 5, lambda: transitions.set_desired(claim.owner, claim.job_id, "pause"))
    runner.run(claim)
    job = read(claim.job)
    assert job.status == "paused"
    assert job.checkpoint_step >= 5


def test_a_user_error_fails_at_once_with_advice():
    claim = claim_one(rows=[{"nonsense": 1}] * 3)
    runner.run(claim)
    job = read(claim.job)
    assert (job.status, job.attempts) == ("failed", 0)
    assert job.reason in ("no_trained_token", "bad_data")
    assert job.message
    assert job.advice


def test_a_full_disk_has_its_own_reason_and_uses_no_attempt():
    claim = claim_one()
    data = runner.prepare.work_folder(claim.job_id, 1) / "data" / "train"
    data.mkdir(parents=True)
    (data / ".data.jsonl.part").symlink_to("/dev/full")  # the file that the dataset is downloaded to
    runner.run(claim)
    job = read(claim.job)
    assert (job.status, job.attempts, job.reason) == ("retrying", 0, "disk_full")
    assert job.message == "The worker's disk is full."


def test_a_work_folder_that_cannot_be_created_is_reported_at_once(monkeypatch):
    """Not half a minute later, as a lost worker."""
    claim = claim_one()
    monkeypatch.setattr(settings, "WORK_DIR", "/sys")  # where not even root can create a folder
    runner.run(claim)
    job = read(claim.job)
    assert (job.status, job.attempts, job.reason) == ("retrying", 0, "not_writable")


def test_a_full_disk_does_not_keep_a_worker_from_clearing_it():
    folder = runner.prepare.work_folder(new_id("ftjob"), 1)
    folder.mkdir(parents=True)
    (folder / ".lock").symlink_to("/dev/full")
    worker_process.clear_leftovers()
    assert not folder.exists()


def test_unreachable_object_storage_uses_no_attempt(monkeypatch):
    claim = claim_one()
    unreachable = make_s3_storage(services.free_port(), "key", "secret")
    monkeypatch.setattr(blobs, "_storage", lambda: unreachable)
    runner.run(claim)
    job = read(claim.job)
    assert (job.status, job.attempts, job.reason) == ("retrying", 0, "store")
    assert "object storage returned an error" in job.message


def test_a_missing_dataset_file_is_not_retried_forever():
    claim = claim_one()
    blobs.delete_file(tables.get(tables.Dataset, claim.owner, claim.job.dataset_id).key)
    runner.run(claim)
    job = read(claim.job)
    assert (job.status, job.attempts, job.reason) == ("retrying", 1, "file_damaged")


def test_a_damaged_checkpoint_is_skipped_for_the_previous_one():
    claim, stop = claim_one(), threading.Event()
    when_step(claim, 25, stop.set)
    runner.run(claim, stop)
    job = read(claim.job)
    path = blobs.local_path(f"{job.checkpoint_key}/weights.safetensors")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    runner.run(again(job))
    job = read(job)
    assert job.status == "succeeded"
    assert any("is damaged" in str(e.data.get("message")) for e in event_log.read(job.owner, job.job_id))


def test_a_worker_that_lost_its_lease_leaves_the_job_unchanged():
    claim = claim_one(max_steps=5000)
    when_step(claim, 5, lambda: transitions.lose_lease(read(claim.job)))
    runner.run(claim)
    job = read(claim.job)
    assert (job.status, job.reason) == ("retrying", "lost_worker")


def test_a_trainer_out_of_memory_is_retried_with_a_smaller_micro_batch(monkeypatch):
    """The first run exits as out of memory. The second one has half the micro-batch, and no attempt is counted."""
    claim = claim_one()
    train_once, codes, sizes = runner._Attempt._train_once, iter([21]), []

    def first_out_of_memory(self, config):
        sizes.append(config["settings"].get("micro_batch_tokens"))
        code = next(codes, None)
        if code is not None:
            self.output.micro_batch = 2048
            return code
        return train_once(self, config)

    monkeypatch.setattr(runner._Attempt, "_train_once", first_out_of_memory)
    runner.run(claim)
    job = read(claim.job)
    assert (job.status, job.attempts) == ("succeeded", 0)
    assert sizes == [None, 1024]
    assert "doctor" in event_types(job)

"""What the reconciler completes, on a clock that the test controls."""

from __future__ import annotations

import io
import os
import time

import pytest

from jobs.datasets import datasets
from jobs.lifecycle import finalize, transitions
from jobs.store import access, outbox, queue, quotas, redis_client, tables
from jobs.store.tables import Dataset, JobIndex, new_id
from jobs.worker.reconciler import Reconciler, Watch
from tests.jobs.makers import ROWS, checkpoint, make_claim, make_dataset, make_job, make_owner, read, result

pytestmark = pytest.mark.usefixtures("stores")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def messages(monkeypatch):
    """Gives this test its own list of jobs, because the reconciler walks all of them. Returns the messages that are sent."""
    partition = f"test#{new_id('x')}"
    monkeypatch.setattr(queue, "shard", lambda job_id: partition)
    monkeypatch.setattr(queue, "index_rows", lambda: list(tables.rows(JobIndex, partition)))
    monkeypatch.setattr(outbox, "PARTITION", f"work-{partition}")
    messages = []
    monkeypatch.setattr(redis_client, "enqueue", lambda task, *args: messages.append((task, *args)))
    monkeypatch.setattr(
        redis_client, "enqueue_training", lambda waiting: messages.append(("training", waiting))
    )
    return messages


def run_rounds(reconciler, clock, seconds, step=5.0):
    for _ in range(int(seconds / step)):
        clock.now += step
        reconciler.tick()


def start():
    clock = Clock()
    reconciler = Reconciler(clock)
    reconciler.tick()
    return reconciler, clock


def test_a_silent_worker_loses_its_lease_after_thirty_seconds(messages):
    claim = make_claim()
    reconciler, clock = start()
    run_rounds(reconciler, clock, 25)
    assert read(claim.job).status == "running"
    run_rounds(reconciler, clock, 5)
    assert (read(claim.job).status, read(claim.job).attempts) == ("retrying", 0)
    run_rounds(reconciler, clock, 5)  # the first retry has no backoff
    assert read(claim.job).status == "queued"
    assert messages[-1][0] == "training"


def test_a_worker_that_sends_heartbeats_keeps_its_lease(messages):
    claim = make_claim()
    reconciler, clock = start()
    for _ in range(10):
        run_rounds(reconciler, clock, 10)
        claim.heartbeat()
    assert read(claim.job).status == "running"


def test_a_gap_between_its_own_rounds_restarts_the_watch(messages):
    claim = make_claim()
    reconciler, clock = start()
    run_rounds(reconciler, clock, 25)
    clock.now += 60  # the process or the machine was suspended
    reconciler.tick()
    run_rounds(reconciler, clock, 25)
    assert read(claim.job).status == "running"
    run_rounds(reconciler, clock, 5)
    assert read(claim.job).status == "retrying"


def test_an_unavailable_store_restarts_the_watch(messages, monkeypatch):
    claim = make_claim()
    reconciler, clock = start()
    run_rounds(reconciler, clock, 25)
    with monkeypatch.context() as patch:
        patch.setattr(queue, "active_jobs", lambda rows: (_ for _ in ()).throw(ConnectionError))
        with pytest.raises(ConnectionError):
            run_rounds(reconciler, clock, 5)
    run_rounds(reconciler, clock, 25)
    assert read(claim.job).status == "running"


def test_a_round_returns_the_time_until_the_next_lease_expires(messages):
    make_claim()
    reconciler, clock = start()
    clock.now += 5
    reconciler.tick()
    clock.now += 5
    assert reconciler.tick() == pytest.approx(20)


def test_a_job_that_keeps_failing_waits_longer_each_time(messages):
    job = make_job()
    for _ in range(2):
        make_claim(job).trainer_died("killed")
        if read(job).attempts < 2:
            transitions.requeue(read(job))
    reconciler, clock = start()
    run_rounds(reconciler, clock, 5)
    assert read(job).status == "retrying"
    run_rounds(reconciler, clock, 5)
    assert read(job).status == "queued"


def test_unfinished_end_steps_are_completed(messages):
    claim = make_claim()
    claim.finish("succeeded", result=result(claim))
    reconciler, clock = start()
    run_rounds(reconciler, clock, 10)
    assert queue.index_rows() == []
    assert quotas.held(claim.owner, "jobs") == set()


def test_an_interrupted_submission_becomes_void(messages):
    owner, job_id = make_owner(), new_id("ftjob")
    JobIndex(queue.shard(job_id), job_id, owner=owner).save()
    reconciler, clock = start()
    run_rounds(reconciler, clock, 595)
    assert len(queue.index_rows()) == 1
    run_rounds(reconciler, clock, 10)
    assert queue.index_rows() == []
    assert tables.get(tables.Job, owner, job_id).status == "void"


def test_a_job_whose_dataset_became_ready_unnoticed_is_queued(messages):
    owner = make_owner()
    dataset = make_dataset(owner, "checking")
    job = make_job(owner, dataset_id=dataset.dataset_id)
    dataset.update(actions=[Dataset.status.set("ready")])
    reconciler, _ = start()
    assert read(job).status == "queued"
    reconciler.tick()
    assert ("training", 1) in messages


def test_outbox_rows_that_nobody_handles_are_enqueued_again(messages):
    owner, dataset_id = make_owner(), new_id("file")
    outbox.put("check", owner, dataset_id)
    reconciler, clock = start()
    run_rounds(reconciler, clock, 25)
    assert messages == []
    run_rounds(reconciler, clock, 5)
    assert messages == [("errand", "check", owner, dataset_id, "")]


def test_a_dataset_is_deleted_when_it_expires_and_not_before(messages):
    owner = make_owner()
    now = time.time()
    kept, expired = (
        datasets.receive(owner, "r.jsonl", io.BytesIO(ROWS), expires_at=now + s) for s in (99, -1)
    )
    reconciler, clock = start()
    run_rounds(reconciler, clock, 40)
    rows = [message[1:] for message in messages if message[:2] == ("errand", "expire")]
    assert rows == [("expire", owner, f"{int(now - 1)}#{expired.dataset_id}", "")]
    outbox.run(*rows[0])
    assert [row.dataset_id for row in access.list_datasets(owner)] == [kept.dataset_id]


def test_an_outbox_row_is_handled_once_however_often_it_is_enqueued(messages, monkeypatch):
    owner, handled = make_owner(), []
    monkeypatch.setitem(outbox._handlers, "delete", lambda *args: handled.append(args) or True)
    outbox.put("delete", owner, "x")
    outbox.run("delete", owner, "x", "")
    outbox.run("delete", owner, "x", "")
    assert handled == [(owner, "x")]
    assert outbox.pending() == []


def test_an_outbox_row_whose_handler_must_wait_is_kept(messages, monkeypatch):
    owner = make_owner()
    monkeypatch.setitem(outbox._handlers, "delete", lambda *args: False)
    outbox.put("delete", owner, "x")
    outbox.run("delete", owner, "x", "")
    (row,) = outbox.pending()
    outbox.run("delete", owner, "x", "")  # an old message: another worker has taken the row
    outbox.run("delete", owner, "x", row.lease)
    assert outbox.pending()[0].lease != row.lease


def test_the_audit_removes_ended_jobs_from_the_quota(messages, settings):
    claim = make_claim()
    claim.finish("failed", "bad_data")
    quotas.take(claim.owner, "jobs", claim.job_id)
    make_job(claim.owner)
    finalize.after_end(claim.owner, claim.job_id)
    quotas.take(claim.owner, "jobs", claim.job_id)  # a late write
    reconciler, clock = start()
    clock.now += 3601
    reconciler.tick()
    assert claim.job_id not in quotas.held(claim.owner, "jobs")
    assert len(quotas.held(claim.owner, "jobs")) == 1


def test_the_janitor_deletes_unfinished_files_of_killed_processes(messages):
    from jobs.store import blobs
    from jobs.worker import worker_process

    folder = blobs.local_path(f"jobs/{new_id('ftjob')}/e1")
    folder.mkdir(parents=True)
    before_start, after_start = (folder / f"{blobs.UNFINISHED}{name}" for name in ("before", "after"))
    for path in (before_start, after_start):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - 7200,) * 2)
        if path == before_start:
            worker_process.clear_leftovers()
            assert not path.exists()
    reconciler, clock = start()
    clock.now += 3601
    reconciler.tick()
    assert not after_start.exists()


def test_the_janitor_deletes_only_unreferenced_files(messages, monkeypatch):
    from jobs.store import blobs

    claim = make_claim()
    claim.move_pointer(checkpoint(claim, 1))
    transitions.lose_lease(claim.job)
    transitions.requeue(read(claim.job))
    new = make_claim(claim.job)
    keys = [
        f"jobs/{claim.job_id}/{name}"
        for name in ("e1/checkpoints/s1/w", "e1/checkpoints/s2/w", "e2/checkpoints/s2/w")
    ]
    deleted = []
    monkeypatch.setattr(blobs, "list_keys", lambda prefix: keys)
    monkeypatch.setattr(blobs, "delete_file", deleted.append)
    finalize.sweep(read(new.job))
    assert deleted == [keys[1]]


def test_a_watch_forgets_what_it_no_longer_sees():
    clock = Clock()
    watch = Watch(clock)
    for _ in range(3):
        watch.begin_round()
        watch.unchanged("a", 1, 10)
    watch.begin_round()
    watch.begin_round()
    assert watch.seen == {}

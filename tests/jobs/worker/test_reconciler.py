"""What the reconciler finishes, on a clock that the test holds."""

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
def alone(monkeypatch):
    """A list of jobs of this test's own: the reconciler walks everybody's."""
    mine = f"test#{new_id('x')}"
    monkeypatch.setattr(queue, "shard", lambda job_id: mine)
    monkeypatch.setattr(queue, "index_rows", lambda: list(tables.rows(JobIndex, mine)))
    monkeypatch.setattr(outbox, "PARTITION", f"work-{mine}")
    rung: list[tuple] = []
    monkeypatch.setattr(redis_client, "enqueue", lambda task, *args: rung.append((task, *args)))
    monkeypatch.setattr(redis_client, "enqueue_training", lambda waiting: rung.append(("training", waiting)))
    return rung


def rounds(reconciler, clock, seconds, step=5.0):
    for _ in range(int(seconds / step)):
        clock.now += step
        reconciler.tick()


def start():
    clock = Clock()
    reconciler = Reconciler(clock)
    reconciler.tick()
    return reconciler, clock


def test_a_silent_worker_loses_its_lease_after_thirty_seconds(alone):
    claim = make_claim()
    reconciler, clock = start()
    rounds(reconciler, clock, 25)
    assert read(claim.job).status == "running"
    rounds(reconciler, clock, 5)
    assert (read(claim.job).status, read(claim.job).attempts) == ("retrying", 0)
    rounds(reconciler, clock, 5)  # the first retry waits for nothing
    assert read(claim.job).status == "queued"
    assert alone[-1][0] == "training"


def test_a_worker_that_sends_heartbeats_keeps_its_lease(alone):
    claim = make_claim()
    reconciler, clock = start()
    for _ in range(10):
        rounds(reconciler, clock, 10)
        claim.heartbeat()
    assert read(claim.job).status == "running"


def test_a_gap_between_its_own_rounds_restarts_the_watch(alone):
    claim = make_claim()
    reconciler, clock = start()
    rounds(reconciler, clock, 25)
    clock.now += 60  # it slept, or the machine did
    reconciler.tick()
    rounds(reconciler, clock, 25)
    assert read(claim.job).status == "running"
    rounds(reconciler, clock, 5)
    assert read(claim.job).status == "retrying"


def test_an_unavailable_store_restarts_the_watch(alone, monkeypatch):
    claim = make_claim()
    reconciler, clock = start()
    rounds(reconciler, clock, 25)
    with monkeypatch.context() as away:
        away.setattr(queue, "active_jobs", lambda rows: (_ for _ in ()).throw(ConnectionError))
        with pytest.raises(ConnectionError):
            rounds(reconciler, clock, 5)
    rounds(reconciler, clock, 25)
    assert read(claim.job).status == "running"


def test_a_round_returns_the_time_until_the_next_lease_expires(alone):
    make_claim()
    reconciler, clock = start()
    clock.now += 5
    reconciler.tick()
    clock.now += 5
    assert reconciler.tick() == pytest.approx(20)


def test_a_job_that_keeps_failing_waits_longer_each_time(alone):
    job = make_job()
    for _ in range(2):
        make_claim(job).trainer_died("killed")
        if read(job).attempts < 2:
            transitions.requeue(read(job))
    reconciler, clock = start()
    rounds(reconciler, clock, 5)
    assert read(job).status == "retrying"
    rounds(reconciler, clock, 5)
    assert read(job).status == "queued"


def test_unfinished_end_steps_are_completed(alone):
    claim = make_claim()
    claim.finish("succeeded", result=result(claim))
    reconciler, clock = start()
    rounds(reconciler, clock, 10)
    assert queue.index_rows() == []
    assert quotas.held(claim.owner, "jobs") == set()


def test_an_interrupted_submission_becomes_void(alone):
    owner, job_id = make_owner(), new_id("ftjob")
    JobIndex(queue.shard(job_id), job_id, owner=owner).save()
    reconciler, clock = start()
    rounds(reconciler, clock, 595)
    assert len(queue.index_rows()) == 1
    rounds(reconciler, clock, 10)
    assert queue.index_rows() == []
    assert tables.get(tables.Job, owner, job_id).status == "void"


def test_a_job_whose_dataset_became_ready_unnoticed_is_queued(alone):
    owner = make_owner()
    dataset = make_dataset(owner, "checking")
    job = make_job(owner, dataset_id=dataset.dataset_id)
    dataset.update(actions=[Dataset.status.set("ready")])
    reconciler, _ = start()
    assert read(job).status == "queued"
    reconciler.tick()
    assert ("training", 1) in alone


def test_outbox_rows_that_nobody_handles_are_enqueued_again(alone):
    owner, dataset_id = make_owner(), new_id("file")
    outbox.put("check", owner, dataset_id)
    reconciler, clock = start()
    rounds(reconciler, clock, 25)
    assert alone == []
    rounds(reconciler, clock, 5)
    assert alone == [("errand", "check", owner, dataset_id, "")]


def test_a_dataset_is_deleted_when_it_expires_and_not_before(alone):
    owner = make_owner()
    now = time.time()
    kept, expired = (
        datasets.receive(owner, "r.jsonl", io.BytesIO(ROWS), expires_at=now + s) for s in (99, -1)
    )
    reconciler, clock = start()
    rounds(reconciler, clock, 40)
    rung = [ring[1:] for ring in alone if ring[:2] == ("errand", "expire")]
    assert rung == [("expire", owner, f"{int(now - 1)}#{expired.dataset_id}", "")]
    outbox.run(*rung[0])
    assert [row.dataset_id for row in access.list_datasets(owner)] == [kept.dataset_id]


def test_an_outbox_row_is_handled_once_however_often_it_is_enqueued(alone, monkeypatch):
    owner, done = make_owner(), []
    monkeypatch.setitem(outbox._handlers, "delete", lambda *args: done.append(args) or True)
    outbox.put("delete", owner, "x")
    outbox.run("delete", owner, "x", "")
    outbox.run("delete", owner, "x", "")
    assert done == [(owner, "x")]
    assert outbox.pending() == []


def test_an_outbox_row_whose_handler_must_wait_is_kept(alone, monkeypatch):
    owner = make_owner()
    monkeypatch.setitem(outbox._handlers, "delete", lambda *args: False)
    outbox.put("delete", owner, "x")
    outbox.run("delete", owner, "x", "")
    (row,) = outbox.pending()
    outbox.run("delete", owner, "x", "")  # a bell from before: somebody else has begun
    outbox.run("delete", owner, "x", row.lease)
    assert outbox.pending()[0].lease != row.lease


def test_the_audit_removes_ended_jobs_from_the_quota(alone, settings):
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


def test_the_janitor_deletes_unfinished_files_of_killed_processes(alone):
    from jobs.store import blobs
    from jobs.worker import worker_process

    folder = blobs.local_path(f"jobs/{new_id('ftjob')}/e1")
    folder.mkdir(parents=True)
    start_one = folder / f"{blobs.UNFINISHED}start"
    later_one = folder / f"{blobs.UNFINISHED}later"
    for left, sweep in ((start_one, worker_process.clear_leftovers), (later_one, None)):
        left.write_bytes(b"half")
        os.utime(left, (time.time() - 7200,) * 2)
        if sweep:
            sweep()
            assert not left.exists()
    reconciler, clock = start()
    clock.now += 3601
    reconciler.tick()
    assert not later_one.exists()


def test_the_janitor_deletes_only_unreferenced_files(alone, monkeypatch):
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

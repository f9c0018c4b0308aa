"""Every transition of a job, once, without concurrency."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest

from jobs.datasets import datasets
from jobs.lifecycle import finalize, requests, transitions
from jobs.lifecycle.transitions import JobRequest, LostRace, OverQuota, Refused
from jobs.store import access, blobs, outbox, queue, quotas, reasons, tables
from jobs.store.tables import JobIndex, TunedModel, month_of, new_id
from tests.jobs.makers import (
    WORKER,
    checkpoint,
    finish_upload,
    make_claim,
    make_dataset,
    make_job,
    make_owner,
    make_request,
    read,
    result,
)

pytestmark = pytest.mark.usefixtures("stores")


def is_listed(job, partition=None):
    return tables.get(JobIndex, partition or queue.shard(job.job_id), job.job_id) is not None


# ---- submit


def test_a_submitted_job_waits_in_the_queue():
    job = make_job()
    assert (read(job).status, read(job).desired, read(job).fencing_token) == ("queued", "run", 0)
    assert is_listed(job)
    assert is_listed(job, f"all#{month_of(job.created_at)}")
    assert quotas.held(job.owner, "jobs") == {job.job_id}
    assert job.model_id.startswith("ft:starter:")


def test_it_waits_for_its_dataset_to_be_checked():
    owner = make_owner()
    dataset = make_dataset(owner, "checking")
    job = make_job(owner, dataset_id=dataset.dataset_id)
    assert job.status == "validating"
    finish_upload(dataset)
    assert read(job).status == "queued"


@pytest.mark.parametrize("status", ["rejected", "deleted"])
def test_it_fails_when_its_dataset_cannot_be_used(status):
    owner = make_owner()
    dataset = make_dataset(owner, "checking")
    job = make_job(owner, dataset_id=dataset.dataset_id)
    if status == "deleted":
        datasets.delete(owner, dataset.dataset_id)
    else:
        datasets.finish_check(owner, dataset.dataset_id, "rejected", error="Line 3 is no JSON.")
    assert read(job).status == "failed"
    assert read(job).reason == f"dataset_{status}"
    assert read(job).message


def test_the_same_idempotency_key_creates_one_job():
    owner = make_owner()
    request = make_request(owner)
    first = transitions.submit(owner, request, idempotency_key="k")
    assert transitions.submit(owner, request, idempotency_key="k").job_id == first.job_id
    with pytest.raises(Refused):
        transitions.submit(owner, dataclasses.replace(request, suffix="x"), idempotency_key="k")
    assert transitions.submit(owner, request, idempotency_key="other").job_id != first.job_id


def test_a_new_field_of_a_request_leaves_earlier_hashes_unchanged():
    @dataclasses.dataclass(frozen=True)
    class LaterRequest(JobRequest):
        labels: tuple[str, ...] = ()
        options: dict[str, int] = dataclasses.field(default_factory=dict)

    today, later = JobRequest("starter", "file-1"), LaterRequest("starter", "file-1")
    assert later.hash() == today.hash()
    assert dataclasses.replace(later, labels=("a",)).hash() != today.hash()
    assert dataclasses.replace(later, options={"a": 1}).hash() != today.hash()


def test_the_key_of_an_interrupted_submission_can_be_used_again():
    owner = make_owner()
    request = make_request(owner)
    job_id = requests._id_for(owner, request, "k")
    finalize.make_void(owner, job_id)
    job = transitions.submit(owner, request, idempotency_key="k")
    assert job.job_id != job_id
    assert job.status == "queued"


def test_a_job_over_the_quota_is_refused_and_leaves_nothing(settings):
    settings.JOBS = settings.JOBS | {"max_jobs_per_owner": 1}
    job = make_job()
    with pytest.raises(OverQuota):
        make_job(job.owner)
    with pytest.raises(OverQuota):
        transitions.submit(job.owner, make_request(job.owner), idempotency_key="k")
    assert quotas.held(job.owner, "jobs") == {job.job_id}
    assert [row.job_id for row in queue.index_rows() if row.owner == job.owner] == [job.job_id]
    assert [row.job_id for row in access.list_jobs(job.owner)] == [job.job_id]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"settings": {"epochs": -1}}, "epochs"),
        ({"settings": {"nonsense": 1}}, "nonsense"),
        ({"suffix": "a/b"}, "suffix"),
        ({"base": ""}, "base"),
        ({"dataset_id": "file-0"}, "dataset_id"),
        ({"dataset_status": "rejected"}, "dataset_id"),
        ({"validation_dataset_id": "file-0"}, "validation_dataset_id"),
    ],
)
def test_an_invalid_job_is_refused_with_the_field(fields, field):
    with pytest.raises(Refused) as refusal:
        make_job(**fields)
    assert refusal.value.field == field


PAIR = {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away."}


def receive_pairs(owner):
    return datasets.receive(owner, "pairs.jsonl", iter([json.dumps(PAIR).encode() + b"\n"]))


@pytest.mark.parametrize("field", ["dataset_id", "validation_dataset_id"])
def test_preference_pairs_are_refused_at_once(field):
    owner = make_owner()
    pairs = receive_pairs(owner)
    assert datasets.finish_check(owner, pairs.dataset_id, "ready", summary={"kind": "preference"})
    with pytest.raises(Refused, match="better and a worse answer") as refusal:
        make_job(owner, **{field: pairs.dataset_id})
    assert refusal.value.field == field


def test_a_job_fails_if_its_file_turns_out_to_hold_preference_pairs():
    owner = make_owner()
    pairs = receive_pairs(owner)
    job = make_job(owner, dataset_id=pairs.dataset_id)
    assert datasets.finish_check(
        owner, pairs.dataset_id, "ready", summary={"kind": "preference", "examples": 1}
    )
    job = read(job)
    assert (job.status, job.reason) == ("failed", "dataset_unsupported")
    assert "better and a worse answer" in job.message


def test_early_stopping_is_refused_if_nothing_is_held_out():
    owner, settings = make_owner(), {"early_stopping_patience": 2, "validation_fraction": 0, "eval_every": 5}
    with pytest.raises(Refused, match="held-out examples") as refusal:
        make_job(owner, settings=settings)
    assert refusal.value.field == "early_stopping_patience"
    assert make_job(owner, settings=settings, validation_dataset_id=make_dataset(owner).dataset_id)


def test_another_users_dataset_is_refused():
    with pytest.raises(Refused):
        make_job(dataset_id=make_dataset(make_owner()).dataset_id)


# ---- transitions of the worker that has the lease


def test_a_job_is_claimed_once():
    job = make_job()
    seen = read(job)
    assert transitions.claim(seen, WORKER) is not None
    assert transitions.claim(seen, WORKER) is None
    assert (read(job).status, read(job).fencing_token) == ("running", 1)


def test_a_heartbeat_renews_the_lease_and_returns_the_desired_state():
    claim = make_claim()
    before = claim.job.lease
    assert claim.heartbeat({"step": 3}, {"loss": 2.5}, 1, 4) == "run"
    job = read(claim.job)
    assert job.lease != before
    assert (job.progress, job.metrics, job.last_seq) == ({"step": 3}, {"loss": 2.5}, 4)
    transitions.set_desired(job.owner, job.job_id, "pause")
    assert claim.heartbeat() == "pause"


def test_event_numbers_neither_repeat_nor_leave_a_gap():
    claim = make_claim()
    claim.heartbeat(first_seq=1, last_seq=4)
    claim.heartbeat(first_seq=1, last_seq=4)  # sent again after a lost reply
    with pytest.raises(LostRace):
        claim.heartbeat(first_seq=6, last_seq=7)
    assert read(claim.job).last_seq == 4


def test_the_checkpoint_pointer_only_moves_forward():
    claim = make_claim()
    claim.move_pointer(checkpoint(claim, 2))
    claim.move_pointer(checkpoint(claim, 4, best=True))
    for step in (5, 6, 7):
        claim.move_pointer(checkpoint(claim, step))
    assert [c["step"] for c in read(claim.job).checkpoints] == [4, 6, 7]
    with pytest.raises(LostRace):
        claim.move_pointer(checkpoint(claim, 3))
    assert read(claim.job).checkpoint_step == 7


def test_the_checkpoint_pointer_can_go_back_to_a_verified_one():
    claim = make_claim()
    for step in (2, 4):
        claim.move_pointer(checkpoint(claim, step))
    claim.pointer_back(claim.job.checkpoints[0])
    assert (read(claim.job).checkpoint_step, len(read(claim.job).checkpoints)) == (2, 1)
    claim.pointer_back(None)
    assert (read(claim.job).checkpoint_key, read(claim.job).checkpoints) == (None, [])
    claim.move_pointer(checkpoint(claim, 1))


def store_checkpoints(claim, *steps, **fields):
    """Stores checkpoints with files of 7 bytes and moves the pointer to each."""
    for step in steps:
        entry = checkpoint(claim, step, bytes=7, **fields)
        blobs.put_file(f"{entry['key']}/weights", io.BytesIO(b"weights"))
        claim.move_pointer(entry)
        finalize.after_pointer(claim.job)


def stored_folders(job):
    return [key.split("/", 2)[2].removesuffix("/weights") for key in blobs.list_keys(f"jobs/{job.job_id}/")]


def test_superseded_checkpoints_are_deleted():
    claim = make_claim()
    store_checkpoints(claim, 1, 2, 3)
    blobs.put_file(f"{claim.prefix}checkpoints/s4/weights", io.BytesIO(b"unfinished"))
    finalize.after_pointer(claim.job)
    assert stored_folders(claim.job) == ["e1/checkpoints/s2", "e1/checkpoints/s3", "e1/checkpoints/s4"]


def test_superseded_checkpoints_of_earlier_attempts_are_deleted_and_later_ones_are_not():
    old = make_claim()
    store_checkpoints(old, 1, 3)
    transitions.lose_lease(old.job)
    transitions.requeue(read(old.job))
    new = make_claim(old.job)
    new.pointer_back(new.job.checkpoints[0])  # step 3 is damaged
    store_checkpoints(new, 2)
    finalize.after_pointer(old.job)  # late, by a former lease owner
    assert stored_folders(new.job) == ["e1/checkpoints/s1", "e1/checkpoints/s3", "e2/checkpoints/s2"]
    store_checkpoints(new, 4, 5)
    assert stored_folders(new.job) == ["e2/checkpoints/s4", "e2/checkpoints/s5"]


def test_checkpoints_of_another_job_are_not_deleted():
    first = make_claim()
    store_checkpoints(first, 1)
    first.finish("failed", "not_finite")
    second = make_claim(transitions.retry(first.owner, first.job_id))
    store_checkpoints(second, 2, 3)
    assert stored_folders(first.job) == ["e1/checkpoints/s1"]
    assert quotas.stored_bytes(first.owner) == 35 + 7 + 14  # the dataset and the folder of each job


def test_checkpoints_count_against_the_storage_quota(settings):
    settings.JOBS = settings.JOBS | {"max_stored_bytes_per_owner": 50}
    claim = make_claim()  # its dataset has 35 bytes
    store_checkpoints(claim, 1, 2, 3)  # two are kept
    quotas.check_room(claim.owner)
    with pytest.raises(OverQuota):
        quotas.reserve(claim.owner, "upload-1", 2)
    quotas.reserve(claim.owner, "upload-1", 1)
    store_checkpoints(claim, 4, best=True)
    store_checkpoints(claim, 5, 6)
    for check in (quotas.check_room, quotas.check_fits):
        with pytest.raises(OverQuota, match="checkpoints"):
            check(claim.owner)


def test_checkpoints_of_a_deleted_job_no_longer_count():
    claim = make_claim()
    store_checkpoints(claim, 1, 2)
    claim.finish("failed", "not_finite")
    seen = read(claim.job)
    transitions.delete(claim.owner, claim.job_id)
    outbox.delete_bytes(claim.owner, claim.job_id)
    quotas.record_checkpoint_bytes(seen)  # a late writer
    assert quotas.stored_bytes(claim.owner) == 35
    assert stored_folders(claim.job) == []


def test_a_success_creates_a_model_and_clears_the_lists():
    claim = make_claim()
    assert claim.finish("succeeded", result=result(claim)) == "succeeded"
    job = read(claim.job)
    assert (job.status, job.lease, job.lease_owner) == ("succeeded", None, claim.lease_owner)
    assert is_listed(job)
    for _ in range(2):
        finalize.after_end(job.owner, job.job_id)
    model = access.get_model_for(job.owner, job.model_id)
    assert (model.prefix, model.step, model.bytes) == (f"{claim.prefix}final", 3, 2)
    assert not is_listed(job)
    assert is_listed(job, f"succeeded#{month_of(job.ended_at)}")
    assert quotas.held(job.owner, "jobs") == set()


def test_a_failure_has_a_message_and_advice():
    claim = make_claim()
    claim.finish("failed", "not_finite")
    job = read(claim.job)
    assert (job.status, job.reason) == ("failed", "not_finite")
    assert job.message
    assert job.advice
    with pytest.raises(LostRace):
        claim.heartbeat()


def test_giving_a_job_back_uses_no_attempt():
    claim = make_claim()
    assert claim.give_back() == "queued"
    assert (read(claim.job).attempts, read(claim.job).lease) == (0, None)


def test_a_dead_trainer_is_retried_as_long_as_it_makes_progress():
    job = make_job()
    for attempt in (1, 2):
        assert make_claim(job).trainer_died("killed") == "retrying"
        assert (read(job).attempts, read(job).attempts_without_progress) == (attempt, attempt)
        assert transitions.requeue(read(job))
    claim = make_claim(job)
    claim.move_pointer(checkpoint(claim, 1))
    assert claim.trainer_died("killed") == "retrying"
    transitions.requeue(read(job))
    make_claim(job).trainer_died("killed")
    transitions.requeue(read(job))
    assert make_claim(job).trainer_died("killed") == "failed"
    assert read(job).attempts == 5
    assert "Too many attempts" in read(job).message


@pytest.mark.parametrize("reason", ["disk_full", "not_writable", "store"])
def test_a_platform_fault_uses_no_attempt(reason):
    claim = make_claim()
    assert claim.trainer_died(reason) == "retrying"
    job = read(claim.job)
    assert (job.attempts, job.attempts_without_progress, job.platform_faults) == (0, 0, 1)
    assert (job.reason, job.message) == (reason, reasons.sentence(reason))


def test_a_lost_worker_uses_no_attempt():
    job = transitions.lose_lease(make_claim().job)
    assert (job.status, job.reason, job.attempts, job.platform_faults) == ("retrying", "lost_worker", 0, 1)


def test_too_many_platform_faults_in_a_row_fail_a_job(settings):
    settings.JOBS = settings.JOBS | {"max_platform_faults": 3}
    job = make_job()
    make_claim(job).trainer_died("disk_full")
    transitions.requeue(read(job))
    claim = make_claim(job)
    claim.move_pointer(checkpoint(claim, 1))  # progress resets the count
    for fault in ("store", "disk_full"):
        assert claim.trainer_died(fault) == "retrying"
        transitions.requeue(read(job))
        claim = make_claim(job)
    assert transitions.lose_lease(claim.job).status == "failed"
    job = read(job)
    assert (job.reason, job.attempts, job.platform_faults) == ("lost_worker", 0, 3)
    assert "Too many attempts" in job.message


def test_platform_faults_do_not_reset_the_attempts_of_a_dying_trainer():
    job = make_job()
    for reason, status in (
        ("killed", "retrying"),
        ("store", "retrying"),
        ("killed", "retrying"),
        ("killed", "failed"),
    ):
        assert make_claim(job).trainer_died(reason) == status
        transitions.requeue(read(job))
    assert (read(job).attempts, read(job).platform_faults) == (3, 1)


def test_the_backoff_of_platform_faults_doubles_too():
    job = make_job()
    job.attempts_without_progress = 1
    waits = []
    for job.platform_faults in range(4):
        waits.append(transitions.backoff_s(job))
    assert waits == [0, 10, 20, 40]


def test_the_backoff_doubles():
    job = make_job()
    waits = []
    for job.attempts_without_progress in range(1, 9):
        waits.append(transitions.backoff_s(job))
    assert waits == [0, 10, 20, 40, 80, 160, 320, 600]


def test_a_lost_lease_fences_off_its_old_owner():
    old = make_claim()
    assert transitions.lose_lease(old.job).status == "retrying"
    transitions.requeue(read(old.job))
    new = make_claim(old.job)
    assert new.fencing_token == 2
    for write in (
        old.heartbeat,
        old.give_back,
        lambda: old.move_pointer(checkpoint(old, 9)),
        lambda: old.finish("succeeded", result=result(old)),
        lambda: old.trainer_died("killed"),
    ):
        with pytest.raises(LostRace):
            write()
    assert new.heartbeat() == "run"


def test_a_renewed_lease_is_not_lost():
    claim = make_claim()
    seen = read(claim.job)
    claim.heartbeat()
    assert transitions.lose_lease(seen) is None


# ---- transitions requested by users


def test_waiting_jobs_change_state_at_once():
    job = make_job()
    assert transitions.set_desired(job.owner, job.job_id, "pause").status == "paused"
    assert transitions.set_desired(job.owner, job.job_id, "run").status == "queued"
    assert transitions.set_desired(job.owner, job.job_id, "cancel").status == "cancelled"
    assert transitions.set_desired(job.owner, job.job_id, "cancel").status == "cancelled"
    with pytest.raises(Refused):
        transitions.set_desired(job.owner, job.job_id, "run")


def test_a_job_with_an_unchecked_dataset_resumes_validating():
    job = make_job(dataset_status="checking")
    assert transitions.set_desired(job.owner, job.job_id, "pause").status == "paused"
    assert transitions.set_desired(job.owner, job.job_id, "run").status == "validating"


def test_a_cancel_cannot_be_taken_back():
    claim = make_claim()
    transitions.set_desired(claim.owner, claim.job_id, "cancel")
    with pytest.raises(Refused):
        transitions.set_desired(claim.owner, claim.job_id, "run")
    assert claim.heartbeat() == "cancel"


@pytest.mark.parametrize(
    ("desired", "leave", "expected"),
    [
        ("run", lambda c: c.give_back(), "queued"),
        ("pause", lambda c: c.give_back(), "paused"),
        ("cancel", lambda c: c.give_back(), "cancelled"),
        ("cancel", lambda c: c.finish("succeeded", result=result(c)), "cancelled"),
        ("pause", lambda c: c.finish("succeeded", result=result(c)), "succeeded"),
        ("cancel", lambda c: c.finish("failed", "not_finite"), "cancelled"),
        ("pause", lambda c: c.finish("paused"), "paused"),
        ("run", lambda c: c.finish("paused"), "queued"),
        ("pause", lambda c: c.trainer_died("killed"), "paused"),
        ("cancel", lambda c: c.trainer_died("killed"), "cancelled"),
    ],
)
def test_every_exit_from_running_respects_the_desired_state(desired, leave, expected):
    claim = make_claim()
    if desired != "run":
        transitions.set_desired(claim.owner, claim.job_id, desired)  # the worker does not know yet
    assert leave(claim) == expected
    job = read(claim.job)
    assert job.status == expected
    assert (job.result is None) == (expected != "succeeded")


def test_a_job_cannot_be_edited_once_an_attempt_begins():
    job = make_job()
    request = transitions.clone_request(job)
    changed = dataclasses.replace(request, settings={"epochs": 2}, name="better")
    edited = transitions.edit(job.owner, job.job_id, changed)
    assert (edited.settings, edited.name, edited.status, edited.model_id) == (
        {"epochs": 2}, "better", "queued", job.model_id,
    )  # fmt: skip
    make_claim(job)
    with pytest.raises(Refused):
        transitions.edit(job.owner, job.job_id, request)


def test_a_job_can_be_renamed_at_any_time():
    claim = make_claim()
    transitions.rename(claim.owner, claim.job_id, "new name")
    claim.heartbeat()
    claim.finish("failed", "bad_data")
    assert transitions.rename(claim.owner, claim.job_id, "newer").name == "newer"


def test_a_retry_resumes_from_the_last_checkpoint():
    claim = make_claim()
    claim.move_pointer(checkpoint(claim, 5))
    with pytest.raises(Refused):
        transitions.retry(claim.owner, claim.job_id)
    claim.finish("failed", "not_finite")
    retried = transitions.retry(claim.owner, claim.job_id)
    assert (retried.checkpoint_step, retried.status) == (5, "queued")
    assert retried.checkpoint_key == f"{claim.prefix}checkpoints/s5"
    with pytest.raises(Refused):  # its files are still needed
        transitions.delete(claim.owner, claim.job_id)


def test_a_deleted_job_stays_deleted():
    claim = make_claim()
    with pytest.raises(Refused):
        transitions.delete(claim.owner, claim.job_id)
    claim.finish("succeeded", result=result(claim))
    transitions.delete(claim.owner, claim.job_id, with_model=True)
    finalize.after_end(claim.owner, claim.job_id)
    for get in (access.get_job_for, access.get_model_for):
        with pytest.raises(access.NotFound):
            get(claim.owner, claim.job_id if get is access.get_job_for else claim.job.model_id)
    assert tables.get(TunedModel, claim.owner, claim.job.model_id).deleted


def test_bob_can_access_nothing_of_alices():
    claim = make_claim()
    bob = make_owner()
    for act in (
        lambda: access.get_job_for(bob, claim.job_id),
        lambda: transitions.set_desired(bob, claim.job_id, "cancel"),
        lambda: transitions.rename(bob, claim.job_id, "x"),
        lambda: transitions.delete(bob, claim.job_id),
        lambda: transitions.retry(bob, claim.job_id),
        lambda: access.get_job_for(claim.owner, new_id("ftjob")),
        lambda: access.get_job_for(claim.owner, "ftjob-é"),
        lambda: access.get_job_for(claim.owner, ""),
    ):
        with pytest.raises(access.NotFound):
            act()

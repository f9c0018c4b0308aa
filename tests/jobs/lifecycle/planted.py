"""Planted bugs: rules of the job protocol, switched off one at a time. The simulation must catch each of them; otherwise
its invariants prove nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jobs.events import event_log
from jobs.lifecycle import claims, finalize, moves, requests, transitions
from jobs.lifecycle.transitions import Claim
from jobs.registry import tuned_models
from jobs.store import access, queue, quotas, tables
from jobs.store.tables import EventChunk, Job, JobIndex, TunedModel, Usage

Patch = tuple[Any, str, Any]  # object, name of the attribute, replacement
real_landing = moves.landing
real_move = moves.move
real_after_end = finalize.after_end
real_update = tables.update
real_desired_status = moves.desired_status
real_put_new = tables.put_new
real_move_pointer = Claim.move_pointer


def worker_may_write_after_the_end(sim: Any) -> list[Patch]:
    """The status is not checked. Fencing token and lease owner stay in the row after the end."""

    def same(self: Claim, row: Job) -> bool:
        return (row.fencing_token, row.lease_owner) == (self.fencing_token, self.lease_owner)

    def mine(self: Claim) -> Any:
        return (Job.fencing_token == self.fencing_token) & (Job.lease_owner == self.lease_owner)

    return [(Claim, "is_mine", same), (Claim, "_mine", mine)]


def fencing_token_is_not_checked(sim: Any) -> list[Patch]:
    """A worker that once had the lease may write while any worker has it."""
    return [
        (Claim, "is_mine", lambda self, row: row.status == "running"),
        (Claim, "_mine", lambda self: Job.status == "running"),
    ]


def claim_ignores_later_changes(sim: Any) -> list[Patch]:
    real = moves.as_seen
    return [(moves, "as_seen", lambda job: Job.job_id.exists() if job.status == "queued" else real(job))]


def replies_are_believed(sim: Any) -> list[Patch]:
    """A failed condition is believed, although an earlier send of the same write may have been applied."""

    def update(row: Any, actions: Any, condition: Any, already_applied: Any = None) -> Any:
        return real_update(row, actions, condition)

    return [(tables, "update", update)]


def chunks_overwrite(sim: Any) -> list[Patch]:
    """Any lease owner, also a former one, overwrites an existing chunk."""

    def append(claim: Claim, batch: Any) -> None:
        EventChunk(
            claim.job_id, batch.first_seq, last_seq=batch.last_seq, fencing_token=claim.fencing_token, lease_owner=claim.lease_owner,
            lines=list(batch.lines),
        ).save()  # fmt: skip

    return [(event_log, "append", append)]


def chunks_are_put_once(sim: Any) -> list[Patch]:
    """An existing chunk is taken for one's own, although a worker that died may have written it."""

    def append(claim: Claim, batch: Any) -> None:
        chunk = EventChunk(
            claim.job_id, batch.first_seq, last_seq=batch.last_seq, fencing_token=claim.fencing_token, lease_owner=claim.lease_owner,
            lines=list(batch.lines),
        )  # fmt: skip
        tables.put_new(chunk)

    return [(event_log, "append", append)]


def batches_change_between_sends(sim: Any) -> list[Patch]:
    """A batch grows before it is sent again, and the stored chunk of its first send is taken for it."""
    sim.bug = "batch changes between sends"

    def append(claim: Claim, batch: Any) -> None:
        chunk = EventChunk(
            claim.job_id, batch.first_seq, last_seq=batch.last_seq, fencing_token=claim.fencing_token, lease_owner=claim.lease_owner,
            lines=list(batch.lines),
        )  # fmt: skip
        free = EventChunk.job_id.does_not_exist() | (EventChunk.fencing_token < claim.fencing_token)
        if tables.put_if(chunk, free, lambda row: row.lease_owner == claim.lease_owner) is None:
            raise transitions.LostRace

    return [(event_log, "append", append)]


def readers_read_chunks_first(sim: Any) -> list[Patch]:
    def read(owner: str, job_id: str, after: int = 0, limit: int | None = None) -> list[event_log.Event]:
        events = event_log._stored(job_id, after, 10**9)
        job = access.get_job_for(owner, job_id)
        visible = [event for event in events if event.seq <= job.last_seq]
        return [*visible, event_log.end_of(job)] if job.ended else visible

    return [(event_log, "read", read)]


def model_is_created_before_the_end(sim: Any) -> list[Patch]:
    sim.bug = "model before the end"
    return []


def broken_submissions_are_dropped(sim: Any) -> list[Patch]:
    """The list entry of a job that does not exist is removed, and no void job is stored."""
    return [
        (finalize, "make_void", lambda owner, job_id: tables.remove(JobIndex, queue.shard(job_id), job_id))
    ]


def waiting_jobs_ignore_pause_and_cancel(sim: Any) -> list[Patch]:
    """A pause or cancel of a job that no worker runs is stored, but does not change its status."""
    return [
        (moves, "desired_status", lambda job, desired: job.status),
        (transitions, "settle", lambda job: None),
    ]


def paused_is_an_end(sim: Any) -> list[Patch]:
    """A paused job is removed from the list of active jobs."""

    def move(job: Job, actions: Any, condition: Any, already_applied: Any = lambda row: False) -> Any:
        moved = real_move(job, actions, condition, already_applied)
        if moved and moved.status == "paused":
            tables.remove(JobIndex, queue.shard(job.job_id), job.job_id)
        return moved

    return [(moves, "move", move)]


def quota_is_a_counter(sim: Any) -> list[Patch]:
    sim.bug = "counter"

    def count(n: int) -> Callable[..., None]:
        return lambda owner, what, id: Usage(owner, what).update(actions=[Usage.version.add(n)])

    return [(quotas, "take", count(1)), (quotas, "release", count(-1))]


def deleting_removes_the_row(sim: Any) -> list[Patch]:
    """No tombstone remains."""

    def delete_job(job: Job, *, with_model: bool) -> None:
        tables.remove(TunedModel, job.owner, job.model_id)
        tables.remove(Job, job.owner, job.job_id)

    return [(finalize, "delete_job", delete_job)]


def janitor_sweeps_everything(sim: Any) -> list[Patch]:
    """It also deletes what the current lease owner is uploading, not only the files of lower fencing tokens."""
    return [(finalize, "_fencing_token_of", lambda key: -1)]


def janitor_forgets_the_fallbacks(sim: Any) -> list[Patch]:
    def pointer_only(job: Job) -> tuple[str, ...]:
        return tuple(f"{key}/" for key in [job.checkpoint_key, *tuned_models.folders_in_use(job)] if key)

    return [(finalize, "_named", pointer_only), (finalize, "_fencing_token_of", lambda key: -1)]


def superseded_files_are_deleted_before_the_pointer_moves(sim: Any) -> list[Patch]:

    def move_pointer(self: Claim, checkpoint: Any) -> str:
        ahead = Job()
        ahead.attribute_values = dict(self.job.attribute_values)
        ahead.checkpoints = claims.kept_checkpoints([*self.job.checkpoints, dict(checkpoint)])
        ahead.checkpoint_key, ahead.checkpoint_step = checkpoint["key"], checkpoint["step"]
        finalize.after_pointer(ahead)
        return real_move_pointer(self, checkpoint)

    return [(Claim, "move_pointer", move_pointer)]


def success_ignores_a_cancel(sim: Any) -> list[Patch]:
    def landing(event: str, job: Job) -> str:
        return "succeeded" if event == "succeeded" else real_landing(event, job)

    return [(moves, "landing", landing)]


def lost_leases_are_taken_blindly(sim: Any) -> list[Patch]:
    """The reconciler checks neither the version nor the lease when it takes a lease away."""

    def lose_lease(job: Job) -> Job | None:
        status = moves.landing("lost", job)
        actions = moves.leaving("lost", job, status, "lost_worker", "", "")
        return moves.move(job, actions, Job.job_id.exists())

    return [(transitions, "lose_lease", lose_lease)]


def requeueing_is_blind(sim: Any) -> list[Patch]:
    def requeue(job: Job) -> Job | None:
        return moves.move(job, [Job.status.set("queued")], Job.job_id.exists())

    return [(transitions, "requeue", requeue)]


def keys_are_never_renewed(sim: Any) -> list[Patch]:
    """An idempotency key keeps pointing to its first job, even if that is void."""
    return [(requests, "_id_for", lambda owner, request, key: "ftjob-01M83J8FG6AH60ED2AA8T9Y4E8")]


def cancels_can_be_taken_back(sim: Any) -> list[Patch]:
    def set_desired(owner: str, job_id: str, desired: str) -> Job:
        job = access.get_job_for(owner, job_id)
        if job.status == "running":
            moves.move(job, [Job.desired.set(desired)], Job.status == "running")
        elif not job.ended:
            status = real_desired_status(job, desired)
            moves.move(job, [Job.desired.set(desired), Job.status.set(status)], moves.as_seen(job))
        return job

    return [(transitions, "set_desired", set_desired)]


def the_list_is_cleared_first(sim: Any) -> list[Patch]:
    """A crash right after an end leaves its end steps undone."""

    def after_end(owner: str, job_id: str) -> None:
        job = tables.get(Job, owner, job_id)
        if job is not None and job.ended:
            tables.remove(JobIndex, queue.shard(job_id), job_id)
            real_after_end(owner, job_id)

    return [(finalize, "after_end", after_end)]


def jobs_are_listed_after_they_are_stored(sim: Any) -> list[Patch]:
    """The job's row is written before its list entry."""

    def put_new(row: Any, already_applied: Any = lambda row: True) -> Any:
        stored = real_put_new(row, already_applied)
        if isinstance(row, Job) and stored:
            JobIndex(queue.shard(row.job_id), row.job_id, owner=row.owner).save()
        return stored

    real_save = JobIndex.save

    def save(self: JobIndex, *args: Any, **options: Any) -> Any:
        ahead = self.partition.startswith("sim#") and tables.get(Job, self.owner, self.job_id) is None
        return None if ahead else real_save(self, *args, **options)

    return [(tables, "put_new", put_new), (JobIndex, "save", save)]


EVERY: list[Callable[[Any], list[Patch]]] = [
    worker_may_write_after_the_end, fencing_token_is_not_checked, claim_ignores_later_changes, replies_are_believed,
    chunks_overwrite, chunks_are_put_once, batches_change_between_sends, readers_read_chunks_first,
    model_is_created_before_the_end, broken_submissions_are_dropped, waiting_jobs_ignore_pause_and_cancel, paused_is_an_end,
    quota_is_a_counter, deleting_removes_the_row, janitor_sweeps_everything, janitor_forgets_the_fallbacks,
    superseded_files_are_deleted_before_the_pointer_moves, success_ignores_a_cancel, lost_leases_are_taken_blindly, requeueing_is_blind, keys_are_never_renewed,
    cancels_can_be_taken_back, the_list_is_cleared_first, jobs_are_listed_after_they_are_stored,
]  # fmt: skip
PLANTED = {bug.__name__.replace("_", " "): bug for bug in EVERY}

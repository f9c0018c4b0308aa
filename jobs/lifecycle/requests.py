"""What users ask for: submitting, pausing, cancelling, editing, retrying and deleting jobs."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from jobs.datasets import reports
from jobs.lifecycle import finalize, moves, recovery, submission
from jobs.lifecycle.moves import Desired
from jobs.lifecycle.submission import JobRequest, clone_request
from jobs.store import access, queue, quotas, tables
from jobs.store.errors import Refused
from jobs.store.lease import LostRace
from jobs.store.quotas import OverQuota
from jobs.store.states import DatasetStatus, JobStatus
from jobs.store.tables import ENDED, Job, JobIndex, Usage, month_of, new_id

TOO_SLOW = "The submission took too long and was discarded. Send it again."
MAX_TRIES = 50  # of a request for a job that keeps changing
EDITABLE = (
    "name",
    "method",
    "dataset_id",
    "dataset_name",
    "validation_dataset_id",
    "settings",
    "settings_schema",
    "prompts",
    "seed",
    "metadata",
    "needs",
    "body_hash",
)


# ---- submit --------------------------------------------------------------------------------------------------------


def submit(owner: str, request: JobRequest, *, idempotency_key: str | None = None, slug: str = "") -> Job:
    """Creates a job. Any number of calls with the same key create one job, and all return it.

    The job's row is written last. After a crash before that, the list of active jobs has a row without a job: the
    reconciler voids it after ten minutes, and a later call with the same key gets a new ID. Raises Refused, OverQuota,
    LostRace.
    """
    datasets = submission.check(owner, request)
    request = replace(request, base_snapshot=submission.pin_base(owner, request))
    job_id = new_id("ftjob") if idempotency_key is None else _id_for(owner, request, idempotency_key)
    known = tables.get(Job, owner, job_id)
    if known and known.status == JobStatus.VOID:
        raise LostRace(TOO_SLOW)
    if known:
        return known
    submission.check_base(datasets, request)
    job = submission.new_job(owner, job_id, request, datasets, slug)
    quotas.check_room(owner)
    if idempotency_key is None:
        quotas.check(owner, "jobs")
    for partition in (queue.shard(job_id), f"all#{month_of(job.created_at)}"):
        JobIndex(partition, job_id, owner=owner, name=job.name, base=job.base).save()
    try:
        quotas.take(owner, "jobs", job_id)
    except OverQuota:
        finalize.make_void(owner, job_id)
        raise
    accepted = tables.put_new(job, lambda current: current.body_hash == job.body_hash)
    if accepted is None or accepted.status == JobStatus.VOID:
        quotas.release(owner, "jobs", job_id)
        raise LostRace(TOO_SLOW)
    moves.announce(accepted)
    if accepted.status == JobStatus.VALIDATING and not reports.uses_default_tokenizer(
        request.base_snapshot or {}
    ):
        if datasets[0].status == DatasetStatus.READY:
            reports.request_report(datasets[0], request.base_snapshot or {})
        return recovery.validate(accepted) or accepted
    return accepted


def _id_for(owner: str, request: JobRequest, key: str) -> str:
    """The ID of the job with this key: the same for every call with the key, and a new one once that job is void."""
    usage_key = "idem#" + hashlib.sha256(key.encode()).hexdigest()
    mine, body_hash = new_id("ftjob"), request.hash()
    row = Usage(owner, usage_key, job_id=mine, body_hash=body_hash)
    while True:
        if tables.put_new(row, lambda current: current.job_id == mine):
            return mine
        existing = tables.get(Usage, owner, usage_key)
        if existing is None or not existing.job_id:
            continue
        job = tables.get(Job, owner, existing.job_id)
        if job is None or job.status != JobStatus.VOID:
            if existing.body_hash != body_hash:
                raise Refused(
                    "This idempotency key was already used for another request. Use a new key.",
                    field="idempotency_key",
                )
            return existing.job_id
        fresh = [Usage.job_id.set(mine), Usage.body_hash.set(body_hash)]
        if tables.update(row, fresh, Usage.job_id == existing.job_id, lambda current: current.job_id == mine):
            return mine


# ---- changes -------------------------------------------------------------------------------------------------------


def set_desired(owner: str, job_id: str, desired: Desired) -> Job:
    """Cancels, pauses or resumes a job. The worker of a running job sees the request at its next heartbeat; any other job
    moves at once. Idempotent. Raises NotFound, and Refused for a job that has ended or is being cancelled."""
    for _ in range(MAX_TRIES):
        job = access.get_job_for(owner, job_id)
        if job.status == JobStatus.CANCELLED and desired == "cancel":
            return job
        if job.ended:
            raise Refused(
                f"The job has already {job.status if job.status != 'cancelled' else 'been cancelled'}.",
                field="status",
            )
        if job.desired == "cancel" and desired != "cancel":
            raise Refused("The job is being cancelled, which cannot be undone.", field="status")
        status = job.status if job.status == JobStatus.RUNNING else moves.desired_status(job, desired)
        if (job.status, job.desired) == (status, desired):
            return (recovery.validate(job) if status == JobStatus.VALIDATING else None) or job
        if job.status == JobStatus.RUNNING:
            free = Job.status == JobStatus.RUNNING
            condition = free if desired == "cancel" else free & (Job.desired != "cancel")
            moved = moves.move(job, [Job.desired.set(desired)], condition)
        else:
            moved = moves.move(
                job, [Job.desired.set(desired), *moves.entering(job, status)], moves.as_seen(job)
            )
        if moved:
            moves.announce(moved)
            return (recovery.validate(moved) if moved.status == JobStatus.VALIDATING else None) or moved
    raise LostRace("The job changed at the same time. Try again.")


def rename(owner: str, job_id: str, name: str) -> Job:
    job = access.get_job_for(owner, job_id)
    if not 0 < len(name) <= 200:
        raise Refused("Enter a name of 1 to 200 characters.", field="name")
    moved = moves.move(job, [Job.name.set(name)], Job.deleted == False)  # noqa: E712  a condition, not a comparison
    if moved is None:
        raise access.NotFound(f"There is no job {job_id}.")
    partition = f"all#{month_of(job.created_at)}"
    JobIndex(partition, job_id, owner=owner, name=name, base=job.base).save()
    return moved


def can_edit(job: Job) -> bool:
    """True while no attempt has started and the job has not ended."""
    return not job.fencing_token and job.status in {JobStatus.VALIDATING, JobStatus.QUEUED, JobStatus.PAUSED}


def edit(owner: str, job_id: str, request: JobRequest) -> Job:
    """Changes the request of a job that has not started. The base and the suffix cannot change, nor can the model's ID."""
    job = access.get_job_for(owner, job_id)
    if not can_edit(job):
        raise Refused("The job has already started. Clone it and edit the copy.", field="status")
    request = replace(request, base=job.base, suffix=job.suffix, base_snapshot=job.base_snapshot)
    datasets = submission.check(owner, request)
    submission.check_base(datasets, request)
    fresh = submission.new_job(owner, job_id, request, datasets, "")
    actions = [moves.set_attribute(Job, name, getattr(fresh, name)) for name in EDITABLE]
    if job.status != JobStatus.PAUSED:
        actions.append(Job.status.set(fresh.status))
    moved = moves.move(job, actions, moves.as_seen(job), lambda current: current.body_hash == fresh.body_hash)
    if moved is None:
        raise LostRace("The job changed at the same time. Reload it and try again.")
    moves.announce(moved)
    return moved


def set_priority(owner: str, job_id: str, priority: int) -> Job:
    """For staff: moves a job ahead of all others, or behind them."""
    job = access.get_job_for(owner, job_id)
    moved = moves.move(job, [Job.priority.set(priority)], ~Job.status.is_in(*sorted(ENDED)))
    if moved is None:
        raise Refused("The job has ended, so its priority has no effect.", field="status")
    return moved


def retry(owner: str, job_id: str, *, slug: str = "") -> Job:
    """Creates a job that continues from the last checkpoint of one that failed or was cancelled. It is a new job because an
    end state never changes."""
    job = access.get_job_for(owner, job_id)
    if job.status not in {JobStatus.FAILED, JobStatus.CANCELLED}:
        raise Refused("Only a job that failed or was cancelled can be retried.", field="status")
    start = next((c for c in job.checkpoints if c["key"] == job.checkpoint_key), None)
    slug = slug or job.model_id.split(":")[2]
    again = replace(clone_request(job), start_from=start, base_snapshot=job.base_snapshot)
    return submit(owner, again, slug=slug)


def delete(owner: str, job_id: str, *, with_model: bool = False) -> None:
    """Deletes an ended job with its events, log and checkpoints. Its model is kept unless `with_model`."""
    job = access.get_job_for(owner, job_id)
    if not job.ended:
        raise Refused("Cancel the job first.", field="status")
    prefix = f"jobs/{job_id}/"
    for other in queue.active_jobs([row for row in queue.index_rows() if row.owner == owner]):
        if any(c["key"].startswith(prefix) for c in other.checkpoints) and not other.ended:
            raise Refused(
                f"“{other.name}” continues from this job's checkpoint. Wait until it has ended.",
                field="status",
            )
    finalize.delete_job(job, with_model=with_model)

"""What users ask for: submitting, pausing, cancelling, editing, retrying and deleting jobs."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from jobs.datasets import reports
from jobs.lifecycle import finalize, moves, recovery, submission
from jobs.lifecycle.moves import Desired
from jobs.lifecycle.submission import JobRequest, Refused, clone_request
from jobs.store import access, queue, quotas, tables
from jobs.store.lease import LostRace
from jobs.store.quotas import OverQuota
from jobs.store.tables import ENDED, Job, JobIndex, Usage, month_of, new_id

TOO_SLOW = "The submission took too long. Send it again."
MAX_TRIES = 50  # of a request for a job that keeps changing
EDITABLE = (
    "name",
    "method",
    "dataset_id",
    "dataset_name",
    "validation_dataset_id",
    "settings",
    "prompts",
    "seed",
    "metadata",
    "needs",
    "body_hash",
)


# ---- submit --------------------------------------------------------------------------------------------------------


def submit(owner: str, request: JobRequest, *, idempotency_key: str | None = None, slug: str = "") -> Job:
    """Creates a job. With a key, any number of calls create one job, and all return it.

    The list row is written first and the job last, so a crash leaves a row without a job. The reconciler voids it after
    ten minutes, and a later call with the same key gets a new id. Raises Refused, OverQuota, LostRace.
    """
    datasets = submission.check(owner, request)
    request = replace(request, base_snapshot=submission.pin_base(owner, request))
    job_id = new_id("ftjob") if idempotency_key is None else _id_for(owner, request, idempotency_key)
    known = tables.get(Job, owner, job_id)
    if known and known.status == "void":
        raise LostRace(TOO_SLOW)
    if known:
        return known
    submission.check_base(datasets, request.base_snapshot or {"id": request.base})
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
    accepted = tables.put_new(job, lambda found: found.body_hash == job.body_hash)
    if accepted is None or accepted.status == "void":
        quotas.release(owner, "jobs", job_id)
        raise LostRace(TOO_SLOW)
    moves.announce(accepted)
    if accepted.status == "validating" and not reports.uses_default_tokenizer(request.base_snapshot or {}):
        if datasets[0].status == "ready":
            reports.request_report(datasets[0], request.base_snapshot or {})
        return recovery.validate(accepted) or accepted
    return accepted


def _id_for(owner: str, request: JobRequest, key: str) -> str:
    """The id of the key's job: the same for every call with the key, and a new one once that job is void."""
    usage_key = "idem#" + hashlib.sha256(key.encode()).hexdigest()
    mine, body_hash = new_id("ftjob"), request.hash()
    row = Usage(owner, usage_key, job_id=mine, body_hash=body_hash)
    while True:
        if tables.put_new(row, lambda found: found.job_id == mine):
            return mine
        found = tables.get(Usage, owner, usage_key)
        if found is None or not found.job_id:
            continue
        job = tables.get(Job, owner, found.job_id)
        if job is None or job.status != "void":
            if found.body_hash != body_hash:
                raise Refused(
                    "idempotency_key", "This idempotency key was used for another request. Use a new key."
                )
            return found.job_id
        fresh = [Usage.job_id.set(mine), Usage.body_hash.set(body_hash)]
        if tables.update(row, fresh, Usage.job_id == found.job_id, lambda found: found.job_id == mine):
            return mine


# ---- changes -------------------------------------------------------------------------------------------------------


def set_desired(owner: str, job_id: str, desired: Desired) -> Job:
    """Cancels, pauses or resumes. A running job learns of it with its next heartbeat; any other moves at once.
    Idempotent. Raises NotFound, and Refused for a job that has ended or is being cancelled."""
    for _ in range(MAX_TRIES):
        job = access.get_job_for(owner, job_id)
        if job.status == "cancelled" and desired == "cancel":
            return job
        if job.ended:
            raise Refused(
                "status",
                f"The job has already {job.status if job.status != 'cancelled' else 'been cancelled'}.",
            )
        if job.desired == "cancel" and desired != "cancel":
            raise Refused("status", "The job is being cancelled.")
        status = job.status if job.status == "running" else moves.desired_status(job, desired)
        if (job.status, job.desired) == (status, desired):
            return (recovery.validate(job) if status == "validating" else None) or job
        if job.status == "running":
            free = Job.status == "running"
            condition = free if desired == "cancel" else free & (Job.desired != "cancel")
            moved = moves.move(job, [Job.desired.set(desired)], condition)
        else:
            moved = moves.move(
                job, [Job.desired.set(desired), *moves.entering(job, status)], moves.as_seen(job)
            )
        if moved:
            moves.announce(moved)
            return (recovery.validate(moved) if moved.status == "validating" else None) or moved
    raise LostRace("The job changed at the same time. Try again.")


def rename(owner: str, job_id: str, name: str) -> Job:
    job = access.get_job_for(owner, job_id)
    if not 0 < len(name) <= 200:
        raise Refused("name", "Enter a name of 1 to 200 characters.")
    moved = moves.move(job, [Job.name.set(name)], Job.deleted == False)  # noqa: E712  a condition, not a comparison
    if moved is None:
        raise access.NotFound(f"There is no job {job_id}.")
    partition = f"all#{month_of(job.created_at)}"
    JobIndex(partition, job_id, owner=owner, name=name, base=job.base).save()
    return moved


def can_edit(job: Job) -> bool:
    """True while no attempt has started and the job has not ended."""
    return not job.fencing_token and job.status in {"validating", "queued", "paused"}


def edit(owner: str, job_id: str, request: JobRequest) -> Job:
    """Changes the request while no attempt has started. The base and the suffix stay, and so does the model's id."""
    job = access.get_job_for(owner, job_id)
    if not can_edit(job):
        raise Refused("status", "The job has started. Clone it and change the copy.")
    request = replace(request, base=job.base, suffix=job.suffix, base_snapshot=job.base_snapshot)
    datasets = submission.check(owner, request)
    submission.check_base(datasets, request.base_snapshot or {"id": request.base})
    fresh = submission.new_job(owner, job_id, request, datasets, "")
    actions = [moves.set_attribute(Job, name, getattr(fresh, name)) for name in EDITABLE]
    if job.status != "paused":
        actions.append(Job.status.set(fresh.status))
    moved = moves.move(job, actions, moves.as_seen(job), lambda found: found.body_hash == fresh.body_hash)
    if moved is None:
        raise LostRace("The job changed at the same time. Reload it and try again.")
    moves.announce(moved)
    return moved


def set_priority(owner: str, job_id: str, priority: int) -> Job:
    """For staff: puts a job ahead of (or behind) all others."""
    job = access.get_job_for(owner, job_id)
    moved = moves.move(job, [Job.priority.set(priority)], ~Job.status.is_in(*sorted(ENDED)))
    if moved is None:
        raise Refused("status", "The job has ended.")
    return moved


def retry(owner: str, job_id: str, *, slug: str = "") -> Job:
    """A new job that continues from the last checkpoint of one that failed or was cancelled (an end state never changes)."""
    job = access.get_job_for(owner, job_id)
    if job.status not in {"failed", "cancelled"}:
        raise Refused("status", "Only a job that failed or was cancelled can be retried.")
    start = next((c for c in job.checkpoints if c["key"] == job.checkpoint_key), None)
    slug = slug or job.model_id.split(":")[2]
    again = replace(clone_request(job), start_from=start, base_snapshot=job.base_snapshot)
    return submit(owner, again, slug=slug)


def delete(owner: str, job_id: str, *, with_model: bool = False) -> None:
    """Deletes an ended job with its events, log and checkpoints. Its model is kept unless `with_model`."""
    job = access.get_job_for(owner, job_id)
    if not job.ended:
        raise Refused("status", "Cancel the job first.")
    prefix = f"jobs/{job_id}/"
    for other in queue.active_jobs([row for row in queue.index_rows() if row.owner == owner]):
        if any(c["key"].startswith(prefix) for c in other.checkpoints) and not other.ended:
            raise Refused(
                "status", f"“{other.name}” continues from this job's checkpoint. Wait until it has ended."
            )
    finalize.delete_job(job, with_model=with_model)

"""The work that remains after a job has ended or was deleted. Each step is idempotent, so any process may run it any number
of times. The rows in the list of active jobs and in the outbox ensure that it is completed after a crash."""

from __future__ import annotations

import sys
import time

from jobs.registry import tuned_models
from jobs.store import blobs, end_steps, outbox, queue, quotas, tables
from jobs.store.states import JobStatus
from jobs.store.tables import ENDED, EventChunk, Job, JobIndex, month_of


def after_end(owner: str, job_id: str) -> None:
    """Runs every step for an ended job: the model's row, notifications, quotas, cleanup. Last, it removes the job from the
    list of active jobs."""
    job = tables.get(Job, owner, job_id)
    if job is None or not job.ended:
        return
    if job.status == JobStatus.VOID:
        tables.remove(JobIndex, f"all#{month_of(tables.time_of(job_id))}", job_id)
    elif not job.deleted:
        partition = f"{job.status}#{month_of(job.ended_at or job.created_at)}"
        JobIndex(partition, job_id, owner=owner, name=job.name, base=job.base).save()
    end_steps.run(job)
    quotas.release(owner, "jobs", job_id)
    quotas.record_checkpoint_bytes(job)
    sweep(job)
    tables.remove(JobIndex, queue.shard(job_id), job_id)


def make_void(owner: str, job_id: str) -> None:
    """Voids an incomplete submission, so that a late writer cannot complete it. Its rows are then removed like those of any
    ended job."""
    tables.put_new(Job(owner, job_id, status=JobStatus.VOID, ended_at=time.time()))
    after_end(owner, job_id)


# ---- bytes ---------------------------------------------------------------------------------------------------------


def sweep(job: Job) -> int:
    """Deletes objects of earlier attempts (of all attempts, once the job has ended) that neither the job nor its model names.
    Attempts are told apart by the fencing token in their keys. Returns the number of deleted objects."""
    named = _named(job)
    keys = blobs.list_keys(f"jobs/{job.job_id}/e") if job.fencing_token else []
    old = [
        key
        for key in keys
        if (_fencing_token_of(key) < job.fencing_token or job.ended) and not key.startswith(named)
    ]
    for key in old:
        blobs.delete_file(key)
    return len(old)


def after_pointer(job: Job) -> None:
    """Called after the lease owner has moved the pointer; `job` is the row that this write returned. Checkpoints that the job
    no longer names are deleted now, because a long job would otherwise collect them until it ends."""
    quotas.record_checkpoint_bytes(job)
    for folder in superseded(job):
        blobs.delete_prefix(f"{folder}/")


def superseded(job: Job) -> list[str]:
    """Checkpoints from before the pointer's that the job no longer names. Those with a higher fencing token belong to a later
    lease owner, and those of later steps may still be uploading."""
    named = {str(entry["key"]) for entry in job.checkpoints} | {str(job.checkpoint_key)}
    stored = {key.rpartition("/")[0] for key in blobs.list_keys(f"jobs/{job.job_id}/e")}
    return [
        folder
        for folder in sorted(stored - named)
        if "/checkpoints/" in folder
        and _fencing_token_of(folder) <= job.fencing_token
        and _step(folder) < int(job.checkpoint_step or 0)
    ]


def _step(folder: str) -> int:
    """The token and step in …/checkpoints/e<fencing token>-s<step>. Folders with any other name are not deleted here."""
    text = folder.rpartition("s")[2]
    return int(text) if text.isdigit() else sys.maxsize


def _named(job: Job) -> tuple[str, ...]:
    folders = [str(c["key"]) for c in job.checkpoints]
    folders += [job.checkpoint_key] if job.checkpoint_key else []
    folders += tuned_models.folders_in_use(job)
    if job.result and not job.deleted:
        folders.append(str(job.result.get("prefix") or ""))
    return tuple(folder.rstrip("/") + "/" for folder in folders if folder)


def _fencing_token_of(key: str) -> int:
    """The token in jobs/<id>/e<fencing token>/…"""
    text = key.split("/")[2][1:]
    return int(text) if text.isdigit() else 0


# ---- deletions: the outbox, then the tombstone, then the bytes -----------------------------------------------------


def delete_job(job: Job, *, with_model: bool) -> None:
    after_end(job.owner, job.job_id)
    outbox.put("delete", job.owner, job.job_id)
    if with_model and job.model_id:
        outbox.put("delete", job.owner, job.model_id)
        tuned_models.put_tombstone(job.owner, job.model_id)
    actions = [
        Job.deleted.set(True),
        Job.version.add(1),
        Job.checkpoints.set([]),
        Job.checkpoint_key.remove(),
    ]
    tables.update(
        job, [*actions, Job.plan.remove(), Job.resume_check.remove()], Job.status.is_in(*sorted(ENDED))
    )
    outbox.enqueue("delete", job.owner, job.job_id)


@outbox.deletion_handler("ftjob-")
def _delete_job(owner: str, job_id: str) -> bool:
    job = tables.get(Job, owner, job_id)
    if job is None or not job.deleted:
        return True  # the process died after it put the outbox row and before the tombstone
    kept = tuple(folder.rstrip("/") + "/" for folder in tuned_models.folders_in_use(job))
    for key in blobs.list_keys(f"jobs/{job_id}/"):
        if not key.startswith(kept):
            blobs.delete_file(key)
    quotas.record_checkpoint_bytes(job)
    for chunk in tables.rows(EventChunk, job_id):
        tables.remove(EventChunk, job_id, chunk.first_seq)
    for partition in (
        f"all#{month_of(job.created_at)}",
        f"{job.status}#{month_of(job.ended_at or job.created_at)}",
    ):
        tables.remove(JobIndex, partition, job_id)
    return True

"""A job's life: every state, and every move between them. This text, `tests/jobs/protocol.py` and the code below say the
same; change them together.

    validating ──► queued ◄─────────────┐        validating  its dataset is still being checked
        │            │  ▲               │        queued      waits for a worker
        │      claim │  │ give back     │        running     one worker holds the lease
        │            ▼  │               │        retrying    its trainer or worker died; waits a little
        │          running ──► retrying─┘        paused      as asked; no end
        │            │   │         │
        ▼            ▼   └─► paused ─► queued (or validating, if it was never checked)
      failed    succeeded, failed, cancelled     void        a submission that broke off

`status` is moved by whoever holds the lease; where nobody holds one, by people and the reconciler. `desired` (run,
pause, cancel) is written by people only, and cancel is never taken back. On a job nobody holds, the same write sets the
status it asks for. Every move out of running lands where `desired`, as seen, asks. Ends never change.

A holder's writes show that the job is *mine*: running, with my fencing token, and held by me. The token rises with each claim, so
what an older holder still sends is refused. Leaving running removes the lease but keeps epoch and lease_owner, so that "was
it me?" can be answered after a lost reply. Everybody else's moves show status and version as seen; every write adds 1 to
`version`. What follows from an end (model, notices, quota, lists) is `jobs.lifecycle.finalize`, made by anybody and safe to repeat.

A trainer that died is charged to the job: 3 attempts in a row without a new checkpoint end it, 10 in all. A platform
fault (a lost worker, a full disk, a store that is away) is not: those are counted apart, and 30 of them in a row without
a new checkpoint end the job, so that one that brings down its workers cannot go on for ever. Both wait longer each time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from django.conf import settings
from django.dispatch import receiver
from pynamodb.exceptions import PynamoDBException
from pynamodb.expressions.condition import Condition
from pynamodb.expressions.update import Action

from jobs.datasets import reports
from jobs.datasets.signals import dataset_settled
from jobs.events import event_log
from jobs.lifecycle import finalize, submission
from jobs.lifecycle.submission import JobRequest, Refused, clone_request
from jobs.store import access, queue, quotas, reasons, redis_client, tables
from jobs.store.lease import LostRace
from jobs.store.queue import WorkerInfo
from jobs.store.quotas import OverQuota
from jobs.store.tables import ENDED, Dataset, HeartbeatJob, Job, JobIndex, Usage, month_of, new_id

__all__ = ["Claim", "JobRequest", "LostRace", "OverQuota", "Refused", "WorkerInfo", "clone_request"]

log = logging.getLogger(__name__)

Desired = Literal["run", "pause", "cancel"]
PROCESS = secrets.token_hex(8)  # names this start of this process
BELLS = 8  # rung at most for waiting jobs; more workers than that hear of them from the reconciler
TOO_SLOW = "The submission took too long. Send it again."
PLATFORM_FAULTS = frozenset({"lost", "broke off"})  # ways out of running that spend no attempt
TRIES = 50  # of a person's move against a job that keeps moving
queue_position = queue.position
after_end = finalize.after_end


# ---- submit --------------------------------------------------------------------------------------------------------


def submit(owner: str, request: JobRequest, *, idempotency_key: str | None = None, slug: str = "") -> Job:
    """Takes a job on. With a key, any number of calls make one job and all return it.

    The list row comes first and the job last, so a crash leaves a row without a job: the reconciler voids that after ten
    minutes, and a later call with the same key takes a fresh id. Raises Refused, OverQuota, LostRace.
    """
    datasets = submission.check(owner, request)
    request = replace(request, base_snapshot=submission.pin_base(owner, request))
    job_id = new_id("ftjob") if idempotency_key is None else _id_for(owner, request, idempotency_key)
    known = tables.get(Job, owner, job_id)
    if known and known.status == "void":
        raise LostRace(TOO_SLOW)
    if known:
        return known
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
    _news(accepted)
    if accepted.status == "validating" and not reports.uses_default_tokenizer(request.base_snapshot or {}):
        if datasets[0].status == "ready":
            reports.request_report(datasets[0], request.base_snapshot or {})
        return validate(accepted) or accepted
    return accepted


def _id_for(owner: str, request: JobRequest, key: str) -> str:
    """The job that belongs to the key: one id for all who call with it, a fresh one once its job is void."""
    what = "idem#" + hashlib.sha256(key.encode()).hexdigest()
    mine, body_hash = new_id("ftjob"), request.hash()
    row = Usage(owner, what, job_id=mine, body_hash=body_hash)
    while True:
        if tables.put_new(row, lambda found: found.job_id == mine):
            return mine
        found = tables.get(Usage, owner, what)
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


# ---- moves of people -----------------------------------------------------------------------------------------------


def ask(owner: str, job_id: str, desired: Desired) -> Job:
    """Cancels, pauses or resumes. A running job hears of it with its next heartbeat; any other moves at once.
    Asking again is harmless. Raises NotFound, and Refused for a job that has ended or is being cancelled."""
    for _ in range(TRIES):
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
        status = job.status if job.status == "running" else _where_asked(job, desired)
        if (job.status, job.desired) == (status, desired):
            return (validate(job) if status == "validating" else None) or job
        if job.status == "running":
            free = Job.status == "running"
            condition = free if desired == "cancel" else free & (Job.desired != "cancel")
            moved = _move(job, [Job.desired.set(desired)], condition)
        else:
            moved = _move(job, [Job.desired.set(desired), *_entering(job, status)], _as_seen(job))
        if moved:
            _news(moved)
            return (validate(moved) if moved.status == "validating" else None) or moved
    raise LostRace("The job keeps moving. Try again.")


def _where_asked(job: Job, desired: str) -> str:
    """The status that `desired` asks for on a job nobody holds."""
    if desired == "cancel":
        return "cancelled"
    if desired == "pause":
        return "paused"
    if job.status == "paused":
        return "queued" if job.fencing_token else "validating"  # what never ran may never have been checked
    return job.status


def rename(owner: str, job_id: str, name: str) -> Job:
    job = access.get_job_for(owner, job_id)
    if not 0 < len(name) <= 200:
        raise Refused("name", "Give a name of 1 to 200 characters.")
    moved = _move(job, [Job.name.set(name)], Job.deleted == False)  # noqa: E712  an expression, no comparison
    if moved is None:
        raise access.NotFound(f"There is no job {job_id}.")
    partition = f"all#{month_of(job.created_at)}"
    JobIndex(partition, job_id, owner=owner, name=name, base=job.base).save()
    return moved


def can_edit(job: Job) -> bool:
    """No attempt has begun, and it was not cancelled."""
    return not job.fencing_token and job.status in {"validating", "queued", "paused"}


def edit(owner: str, job_id: str, request: JobRequest) -> Job:
    """Changes what was asked for while no attempt has begun. Base, suffix and so the model's id stay."""
    job = access.get_job_for(owner, job_id)
    if not can_edit(job):
        raise Refused("status", "The job has started. Clone it, and change the copy.")
    request = replace(request, base=job.base, suffix=job.suffix, base_snapshot=job.base_snapshot)
    fresh = submission.new_job(owner, job_id, request, submission.check(owner, request), "")
    names = (
        "name", "method", "dataset_id", "dataset_name", "validation_dataset_id", "settings", "prompts", "seed", "metadata",
        "needs", "body_hash",
    )  # fmt: skip
    actions = [_set(Job, name, getattr(fresh, name)) for name in names]
    if job.status != "paused":
        actions.append(Job.status.set(fresh.status))
    moved = _move(job, actions, _as_seen(job), lambda found: found.body_hash == fresh.body_hash)
    if moved is None:
        raise LostRace("The job moved on at the same moment. Look at it again.")
    _news(moved)
    return moved


def prioritise(owner: str, job_id: str, priority: int) -> Job:
    """Staff put a job before (or behind) everybody's."""
    job = access.get_job_for(owner, job_id)
    moved = _move(job, [Job.priority.set(priority)], ~Job.status.is_in(*sorted(ENDED)))
    if moved is None:
        raise Refused("status", "The job has ended.")
    return moved


def retry(owner: str, job_id: str, *, slug: str = "") -> Job:
    """A new job that goes on from the last checkpoint of one that failed or was cancelled (an end never changes)."""
    job = access.get_job_for(owner, job_id)
    if job.status not in {"failed", "cancelled"}:
        raise Refused("status", "Only a job that failed or was cancelled can be tried again.")
    start = next((c for c in job.checkpoints if c["key"] == job.checkpoint_key), None)
    slug = slug or job.model_id.split(":")[2]
    again = replace(clone_request(job), start_from=start, base_snapshot=job.base_snapshot)
    return submit(owner, again, slug=slug)


def delete(owner: str, job_id: str, *, with_model: bool = False) -> None:
    """Removes an ended job, its events, log and checkpoints; its model stays unless `with_model`."""
    job = access.get_job_for(owner, job_id)
    if not job.ended:
        raise Refused("status", "Cancel the job first.")
    prefix = f"jobs/{job_id}/"
    for other in queue.active_jobs([row for row in queue.index_rows() if row.owner == owner]):
        if any(c["key"].startswith(prefix) for c in other.checkpoints) and not other.ended:
            raise Refused(
                "status", f"“{other.name}” goes on from this job's checkpoint. Wait until it has ended."
            )
    finalize.delete_job(job, with_model=with_model)


# ---- claim: queued → running ---------------------------------------------------------------------------------------


def claim_next(worker: WorkerInfo) -> Claim | None:
    """Claims the job that is next for this worker; None when none waits that fits it."""
    for job in queue.in_order(queue.active_jobs(), queue.served()):
        if queue.fits(job, worker):
            claimed = claim(job, worker)
            if claimed:
                queue.record_served(job.owner)
                return claimed
    return None


def claim(job: Job, worker: WorkerInfo) -> Claim | None:
    """The right to run `job`, as it was seen queued; None when another was first."""
    if job.status != "queued" or job.desired != "run":
        return None
    lease_owner = f"{worker.process}/{secrets.token_hex(8)}"
    actions: list[Action] = [
        Job.status.set("running"),
        Job.phase.set("preparing"),
        Job.fencing_token.set(job.fencing_token + 1),
        Job.lease_owner.set(lease_owner),
        Job.worker.set(worker.name),
        Job.lease.set(_new_lease()),
    ]
    if job.started_at is None:
        actions.append(Job.started_at.set(time.time()))
    condition = _as_seen(job) & (Job.desired == "run")
    # Without an answer we may hold the lease and not know it, so the question is put until it is answered.
    moved = _insist(lambda: _move(job, actions, condition, lambda found: found.lease_owner == lease_owner))
    if moved is None or moved.status != "running":
        return None
    _news(moved)
    return Claim(moved, int(moved.fencing_token), lease_owner)


Answer = TypeVar("Answer")


def _insist(send: Callable[[], Answer]) -> Answer:
    """Sends the same write until the store answers, for as long as a lease would live."""
    deadline = time.monotonic() + settings.JOBS["self_fence_s"]
    while True:
        try:
            return send()
        except PynamoDBException:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


# ---- moves of the holder -------------------------------------------------------------------------------------------


@dataclass
class Claim:
    """The lease on a job: the right of one attempt to write to it. `job` is the row as last seen.

    Each method raises LostRace when the lease is gone: stop then, and write nothing more. When the store cannot be
    reached it raises PynamoDBException: the same call with the same arguments may be repeated.
    """

    job: Job
    fencing_token: int
    lease_owner: str

    @property
    def owner(self) -> str:
        return self.job.owner

    @property
    def job_id(self) -> str:
        return self.job.job_id

    @property
    def desired(self) -> str:
        return self.job.desired

    @property
    def prefix(self) -> str:
        """Where this attempt puts its objects; a zombie of another epoch writes where nobody looks."""
        return f"jobs/{self.job_id}/e{self.fencing_token}/"

    def is_mine(self, found: Job) -> bool:
        return found.status == "running" and (found.fencing_token, found.lease_owner) == (
            self.fencing_token,
            self.lease_owner,
        )

    def _mine(self) -> Condition:
        return (
            (Job.status == "running")
            & (Job.fencing_token == self.fencing_token)
            & (Job.lease_owner == self.lease_owner)
        )

    def heartbeat(
        self,
        progress: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        first_seq: int | None = None,
        last_seq: int | None = None,
        *,
        phase: str | None = None,
        plan: Mapping[str, Any] | None = None,
        estimate: Mapping[str, Any] | None = None,
        proof: Mapping[str, Any] | None = None,
    ) -> str:
        """Renews the lease, tells how it goes, and shows the events first_seq … last_seq to readers (their chunk is
        stored by then). One try of 3 s. Returns what people want: run, pause or cancel."""
        told: dict[str, Any] = {
            "progress": progress,
            "metrics": metrics,
            "phase": phase,
            "plan": plan,
            "estimate": estimate,
            "resume_check": proof,
        }
        actions: list[Action] = [Job.lease.set(_new_lease()), Job.version.add(1)]
        actions += [_set(Job, name, value) for name, value in told.items() if value is not None]
        condition = self._mine()
        if first_seq is not None and last_seq is not None:
            actions.append(Job.last_seq.set(last_seq))
            condition &= Job.last_seq == first_seq - 1
        moved = tables.update(
            HeartbeatJob(self.owner, self.job_id),
            actions,
            condition,
            lambda found: self.is_mine(_as_job(found)) and last_seq in (None, found.last_seq),
        )
        return self._seen(_as_job(moved) if moved else None).desired

    def move_pointer(self, checkpoint: Mapping[str, Any]) -> str:
        """Says where a next attempt goes on: {"key", "step", "sha256", "bytes", …}, whose bytes are stored and verified.
        Progress was made, so earlier deaths count no more. Returns what people want."""
        kept = _kept([*self.job.checkpoints, dict(checkpoint)])
        step, key = int(checkpoint["step"]), str(checkpoint["key"])
        moved = _move(
            self.job,
            [
                Job.checkpoint_key.set(key),
                Job.checkpoint_step.set(step),
                Job.checkpoints.set(kept),
                Job.attempts_without_progress.set(0),
                Job.platform_faults.set(0),
            ],
            self._mine() & (Job.checkpoint_step.does_not_exist() | (Job.checkpoint_step < step)),
            lambda found: self.is_mine(found) and found.checkpoint_key == key,
        )
        return self._seen(moved).desired

    def pointer_back(self, checkpoint: Mapping[str, Any] | None) -> None:
        """Before training: the pointer's bytes don't verify. Moves it to the newest that does, or away."""
        before, key = self.job.checkpoint_key, str(checkpoint["key"]) if checkpoint else None
        actions: list[Action]
        if checkpoint:
            kept = [c for c in self.job.checkpoints if c["step"] <= checkpoint["step"]]
            actions = [Job.checkpoint_key.set(str(key)), Job.checkpoint_step.set(int(checkpoint["step"]))]
        else:
            kept = []
            actions = [Job.checkpoint_key.remove(), Job.checkpoint_step.remove()]
        pointer = Job.checkpoint_key == before if before else Job.checkpoint_key.does_not_exist()
        moved = _move(
            self.job,
            [*actions, Job.checkpoints.set(kept)],
            self._mine() & pointer,
            lambda found: self.is_mine(found) and found.checkpoint_key == key,
        )
        self._seen(moved)

    def finish(
        self,
        status: Literal["succeeded", "failed", "cancelled", "paused"],
        reason: str = "",
        result: Mapping[str, Any] | None = None,
        *,
        message: str = "",
        advice: str = "",
    ) -> str:
        """The attempt is over: done, failed for good, or stopped as people asked. `result` of a success holds
        {"prefix", "files": [{"name", "bytes", "sha256"}], "step", "metrics", …}. Returns where the job landed."""
        event = "stopped" if status in {"cancelled", "paused"} else status
        return self._leave(event, reason, message, advice, result)

    def give_back(self) -> str:
        """The worker is asked to stop: back into the queue, nothing charged. Returns where the job landed."""
        return self._leave("stopped")

    def trainer_died(self, reason: str, message: str = "", advice: str = "") -> str:
        """Tried again, or failed when it was tried too often; a platform fault spends no attempt. Returns where the job
        landed."""
        event = "broke off" if reasons.is_platform_fault(reason) else "died"
        return self._leave(event, reason, message, advice)

    def _leave(
        self,
        event: str,
        reason: str = "",
        message: str = "",
        advice: str = "",
        result: Mapping[str, Any] | None = None,
    ) -> str:
        while True:
            job = self.job
            status = landing(event, job)
            actions = _leaving(event, job, status, reason, message, advice)
            if status == "succeeded":
                actions.append(Job.result.set({**(result or {}), "epoch": self.fencing_token}))
            moved = _move(
                job,
                actions,
                self._mine() & (Job.desired == job.desired),
                lambda found, status=status: (
                    found.status == status  # type: ignore[misc]  # bound for this round
                    and (found.fencing_token, found.lease_owner) == (self.fencing_token, self.lease_owner)
                ),
            )
            if moved:
                self.job = moved
                _news(moved)
                return status
            # Not mine any more, or people changed their mind meanwhile: then it lands elsewhere.
            self._seen(tables.get(Job, self.owner, self.job_id))

    def _seen(self, found: Job | None) -> Job:
        if found is None or not self.is_mine(found):
            raise LostRace(f"The lease on {self.job_id} (fencing token {self.fencing_token}) is lost.")
        self.job = found
        return found


def landing(event: str, job: Job) -> str:
    """Where a move out of running lands, by what people want."""
    if job.desired == "cancel":
        return "cancelled"
    if event in {"succeeded", "failed"}:
        return event
    if event == "stopped":
        return {"run": "queued", "pause": "paused"}[job.desired]
    if event in PLATFORM_FAULTS:
        spent = job.platform_faults + 1 >= settings.JOBS["max_platform_faults"]
    else:
        spent = (
            job.attempts + 1 >= settings.JOBS["max_attempts"]
            or job.attempts_without_progress + 1 >= settings.JOBS["max_attempts_without_progress"]
        )
    if spent:
        return "failed"
    return "paused" if job.desired == "pause" else "retrying"


def _leaving(event: str, job: Job, status: str, reason: str, message: str, advice: str) -> list[Action]:
    actions = [Job.lease.remove(), *_entering(job, status)]
    tried = event == "died" or event in PLATFORM_FAULTS
    if event == "died" and status != "cancelled":
        actions += [Job.attempts.add(1), Job.attempts_without_progress.add(1)]
    if event in PLATFORM_FAULTS and status != "cancelled":
        actions.append(Job.platform_faults.add(1))
    if status == "failed" and tried:
        message = " ".join(
            part for part in (message or reasons.sentence(reason), reasons.sentence("attempts_spent")) if part
        )
    if status == "cancelled":
        reason, message, advice = "cancelled", "", ""
    if status in ENDED or reason:
        actions += [
            Job.reason.set(reason),
            Job.message.set(message or reasons.sentence(reason)),
            Job.advice.set(advice or reasons.advice(reason)),
        ]
    return actions


# ---- moves of the reconciler ---------------------------------------------------------------------------------------


def lose_lease(job: Job) -> Job | None:
    """running → retrying, or failed when attempts are spent. The caller has watched this lease not change for 30 s."""
    status = landing("lost", job)
    actions = _leaving("lost", job, status, "lost_worker", "", "")
    return _told(_move(job, actions, _as_seen(job) & (Job.lease == job.lease)))


def settle(job: Job) -> Job | None:
    """Brings a job nobody holds to where `desired` asks, should the write that set it have been of an older sight."""
    status = _where_asked(job, job.desired)
    if job.ended or job.status == "running" or status == job.status:
        return None
    return _told(_move(job, _entering(job, status), _as_seen(job)))


def requeue(job: Job) -> Job | None:
    """retrying → queued. The caller has waited as long as `backoff_s` says."""
    return _told(_move(job, _entering(job, "queued"), _as_seen(job) & (Job.desired == "run")))


def backoff_s(job: Job) -> float:
    """Nothing the first time, then 10 s · 2ⁿ up to 10 min; progress starts the count again."""
    tries = job.attempts_without_progress + job.platform_faults
    if tries <= 1:
        return 0.0
    return float(min(settings.JOBS["backoff_first_s"] * 2 ** (tries - 2), settings.JOBS["backoff_max_s"]))


def validate(job: Job) -> Job | None:
    """validating → queued once its datasets are ready, and read with its base's own tokenizer; → failed when one was
    refused or deleted."""
    for dataset_id in filter(None, (job.dataset_id, job.validation_dataset_id)):
        dataset = tables.get(Dataset, job.owner, dataset_id)
        if dataset is None or dataset.deleted:
            return _fail_unchecked(job, "dataset_deleted", "")
        if dataset.status == "rejected":
            return _fail_unchecked(job, "dataset_rejected", dataset.error)
        if dataset.status != "ready":
            return None
        report = reports.for_job(job, dataset) if dataset_id == job.dataset_id else None
        if report is not None and report.status == "checking":
            return None
        if report is not None and report.status == "refused":
            return _fail_unchecked(job, "dataset_rejected", report.error)
    return _told(_move(job, _entering(job, "queued"), _as_seen(job)))


@receiver(dataset_settled)
def validate_waiting(owner: str, dataset_id: str, **kwargs: Any) -> None:
    """The jobs that wait for this dataset."""
    for job in queue.active_of(owner):
        if job.status == "validating" and dataset_id in (job.dataset_id, job.validation_dataset_id):
            validate(job)


def _fail_unchecked(job: Job, reason: str, message: str) -> Job | None:
    actions = _leaving("failed", job, "failed", reason, message, "")
    return _told(_move(job, actions, _as_seen(job)))


# ---- small parts ---------------------------------------------------------------------------------------------------


def _move(
    job: Job,
    actions: list[Action],
    condition: Condition,
    already_applied: Callable[[Job], bool] = lambda found: False,
) -> Job | None:
    return tables.update(job, [*actions, Job.version.add(1)], condition, already_applied)


def _as_seen(job: Job) -> Condition:
    return (Job.status == job.status) & (Job.version == job.version)


def _entering(job: Job, status: str) -> list[Action]:
    actions: list[Action] = [Job.status.set(status), Job.phase.set("")]
    if status in ENDED:
        actions.append(Job.ended_at.set(time.time()))
    return actions


def _set(table: Any, name: str, value: Any) -> Action:
    attribute = getattr(table, name)
    if value is None:
        return attribute.remove()
    return attribute.set(dict(value) if isinstance(value, Mapping) else value)


def _new_lease() -> str:
    return secrets.token_hex(8)


def _as_job(row: HeartbeatJob) -> Job:
    """Both classes read the same rows."""
    job = Job()
    job.attribute_values = row.attribute_values
    return job


def _kept(checkpoints: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last two and the best: what a next attempt may fall back on, and what the janitor must keep."""
    last = checkpoints[-2:]
    return [c for c in checkpoints[:-2] if c.get("best")][-1:] + last


def _told(moved: Job | None) -> Job | None:
    if moved:
        _news(moved)
    return moved


def _news(job: Job) -> None:
    """Rings, after the write. Losing these loses nothing: readers poll, and the reconciler rings again."""
    event_log.announce(job.job_id, int(job.last_seq))
    if job.ended:
        redis_client.enqueue("after_end", job.owner, job.job_id)
    elif job.status == "queued" and job.desired == "run":
        redis_client.enqueue_training(BELLS)


def this_worker(**has: Any) -> WorkerInfo:
    """This process as a worker."""
    return WorkerInfo(name=f"{os.uname().nodename}/{os.getpid()}", process=PROCESS, **has)

"""A job's life: every state, and every move between them. This text, `tests/jobs/lifecycle/protocol.py` and the code say the same;
change them together.

    validating ──► queued ◄─────────────┐        validating  its dataset is still being checked
        │            │  ▲               │        queued      waits for a worker
        │      claim │  │ give back     │        running     one worker holds the lease
        │            ▼  │               │        retrying    its trainer or worker died; waits before the next attempt
        │          running ──► retrying─┘        paused      on request; not an end state
        │            │   │         │
        ▼            ▼   └─► paused ─► queued (or validating, if it was never checked)
      failed    succeeded, failed, cancelled     void        an incomplete submission

`status` is changed by the worker that holds the lease; while no worker holds one, by users and the reconciler. `desired`
(run, pause, cancel) is written by users only, and a cancel is never taken back. If no worker holds the job, the same
write also sets the status that `desired` asks for. Every move out of running leads to the status that `desired`, as last
seen, asks for. End states never change.

Each write of a lease owner requires that the job is *mine*: running, with my fencing token, and owned by me. The token
rises with each claim, so late writes of a former owner are refused. Leaving running removes the lease but keeps
fencing_token and lease_owner, so that a writer whose reply was lost can see that its write was applied. All other moves
require the status and version as last seen; every write adds 1 to `version`. What follows an end (model, notifications,
quota, lists) is in `jobs.lifecycle.finalize`; any process may run it, and it is idempotent.

A trainer that dies is charged to the job: 3 attempts in a row without a new checkpoint end it, or 10 in all. A platform
fault (a lost worker, a full disk, an unreachable store) is not: these are counted separately, and 30 of them in a row
without a new checkpoint end the job, so that a job that brings down its workers does not run forever. The wait before the
next attempt grows each time in both cases.

The moves are in `requests` (users), `claims` (the lease owner) and `recovery` (the reconciler).
"""

from __future__ import annotations

from jobs.lifecycle.claims import Claim, claim, claim_next, this_worker
from jobs.lifecycle.moves import Desired
from jobs.lifecycle.recovery import backoff_s, lose_lease, requeue, settle, validate
from jobs.lifecycle.requests import can_edit, delete, edit, rename, retry, set_desired, set_priority, submit
from jobs.lifecycle.submission import JobRequest, clone_request
from jobs.store.errors import Refused
from jobs.store.lease import LostRace
from jobs.store.queue import WorkerInfo
from jobs.store.quotas import OverQuota

__all__ = [
    "Claim",
    "Desired",
    "JobRequest",
    "LostRace",
    "OverQuota",
    "Refused",
    "WorkerInfo",
    "backoff_s",
    "can_edit",
    "claim",
    "claim_next",
    "clone_request",
    "delete",
    "edit",
    "lose_lease",
    "rename",
    "requeue",
    "retry",
    "set_desired",
    "set_priority",
    "settle",
    "submit",
    "this_worker",
    "validate",
]

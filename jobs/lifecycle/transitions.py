"""A job's life: every state, and every move between states. Change this text, `tests/jobs/lifecycle/protocol.py` and the code
together.

    validating ──► queued ◄─────────────┐        validating  its dataset is still being checked
        │            │  ▲               │        queued      waits for a worker
        │      claim │  │ give back     │        running     one worker holds the lease
        │            ▼  │               │        retrying    its trainer or worker died; it waits before the next attempt
        │          running ──► retrying─┘        paused      on request; this is not an end state
        │            │   │         │
        ▼            ▼   └─► paused ─► queued (or validating, if it was never checked)
      failed    succeeded, failed, cancelled     void        an incomplete submission

`status` is changed by the worker that holds the lease or, while no worker holds it, by users and the reconciler. `desired`
(run, pause, cancel) is written only by users, and a cancellation is never undone. If no worker holds the job, the same
write also sets the status that `desired` asks for. When a job leaves `running`, its next status is the one that `desired`,
as last seen, asks for. End states never change.

Each write of a lease owner requires that the job is *mine*: running, with my fencing token, and owned by me. The token
increases with each claim, so late writes of a former owner are refused. When a job leaves `running`, its lease is removed
but fencing_token and lease_owner stay, so that a writer whose reply was lost can see that its write was applied. All other
moves require the status and version as last seen; every write adds 1 to `version`. The work after a job has ended (model,
notifications, quotas, lists) is in `jobs.lifecycle.finalize`; any process may run it, and it is idempotent.

If the trainer dies, this counts as an attempt: the job fails after 3 attempts in a row without a new checkpoint, or after
10 in total. A platform fault (a lost worker, a full disk, an unreachable store) does not count as an attempt. Platform
faults are counted separately, and 30 of them in a row without a new checkpoint end the job, so that a job that crashes its
workers does not run forever. In both cases the wait before the next attempt grows each time.

This module only gathers what other packages call. The moves are in `requests` (users), `claims` (the lease owner) and
`recovery` (the reconciler); `moves` decides where each leads and writes it.
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

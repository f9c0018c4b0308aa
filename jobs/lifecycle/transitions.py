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
what an older holder still sends is refused. Leaving running removes the lease but keeps fencing_token and lease_owner, so that "was
it me?" can be answered after a lost reply. Everybody else's moves show status and version as seen; every write adds 1 to
`version`. What follows from an end (model, notices, quota, lists) is `jobs.lifecycle.finalize`, made by anybody and safe to repeat.

A trainer that died is charged to the job: 3 attempts in a row without a new checkpoint end it, 10 in all. A platform
fault (a lost worker, a full disk, a store that is away) is not: those are counted apart, and 30 of them in a row without
a new checkpoint end the job, so that one that brings down its workers cannot go on for ever. Both wait longer each time.
"""

from __future__ import annotations

from jobs.lifecycle.claims import Claim, claim, claim_next, this_worker
from jobs.lifecycle.moves import Desired
from jobs.lifecycle.recovery import backoff_s, lose_lease, requeue, settle, validate
from jobs.lifecycle.requests import can_edit, delete, edit, rename, retry, set_desired, set_priority, submit
from jobs.lifecycle.submission import JobRequest, Refused, clone_request
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

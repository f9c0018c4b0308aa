"""Cancelling in each state in which no worker runs the job, and late moves of a job that has ended.

No processes: the product's own code against a real DynamoDB.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from unittest.mock import patch

from jobs.lifecycle import finalize, transitions
from jobs.lifecycle.transitions import Claim, LostRace, Refused
from jobs.store import queue, tables
from jobs.store.states import JobStatus
from jobs.store.tables import Job
from tests.faults.lost_responses import WORKER, claimed, now, pointer, queued, request_of


def validating() -> tuple[Job, Claim | None]:
    return queued("checking"), None


def waiting() -> tuple[Job, Claim | None]:
    return queued(), None


def paused() -> tuple[Job, Claim | None]:
    job = queued()
    return transitions.set_desired(job.owner, job.job_id, "pause"), None


def paused_with_checkpoint() -> tuple[Job, Claim | None]:
    mine = claimed()
    mine.move_pointer(pointer(mine, 10))
    transitions.set_desired(mine.owner, mine.job_id, "pause")
    mine.heartbeat({})
    mine.finish(JobStatus.PAUSED)
    return mine.job, mine


def retrying() -> tuple[Job, Claim | None]:
    mine = claimed()
    mine.trainer_died("killed")
    return mine.job, mine


STATES: dict[str, Callable[[], tuple[Job, Claim | None]]] = {
    "validating": validating,
    "queued": waiting,
    "paused": paused,
    "paused with a checkpoint": paused_with_checkpoint,
    "retrying": retrying,
}


def cancel(state: str, rng: random.Random) -> list[str]:
    """Cancelled at once, without any worker; all late moves afterwards, in any order, change nothing."""
    before, mine = STATES[state]()
    seen = now(before)
    wrong = []
    if transitions.set_desired(seen.owner, seen.job_id, "cancel").status != "cancelled":
        wrong.append("it was not cancelled at once")
    end = now(seen).to_simple_dict()
    late = late_moves(seen, mine)
    rng.shuffle(late)
    for move in late:
        with suppress(LostRace, Refused):
            move()
        changed = {name for name, value in now(seen).to_simple_dict().items() if end.get(name) != value}
        if changed:
            return [*wrong, f"the final state changed: {', '.join(sorted(changed))}"]
    return wrong


def late_moves(seen: Job, mine: Claim | None) -> list[Callable[[], object]]:
    """Moves of users, workers, the reconciler and a former lease owner, all based on the row before it ended."""
    owner, job_id = seen.owner, seen.job_id
    moves: list[Callable[[], object]] = [
        lambda: transitions.set_desired(owner, job_id, "run"),
        lambda: transitions.set_desired(owner, job_id, "pause"),
        lambda: transitions.set_desired(owner, job_id, "cancel"),
        lambda: transitions.edit(owner, job_id, request_of(owner)),
        lambda: transitions.set_priority(owner, job_id, 5),
        lambda: transitions.claim(seen, WORKER),
        lambda: transitions.settle(seen),
        lambda: transitions.requeue(seen),
        lambda: transitions.validate(seen) if seen.status == "validating" else None,
        lambda: transitions.lose_lease(seen),
        lambda: finalize.make_void(owner, job_id),
    ]
    if mine:
        files = [{"name": "x", "bytes": 1, "sha256": "0"}]
        moves += [
            lambda: mine.heartbeat({"step": 99}),
            lambda: mine.move_pointer(pointer(mine, 99)),
            lambda: mine.finish(JobStatus.SUCCEEDED, result={"prefix": "x", "files": files, "step": 99}),
            mine.give_back,
            lambda: mine.trainer_died("killed"),
        ]
    return moves


# ---- fair share ------------------------------------------------------------------------------------------------------


def jobs_started_before_other_user(slots: int, count: int = 100) -> int:
    """One user has queued `count` jobs and occupies all `slots`; another user queues one. Returns how many more jobs of the
    first user start before it, as slots become free."""
    owner, other = tables.new_id("user"), tables.new_id("user")
    real = queue.index_rows
    theirs = lambda: [row for row in real() if row.owner in (owner, other)]  # noqa: E731  ignore jobs of other tests
    with patch.object(queue, "index_rows", theirs):
        return _started_before(owner, other, slots, count)


def _started_before(owner: str, other: str, slots: int, count: int) -> int:
    request = request_of(owner)
    for _ in range(count):
        transitions.submit(owner, request)
    running = [transitions.claim_next(WORKER) for _ in range(slots)]
    one = transitions.submit(other, request_of(other))
    before = 0
    while True:
        done = running.pop(0)
        assert done
        done.finish(JobStatus.FAILED)
        following = transitions.claim_next(WORKER)
        assert following
        running.append(following)
        if following.job_id == one.job_id:
            break
        before += 1
    for claim in running:
        assert claim
        claim.finish(JobStatus.FAILED)
    for job in tables.rows(Job, owner):
        if not job.ended:
            transitions.set_desired(owner, job.job_id, "cancel")
    for job in [*tables.rows(Job, owner), *tables.rows(Job, other)]:
        finalize.after_end(job.owner, job.job_id)
    return before

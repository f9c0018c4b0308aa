"""Lost responses: a write reaches DynamoDB and is applied, but its response never arrives.

Each kind of conditional write is sent through the product's own code to a real DynamoDB; a chosen response (or several in
a row, so that the client's retries are used up too) is dropped after the write was applied. The caller repeats the call
as the product's callers do. Then the rows must be as if nothing had happened.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest.mock import patch

from botocore.exceptions import ReadTimeoutError
from botocore.httpsession import URLLib3Session
from botocore.retries import standard
from pynamodb.exceptions import DeleteError, PutError, PynamoDBException, UpdateError

from jobs.events import event_log
from jobs.lifecycle import finalize, transitions
from jobs.lifecycle.transitions import Claim, JobRequest
from jobs.store import queue, tables
from jobs.store.states import JobStatus
from jobs.store.tables import (
    Dataset,
    EventChunk,
    Job,
    JobIndex,
    TunedModel,
    Usage,
    WebhookDelivery,
    WebhookEndpoint,
)

WRITES = (b"PutItem", b"UpdateItem", b"DeleteItem")
WORKER = queue.WorkerInfo(name="host/1", process="process-1")
Result = TypeVar("Result")
Kind = Callable[[random.Random], list[str]]


@dataclass
class Loss:
    """Drops the responses to `times` writes, after the first `skip` ones."""

    skip: int = 0
    times: int = 0
    lost: int = 0


@contextmanager
def losing(loss: Loss) -> Iterator[None]:
    real = URLLib3Session.send

    def send(self: URLLib3Session, request: Any) -> Any:
        response = real(self, request)
        target = request.headers.get("X-Amz-Target", b"")
        target = target if isinstance(target, bytes) else target.encode()
        if not target.endswith(WRITES):
            return response
        if loss.skip:
            loss.skip -= 1
        elif loss.times:
            loss.times, loss.lost = loss.times - 1, loss.lost + 1
            raise ReadTimeoutError(endpoint_url=request.url)
        return response

    no_wait = lambda self, context: 0  # noqa: E731
    with (
        patch.object(URLLib3Session, "send", send),
        patch.object(standard.ExponentialBackoff, "delay_amount", no_wait),
    ):
        yield


def retry(call: Callable[[], Result]) -> Result:
    """Repeats the call until the store responds."""
    while True:
        try:
            return call()
        except PynamoDBException as error:
            if not isinstance(error, PutError | UpdateError | DeleteError):
                raise


def random_loss(rng: random.Random, writes: int = 1) -> Loss:
    """Drops the response to one of the `writes` of a call, usually once, sometimes as often as the client retries."""
    return Loss(rng.randrange(writes), rng.choice([1, 1, 2, 3]))


def lose(loss: Loss, call: Callable[[], Result], wrong: list[str]) -> Result | None:
    """`retry(call)` with dropped responses. Adds an error to `wrong` instead of raising it."""
    with losing(loss):
        try:
            return retry(call)
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")
            return None
        finally:
            if not loss.lost:
                wrong.append("no response was dropped")


def expect(wrong: list[str], row: Any, **fields: Any) -> list[str]:
    return wrong + [
        f"{name} is {getattr(row, name)!r}, not {value!r}"
        for name, value in fields.items()
        if getattr(row, name) != value
    ]


# ---- initial states --------------------------------------------------------------------------------------------------


def request_of(owner: str, status: str = "ready") -> JobRequest:
    dataset = Dataset(owner, tables.new_id("file"), name="rows", status=status, key="datasets/none", bytes=35)
    tables.put_new(dataset)
    return JobRequest(base="starter", dataset_id=dataset.dataset_id, name="rows")


def queued(status: str = "ready") -> Job:
    owner = tables.new_id("user")
    return transitions.submit(owner, request_of(owner, status))


def claimed() -> Claim:
    claim = transitions.claim(now(queued()), WORKER)
    assert claim
    return claim


def now(job: Job) -> Job:
    current = tables.get(Job, job.owner, job.job_id)
    assert current
    return current


def pointer(claim: Claim, step: int) -> dict[str, Any]:
    key = f"{claim.prefix}checkpoints/s{step}"
    return {"key": key, "step": step, "epoch": claim.fencing_token, "sha256": "0" * 64}


# ---- kinds of writes ------------------------------------------------------------------------------------------------


def submit(rng: random.Random) -> list[str]:
    """Five writes: the idempotency key, two index rows, the quota, the job. The result is one job, counted once."""
    owner, wrong = tables.new_id("user"), list[str]()
    request = request_of(owner)
    job = lose(random_loss(rng, 5), lambda: transitions.submit(owner, request, idempotency_key="key"), wrong)
    jobs = list(tables.rows(Job, owner))
    usage = tables.get(Usage, owner, "jobs")
    listed = [row.job_id for row in queue.index_rows() if row.owner == owner]
    if job is None or [row.job_id for row in jobs] != [job.job_id] or listed != [job.job_id]:
        return [*wrong, f"{len(jobs)} jobs, {len(listed)} in the index"]
    if usage is None or set(usage.ids or ()) != {job.job_id}:
        wrong.append("the quota counts something else")
    return expect(wrong, jobs[0], status="queued", version=0, attempts=0)


def claim(rng: random.Random) -> list[str]:
    wrong, job = list[str](), queued()
    mine = lose(random_loss(rng), lambda: transitions.claim(now(job), WORKER), wrong)
    row = now(job)
    lease_owner = mine.lease_owner if mine else "the worker that claimed it"
    return expect(
        wrong, row, status="running", fencing_token=1, lease_owner=lease_owner, version=1, attempts=0
    )


def heartbeat(rng: random.Random) -> list[str]:
    """The chunk, then the heartbeat that makes it visible. Twice, since a lost response must not delay the next one."""
    wrong, mine = list[str](), claimed()
    expected = []
    for first in (1, 3):
        lines = (f'{{"t": "log", "n": {first}}}', f'{{"t": "log", "n": {first + 1}}}')
        expected += [first, first + 1]
        batch = event_log.Batch(first, lines)

        def send(batch: event_log.Batch = batch) -> None:
            event_log.append(mine, batch)
            mine.heartbeat({"step": batch.last_seq}, None, batch.first_seq, batch.last_seq)

        lose(random_loss(rng, 2), send, wrong)
    events = event_log.read(mine.owner, mine.job_id)
    if [event.data.get("n") for event in events] != expected or [event.seq for event in events] != expected:
        wrong.append(f"events {[(event.seq, event.data.get('n')) for event in events]}")
    if len(list(tables.rows(EventChunk, mine.job_id))) != 2:
        wrong.append("chunks are missing or doubled")
    return expect(wrong, now(mine.job), status="running", fencing_token=1, last_seq=4, attempts=0)


def move_pointer(rng: random.Random) -> list[str]:
    wrong, mine = list[str](), claimed()
    for step in (10, 20):
        lose(random_loss(rng), lambda step=step: mine.move_pointer(pointer(mine, step)), wrong)  # type: ignore[misc]
    row = now(mine.job)
    if [c["step"] for c in row.checkpoints] != [10, 20]:
        wrong.append(f"checkpoints {[c['step'] for c in row.checkpoints]}")
    key = pointer(mine, 20)["key"]
    return expect(wrong, row, checkpoint_step=20, checkpoint_key=key, status="running", version=3)


def finish(rng: random.Random) -> list[str]:
    """Succeeded, failed, cancelled or paused; then the steps after the end, with dropped responses there too."""
    wrong, mine = list[str](), claimed()
    tables.put_new(WebhookEndpoint(mine.owner, tables.new_id("hook"), url="https://example.com", secret="x"))
    how = rng.choice(["succeeded", "failed", "cancelled", "paused"])
    if how in ("cancelled", "paused"):
        transitions.set_desired(mine.owner, mine.job_id, "cancel" if how == "cancelled" else "pause")
        mine.heartbeat({})
    version = now(mine.job).version
    files = [{"name": "config.json", "bytes": 2, "sha256": "0" * 64}]
    result = {"prefix": f"{mine.prefix}final", "files": files, "step": 3, "metrics": {}}
    lose(random_loss(rng), lambda: mine.finish(how, "", result if how == "succeeded" else None), wrong)  # type: ignore[arg-type]
    row = now(mine.job)
    wrong = expect(wrong, row, status=how, fencing_token=1, attempts=0, version=version + 1, lease=None)
    if how == "paused":
        return wrong
    lose(random_loss(rng, 3), lambda: finalize.after_end(row.owner, row.job_id), wrong)
    retry(lambda: finalize.after_end(row.owner, row.job_id))
    models = [model.model_id for model in tables.rows(TunedModel, row.owner)]
    if models != ([row.model_id] if how == "succeeded" else []):
        wrong.append(f"{how}, and {len(models)} models")
    deliveries = [row.delivery_id for row in tables.rows(WebhookDelivery, row.owner)]
    if len(deliveries) != len(set(deliveries)) or not 1 <= len(deliveries) <= 2:
        wrong.append(f"{len(deliveries)} deliveries")
    usage = tables.get(Usage, row.owner, "jobs")
    if usage and usage.ids:
        wrong.append("the quota still counts it")
    if tables.get(JobIndex, queue.shard(row.job_id), row.job_id):
        wrong.append("it is still in the index")
    return wrong


def give_back(rng: random.Random) -> list[str]:
    wrong, mine = list[str](), claimed()
    status = lose(random_loss(rng), mine.give_back, wrong)
    if status != "queued":
        wrong.append(f"it became {status}")
    return expect(wrong, now(mine.job), status="queued", fencing_token=1, attempts=0, version=2, lease=None)


def set_desired(rng: random.Random) -> list[str]:
    """Cancel, pause or resume a job that is queued, running or paused."""
    wrong = list[str]()
    running = rng.random() < 0.5
    job = claimed().job if running else queued()
    desired = rng.choice(["cancel", "pause", "run"])
    if desired == "run":
        transitions.set_desired(job.owner, job.job_id, "pause")
    version = now(job).version
    lose(random_loss(rng), lambda: transitions.set_desired(job.owner, job.job_id, desired), wrong)  # type: ignore[arg-type]
    status = "running" if running else {"cancel": "cancelled", "pause": "paused", "run": "queued"}[desired]
    wrong = expect(wrong, now(job), status=status, desired=desired, attempts=0)
    if running or desired == "run":
        # A running job's request may be stored twice, and a resumed job that never ran is validated again.
        return wrong
    return expect(wrong, now(job), version=version + 1)


def trainer_died(rng: random.Random) -> list[str]:
    """A trainer's death is charged once and retried once."""
    wrong, mine = list[str](), claimed()
    lose(random_loss(rng), lambda: mine.trainer_died("killed"), wrong)
    wrong = expect(wrong, now(mine.job), status="retrying", attempts=1, attempts_without_progress=1)
    lose(random_loss(rng), lambda: transitions.requeue(now(mine.job)), wrong)
    return expect(wrong, now(mine.job), status="queued", attempts=1, fencing_token=1)


def lease_lost(rng: random.Random) -> list[str]:
    """The reconciler's move: it counts one platform fault, whatever response it gets."""
    wrong, mine = list[str](), claimed()
    seen = now(mine.job)
    lose(random_loss(rng), lambda: transitions.lose_lease(seen), wrong)
    return expect(
        wrong, now(mine.job), status="retrying", attempts=0, platform_faults=1, fencing_token=1, lease=None
    )


def stale_worker(rng: random.Random) -> list[str]:
    """A worker resumes after another one took over the job: all writes of a lease owner, in any order, are rejected."""
    old = claimed()
    old.heartbeat({})
    transitions.lose_lease(now(old.job))
    transitions.requeue(now(old.job))
    new = transitions.claim(now(old.job), WORKER)
    assert new
    batch = event_log.Batch(1, ('{"t": "log", "n": 1}', '{"t": "log", "n": 2}'))
    event_log.append(new, batch)
    new.heartbeat({"step": 1}, None, 1, 2)
    new.move_pointer(pointer(new, 10))
    files = [{"name": "x", "bytes": 1, "sha256": "0"}]
    late: dict[str, Callable[[], object]] = {
        "an event": lambda: event_log.append(old, event_log.Batch(1, ('{"t": "log", "n": "late"}',))),
        "later events": lambda: event_log.append(old, event_log.Batch(2, ('{"t": "log", "n": "late"}',))),
        "a heartbeat": lambda: old.heartbeat({"step": 99}),
        "a heartbeat with events": lambda: old.heartbeat({"step": 99}, None, 3, 4),
        "a checkpoint": lambda: old.move_pointer(pointer(old, 99)),
        "an earlier checkpoint": lambda: old.pointer_back(None),
        "a success": lambda: old.finish(
            JobStatus.SUCCEEDED, result={"prefix": "x", "files": files, "step": 99}
        ),
        "a failure": lambda: old.finish(JobStatus.FAILED),
        "giving the job back": old.give_back,
        "a trainer's death": lambda: old.trainer_died("killed"),
    }
    order = list(late)
    rng.shuffle(order)
    row, events = now(old.job).to_simple_dict(), event_log.read(old.owner, old.job_id)
    for name in order:
        with suppress(transitions.LostRace):
            late[name]()
        if now(old.job).to_simple_dict() != row or event_log.read(old.owner, old.job_id) != events:
            return [f"{name} of the stale worker was accepted"]
    return []


KINDS: dict[str, Kind] = {
    "submit": submit,
    "set desired": set_desired,
    "claim": claim,
    "heartbeat": heartbeat,
    "pointer": move_pointer,
    "finish": finish,
    "give back": give_back,
    "trainer died": trainer_died,
    "lease lost": lease_lost,
}

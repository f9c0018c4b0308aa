"""Replies that get lost: a write reaches DynamoDB and is applied, and its answer never comes back.

Each kind of conditional write is sent through the product's own code to a real DynamoDB; a chosen answer (or several in
a row, so that the client's own retries are spent too) is thrown away after the write was applied. The caller repeats
the call as the product's callers do. Then the rows must be as if nothing had happened.
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
Answer = TypeVar("Answer")
Kind = Callable[[random.Random], list[str]]


@dataclass
class Loss:
    """The answers to `times` writes are lost, after the first `skip` ones."""

    skip: int = 0
    times: int = 0
    lost: int = 0


@contextmanager
def losing(loss: Loss) -> Iterator[None]:
    real = URLLib3Session.send

    def send(self: URLLib3Session, request: Any) -> Any:
        answer = real(self, request)
        target = request.headers.get("X-Amz-Target", b"")
        target = target if isinstance(target, bytes) else target.encode()
        if not target.endswith(WRITES):
            return answer
        if loss.skip:
            loss.skip -= 1
        elif loss.times:
            loss.times, loss.lost = loss.times - 1, loss.lost + 1
            raise ReadTimeoutError(endpoint_url=request.url)
        return answer

    no_wait = lambda self, context: 0  # noqa: E731
    with (
        patch.object(URLLib3Session, "send", send),
        patch.object(standard.ExponentialBackoff, "delay_amount", no_wait),
    ):
        yield


def again(call: Callable[[], Answer]) -> Answer:
    """The same call until the store answers."""
    while True:
        try:
            return call()
        except PynamoDBException as error:
            if not isinstance(error, PutError | UpdateError | DeleteError):
                raise


def some(rng: random.Random, writes: int = 1) -> Loss:
    """One of the `writes` that a call makes loses its answer, mostly once, sometimes as often as the client tries."""
    return Loss(rng.randrange(writes), rng.choice([1, 1, 2, 3]))


def lose(loss: Loss, call: Callable[[], Answer], wrong: list[str]) -> Answer | None:
    """`again(call)` with answers lost; notes an error instead of raising it."""
    with losing(loss):
        try:
            return again(call)
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")
            return None
        finally:
            if not loss.lost:
                wrong.append("no answer was lost")


def expect(wrong: list[str], row: Any, **fields: Any) -> list[str]:
    return wrong + [
        f"{name} is {getattr(row, name)!r}, not {value!r}"
        for name, value in fields.items()
        if getattr(row, name) != value
    ]


# ---- what a kind begins with -----------------------------------------------------------------------------------------


def request_of(owner: str, status: str = "ready") -> JobRequest:
    dataset = Dataset(owner, tables.new_id("file"), name="rows", status=status, key="datasets/none", bytes=35)
    tables.put_new(dataset)
    return JobRequest(base="starter", dataset_id=dataset.dataset_id, name="rows")


def queued(status: str = "ready") -> Job:
    owner = tables.new_id("user")
    return transitions.submit(owner, request_of(owner, status))


def held() -> Claim:
    claim = transitions.claim(now(queued()), WORKER)
    assert claim
    return claim


def now(job: Job) -> Job:
    found = tables.get(Job, job.owner, job.job_id)
    assert found
    return found


def pointer(claim: Claim, step: int) -> dict[str, Any]:
    key = f"{claim.prefix}checkpoints/s{step}"
    return {"key": key, "step": step, "epoch": claim.fencing_token, "sha256": "0" * 64}


# ---- the kinds -------------------------------------------------------------------------------------------------------


def submit(rng: random.Random) -> list[str]:
    """Five writes: the key, two list rows, the quota, the job. One job comes of it, counted once."""
    owner, wrong = tables.new_id("user"), list[str]()
    request = request_of(owner)
    job = lose(some(rng, 5), lambda: transitions.submit(owner, request, idempotency_key="key"), wrong)
    found = list(tables.rows(Job, owner))
    usage = tables.get(Usage, owner, "jobs")
    listed = [row.job_id for row in queue.index_rows() if row.owner == owner]
    if job is None or [row.job_id for row in found] != [job.job_id] or listed != [job.job_id]:
        return [*wrong, f"{len(found)} jobs, {len(listed)} in the list"]
    if usage is None or set(usage.ids or ()) != {job.job_id}:
        wrong.append("the quota counts something else")
    return expect(wrong, found[0], status="queued", version=0, attempts=0)


def claim(rng: random.Random) -> list[str]:
    wrong, job = list[str](), queued()
    mine = lose(some(rng), lambda: transitions.claim(now(job), WORKER), wrong)
    row = now(job)
    lease_owner = mine.lease_owner if mine else "the one who claimed it"
    return expect(
        wrong, row, status="running", fencing_token=1, lease_owner=lease_owner, version=1, attempts=0
    )


def heartbeat(rng: random.Random) -> list[str]:
    """The chunk, then the heartbeat that shows it. Twice, since a lost answer must not leave the next one behind."""
    wrong, mine = list[str](), held()
    said = []
    for first in (1, 3):
        lines = (f'{{"t": "log", "n": {first}}}', f'{{"t": "log", "n": {first + 1}}}')
        said += [first, first + 1]
        batch = event_log.Batch(first, lines)

        def send(batch: event_log.Batch = batch) -> None:
            event_log.append(mine, batch)
            mine.heartbeat({"step": batch.last_seq}, None, batch.first_seq, batch.last_seq)

        lose(some(rng, 2), send, wrong)
    events = event_log.read(mine.owner, mine.job_id)
    if [event.data.get("n") for event in events] != said or [event.seq for event in events] != said:
        wrong.append(f"events {[(event.seq, event.data.get('n')) for event in events]}")
    if len(list(tables.rows(EventChunk, mine.job_id))) != 2:
        wrong.append("chunks are missing or doubled")
    return expect(wrong, now(mine.job), status="running", fencing_token=1, last_seq=4, attempts=0)


def move_pointer(rng: random.Random) -> list[str]:
    wrong, mine = list[str](), held()
    for step in (10, 20):
        lose(some(rng), lambda step=step: mine.move_pointer(pointer(mine, step)), wrong)  # type: ignore[misc]
    row = now(mine.job)
    if [c["step"] for c in row.checkpoints] != [10, 20]:
        wrong.append(f"checkpoints {[c['step'] for c in row.checkpoints]}")
    key = pointer(mine, 20)["key"]
    return expect(wrong, row, checkpoint_step=20, checkpoint_key=key, status="running", version=3)


def finish(rng: random.Random) -> list[str]:
    """Succeeded, failed, cancelled or paused; and what follows from the end, with answers lost there too."""
    wrong, mine = list[str](), held()
    tables.put_new(WebhookEndpoint(mine.owner, tables.new_id("hook"), url="https://example.com", secret="x"))
    how = rng.choice(["succeeded", "failed", "cancelled", "paused"])
    if how in ("cancelled", "paused"):
        transitions.set_desired(mine.owner, mine.job_id, "cancel" if how == "cancelled" else "pause")
        mine.heartbeat({})
    version = now(mine.job).version
    files = [{"name": "config.json", "bytes": 2, "sha256": "0" * 64}]
    result = {"prefix": f"{mine.prefix}final", "files": files, "step": 3, "metrics": {}}
    lose(some(rng), lambda: mine.finish(how, "", result if how == "succeeded" else None), wrong)  # type: ignore[arg-type]
    row = now(mine.job)
    wrong = expect(wrong, row, status=how, fencing_token=1, attempts=0, version=version + 1, lease=None)
    if how == "paused":
        return wrong
    lose(some(rng, 3), lambda: finalize.after_end(row.owner, row.job_id), wrong)
    again(lambda: finalize.after_end(row.owner, row.job_id))
    models = [model.model_id for model in tables.rows(TunedModel, row.owner)]
    if models != ([row.model_id] if how == "succeeded" else []):
        wrong.append(f"{how}, and {len(models)} models")
    told = [row.delivery_id for row in tables.rows(WebhookDelivery, row.owner)]
    if len(told) != len(set(told)) or not 1 <= len(told) <= 2:
        wrong.append(f"{len(told)} notices")
    usage = tables.get(Usage, row.owner, "jobs")
    if usage and usage.ids:
        wrong.append("the quota still counts it")
    if tables.get(JobIndex, queue.shard(row.job_id), row.job_id):
        wrong.append("it is still in the list")
    return wrong


def give_back(rng: random.Random) -> list[str]:
    wrong, mine = list[str](), held()
    landed = lose(some(rng), mine.give_back, wrong)
    if landed != "queued":
        wrong.append(f"it landed {landed}")
    return expect(wrong, now(mine.job), status="queued", fencing_token=1, attempts=0, version=2, lease=None)


def ask(rng: random.Random) -> list[str]:
    """Cancel, pause or resume, of a job that waits, runs or is paused."""
    wrong = list[str]()
    held_now = rng.random() < 0.5
    job = held().job if held_now else queued()
    wish = rng.choice(["cancel", "pause", "run"])
    if wish == "run":
        transitions.set_desired(job.owner, job.job_id, "pause")
    version = now(job).version
    lose(some(rng), lambda: transitions.set_desired(job.owner, job.job_id, wish), wrong)  # type: ignore[arg-type]
    status = "running" if held_now else {"cancel": "cancelled", "pause": "paused", "run": "queued"}[wish]
    wrong = expect(wrong, now(job), status=status, desired=wish, attempts=0)
    if held_now or wish == "run":
        return (
            wrong  # a wish to a holder may be noted twice, and what never ran is looked at again on its way
        )
    return expect(wrong, now(job), version=version + 1)


def trainer_died(rng: random.Random) -> list[str]:
    """One death is charged once, and tried again once."""
    wrong, mine = list[str](), held()
    lose(some(rng), lambda: mine.trainer_died("killed"), wrong)
    wrong = expect(wrong, now(mine.job), status="retrying", attempts=1, attempts_without_progress=1)
    lose(some(rng), lambda: transitions.requeue(now(mine.job)), wrong)
    return expect(wrong, now(mine.job), status="queued", attempts=1, fencing_token=1)


def lease_lost(rng: random.Random) -> list[str]:
    """The reconciler's move. It charges a platform fault once, whatever reply it gets."""
    wrong, mine = list[str](), held()
    seen = now(mine.job)
    lose(some(rng), lambda: transitions.lose_lease(seen), wrong)
    return expect(
        wrong, now(mine.job), status="retrying", attempts=0, platform_faults=1, fencing_token=1, lease=None
    )


def zombie(rng: random.Random) -> list[str]:
    """A holder wakes up after another took the job over: in whatever order it does all that a holder may, nothing of it
    is accepted."""
    old = held()
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
        "a pointer": lambda: old.move_pointer(pointer(old, 99)),
        "a pointer back": lambda: old.pointer_back(None),
        "a success": lambda: old.finish("succeeded", result={"prefix": "x", "files": files, "step": 99}),
        "a failure": lambda: old.finish("failed"),
        "a give-back": old.give_back,
        "a death": lambda: old.trainer_died("killed"),
    }
    order = list(late)
    rng.shuffle(order)
    row, told = now(old.job).to_simple_dict(), event_log.read(old.owner, old.job_id)
    for what in order:
        with suppress(transitions.LostRace):
            late[what]()
        if now(old.job).to_simple_dict() != row or event_log.read(old.owner, old.job_id) != told:
            return [f"{what} of the old holder was accepted"]
    return []


KINDS: dict[str, Kind] = {
    "submit": submit,
    "ask": ask,
    "claim": claim,
    "heartbeat": heartbeat,
    "pointer": move_pointer,
    "finish": finish,
    "give back": give_back,
    "trainer died": trainer_died,
    "lease lost": lease_lost,
}

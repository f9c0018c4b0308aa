"""The numbered events of a job: stored in chunks, announced on Redis, and followed by any number of watchers.

Events are stored first and announced second. A watcher replays all events after the last number it has, and then follows.
Redis only signals that there are new events, so if a message is lost, the watcher sees them at the next poll. Each process
reads a job from the store only once, no matter how many watchers it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any

import redis.exceptions

from jobs.store import access, redis_client
from jobs.store.lease import Lease, LostRace
from jobs.store.states import JobStatus
from jobs.store.tables import EventChunk, HeartbeatChunk, Job, put_if

log = logging.getLogger(__name__)

MAX_CHUNK_EVENTS = (
    100  # JOBS["chunk_events"] must not be higher, because readers start this many events earlier
)
POLL_S = 2.0  # time between two reads without a notification
TICK_S = 0.4  # each job is read at most twice in this time, no matter how many notifications arrive
KEPT = 5000  # events that a tailer keeps for later watchers
MAX_QUEUED = 64  # ticks that a watcher may lag behind


@dataclass(frozen=True)
class Event:
    """`data` is the trainer's line as JSON (with "t" and "time"); `seq` counts from 1 without gaps."""

    seq: int
    data: dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """Lines that are stored together. A batch is frozen because it may only be sent again unchanged."""

    first_seq: int
    lines: tuple[str, ...]

    @property
    def last_seq(self) -> int:
        return self.first_seq + len(self.lines) - 1


class TooSlow(Exception):
    """The watcher read its events too slowly. It can reconnect with the last number it has."""


# ---- writing ---------------------------------------------------------------------------------------------------------


def append(claim: Lease, batch: Batch) -> None:
    """Writes the chunk unless one with the same or a higher fencing token exists. Readers see it only after the next heartbeat
    has updated `last_seq`. Raises LostRace if a later lease owner has written this chunk."""
    chunk = HeartbeatChunk(
        claim.job_id,
        batch.first_seq,
        last_seq=batch.last_seq,
        fencing_token=claim.fencing_token,
        lease_owner=claim.lease_owner,
        lines=list(batch.lines),
    )
    free = HeartbeatChunk.job_id.does_not_exist() | (HeartbeatChunk.fencing_token < claim.fencing_token)
    if (
        put_if(
            chunk,
            free,
            already_applied=lambda current: (
                current.lease_owner == claim.lease_owner and current.last_seq == batch.last_seq
            ),
        )
        is None
    ):
        raise LostRace(claim.job_id)


def announce(job_id: str, last_seq: int) -> None:
    """Notifies the watchers of a job. Best effort: it never raises and never waits long."""
    with contextlib.suppress(redis.exceptions.RedisError, OSError):
        redis_client.client().publish(f"news:{job_id}", last_seq)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(owner: str, job_id: str, after: int = 0, limit: int | None = None) -> list[Event]:
    """The events after number `after`, without gaps and at most about `limit` (whole chunks are read). If the job has ended,
    the last one is `{"t": "end", "status", "reason", "message", "advice", "model"}`, built from the job's row.
    Raises jobs.store.access.NotFound."""
    # Read before the chunks, so that they are complete up to the job's last_seq.
    job = access.get_job_for(owner, job_id)
    events = _stored(job_id, after, int(job.last_seq), limit)
    whole = (events[-1].seq if events else after) >= job.last_seq
    return [*events, end_of(job)] if job.ended and whole and after <= job.last_seq else events


def end_of(job: Job) -> Event:
    """The last event of an ended job. It is not stored, but built from the job's row."""
    data = {
        "t": "end",
        "time": float(job.ended_at or 0),
        "status": job.status,
        "reason": job.reason,
        "message": job.message,
        "advice": job.advice,
        "model": job.model_id if job.status == JobStatus.SUCCEEDED else None,
    }
    return Event(int(job.last_seq) + 1, data)


def _stored(job_id: str, after: int, upto: int, limit: int | None = None) -> list[Event]:
    events: list[Event] = []
    if after >= upto:
        return events
    # The chunk that holds after + 1 may begin up to a whole chunk earlier.
    span = EventChunk.first_seq.between(max(1, after + 2 - MAX_CHUNK_EVENTS), upto)
    for chunk in EventChunk.query(job_id, span, consistent_read=True):
        for seq, line in enumerate(chunk.lines, int(chunk.first_seq)):
            if max(after, events[-1].seq if events else 0) < seq <= upto:
                events.append(Event(seq, json.loads(line)))
        if limit is not None and len(events) >= limit:
            break
    return events


def backwards(job_id: str, upto: int) -> Iterator[Event]:
    """Yields the stored events from number `upto` down to 1. Reads only as far as the caller iterates."""
    if upto < 1:
        return
    chunks = EventChunk.query(
        job_id, EventChunk.first_seq <= upto, scan_index_forward=False, consistent_read=True, page_size=10
    )
    for chunk in chunks:
        for seq, line in reversed(list(enumerate(chunk.lines, int(chunk.first_seq)))):
            if seq <= upto:
                yield Event(seq, json.loads(line))


# ---- following -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tick:
    """The result of one read: the job's current state and the events that are new to this watcher (none if only the job's
    own fields changed). All watchers get the same dict `shared`, for anything that is rendered only once."""

    job: Job
    events: list[Event]
    shared: dict[str, Any]


async def follow(owner: str, job_id: str, after: int = 0) -> AsyncGenerator[list[Event], None]:
    """Replays the events after number `after`, then follows. Yields lists that are never empty; ends after the event "end".

    Raises jobs.store.access.NotFound (also later, if the job is deleted), and `TooSlow` if the watcher does not keep up.
    Closing the generator releases everything. Callers must check authorization again every 30 s."""
    async with contextlib.aclosing(watch(owner, job_id, after)) as ticks:
        async for tick in ticks:
            if tick.events:
                yield tick.events


async def watch(owner: str, job_id: str, after: int = 0) -> AsyncGenerator[Tick, None]:
    """Like `follow`, but with the job itself: yields a tick at the start and whenever the job or its events change."""
    tailers = _tailers()
    tailer = tailers.get((owner, job_id))
    if tailer is None:
        tailer = tailers[owner, job_id] = _Tailer(owner, job_id, after)
        tailer.task = asyncio.create_task(tailer.run(tailers))
    watcher = _Watcher()
    tailer.watchers.add(watcher)
    try:
        await tailer.started.wait()
        seen = after
        if tailer.tick and seen > tailer.tick.job.last_seq + 1:
            seen = 0  # a number that was never assigned: send everything rather than nothing
        # Events older than those the tailer keeps: this watcher reads them from the store itself.
        while tailer.first - 1 > seen:
            older = await asyncio.to_thread(_stored, job_id, seen, tailer.first - 1, 1000)
            seen = older[-1].seq if older else tailer.first - 1
            yield Tick(await asyncio.to_thread(access.get_job_for, owner, job_id), older, {})
        if tailer.tick is not None:
            known = [e for e in tailer.kept if e.seq > seen]
            # Set before the yield, because what the tailer reads during the yield arrives through the queue.
            seen = max(seen, tailer.head)
            yield Tick(tailer.tick.job, known, {})
        while not (
            tailer.tick
            and tailer.tick.job.ended
            and seen > tailer.tick.job.last_seq
            and watcher.queue.empty()
        ):
            tick = await watcher.next()
            new = [e for e in tick.events if e.seq > seen]
            seen = new[-1].seq if new else seen
            yield Tick(tick.job, new, tick.shared)
    finally:
        tailer.watchers.discard(watcher)
        if not tailer.watchers and tailer.task:
            tailers.pop((owner, job_id), None)
            tailer.task.cancel()


@dataclass(eq=False)
class _Watcher:
    queue: asyncio.Queue[Tick | Exception] = field(default_factory=lambda: asyncio.Queue(MAX_QUEUED))
    slow: bool = False

    def put(self, item: Tick | Exception) -> None:
        if self.queue.full():
            self.slow = True  # raised by the watcher's next call of `next`
        else:
            self.queue.put_nowait(item)

    async def next(self) -> Tick:
        if self.slow:
            raise TooSlow
        item = await self.queue.get()
        if isinstance(item, Exception):
            raise item
        return item


@dataclass(eq=False)
class _Tailer:
    """Reads one job on behalf of all of its watchers in this process, as long as there are any."""

    owner: str
    job_id: str
    head: int  # number of the last event it has
    watchers: set[_Watcher] = field(default_factory=set)
    kept: deque[Event] = field(default_factory=lambda: deque(maxlen=KEPT))
    tick: Tick | None = None
    notified: asyncio.Event = field(default_factory=asyncio.Event)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def first(self) -> int:
        """The number of the oldest event it keeps, or of the next event if it keeps none."""
        return self.kept[0].seq if self.kept else self.head + 1

    async def run(self, tailers: dict[tuple[str, str], _Tailer]) -> None:
        try:
            await _listen()
            while not await self._poll():
                # All notifications during this pause lead to a single read. One that arrives later leads to a read at once.
                await asyncio.sleep(TICK_S)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.notified.wait(), POLL_S)
                self.notified.clear()
        # The job was deleted, or there is a bug: in either case, no watcher may wait forever.
        except Exception as error:
            for watcher in self.watchers:
                watcher.put(error)
        finally:
            self.started.set()
            if tailers.get((self.owner, self.job_id)) is self:
                del tailers[self.owner, self.job_id]

    async def _poll(self) -> bool:
        """Reads the store once. Returns True once the job has ended and all of its events are delivered."""
        try:
            job = await asyncio.to_thread(access.get_job_for, self.owner, self.job_id)
            if self.tick is None:
                self.head = min(self.head, int(job.last_seq))
            events = await asyncio.to_thread(_stored, self.job_id, self.head, int(job.last_seq), 2000)
        except access.NotFound:
            raise
        except Exception:  # the store is unreachable: watchers wait, and get everything once it is back
            log.warning("events of %s: the store cannot be read", self.job_id, exc_info=True)
            return False
        head = events[-1].seq if events else self.head
        whole = head >= job.last_seq
        if job.ended and whole:
            events.append(end_of(job))
        moved = events or self.tick is None or job.version != self.tick.job.version
        if moved:
            self.head = events[-1].seq if events else self.head
            self.kept.extend(events)
            self.tick = Tick(job, events, {})
            if self.started.is_set():
                for watcher in self.watchers:
                    watcher.put(self.tick)
        self.started.set()
        if not whole:
            self.notified.set()
        return bool(job.ended and whole)


# ---- one listener for each process (and event loop: tests have several) ----------------------------------------------


@dataclass(eq=False)
class _Hub:
    loop: asyncio.AbstractEventLoop
    tailers: dict[tuple[str, str], _Tailer] = field(default_factory=dict)
    listener: asyncio.Task[None] | None = None


_hub: _Hub | None = None


def _this_hub() -> _Hub:
    global _hub
    loop = asyncio.get_running_loop()
    if _hub is None or _hub.loop is not loop:
        _hub = _Hub(loop)
    return _hub


def _tailers() -> dict[tuple[str, str], _Tailer]:
    return _this_hub().tailers


async def _listen() -> None:
    """Ensures that this process is subscribed. Waits until the subscription is active, but at most 1 s."""
    hub = _this_hub()
    if hub.listener is None or hub.listener.done():
        subscribed = asyncio.Event()
        hub.listener = asyncio.create_task(_receive(hub, subscribed))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(subscribed.wait(), 1)


async def _receive(hub: _Hub, subscribed: asyncio.Event) -> None:
    """Wakes the tailer of each job for which a notification arrives, as long as there are watchers."""
    while hub.tailers:
        client = redis_client.own_client(socket_timeout=20)
        try:
            async with client.pubsub(ignore_subscribe_messages=True) as pubsub:
                await pubsub.psubscribe("news:*")
                subscribed.set()
                while hub.tailers:
                    message = await pubsub.get_message(timeout=5)
                    if message:
                        job_id = message["channel"].removeprefix("news:")
                        for (_, watched), tailer in hub.tailers.items():
                            if watched == job_id:
                                tailer.notified.set()
        except (redis.exceptions.RedisError, OSError):
            await asyncio.sleep(1)  # watchers poll meanwhile
        finally:
            with contextlib.suppress(redis.exceptions.RedisError, OSError):
                await client.aclose()

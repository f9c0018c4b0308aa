"""The numbered events of a job: stored without gaps, replayed, followed, and read once for all watchers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading

import pytest

from jobs.events import event_log
from jobs.events.event_log import Batch
from jobs.lifecycle import transitions
from jobs.lifecycle.transitions import LostRace
from jobs.store import access, tables
from tests.jobs.makers import WORKER, make_claim, make_owner, read, result

pytestmark = pytest.mark.usefixtures("stores")
TIMEOUT_S = 120  # long enough for a busy machine


def log(claim, *messages, first=None):
    first = first or int(claim.job.last_seq) + 1
    batch = Batch(first, tuple(json.dumps({"t": "log", "message": message}) for message in messages))
    event_log.append(claim, batch)
    claim.heartbeat({}, {}, batch.first_seq, batch.last_seq)
    event_log.announce(claim.job_id, batch.last_seq)


def messages(events):
    return [event.data.get("message") for event in events if event.data["t"] == "log"]


async def collect(owner, job_id, after=0):
    return [event async for events in event_log.follow(owner, job_id, after) for event in events]


def test_events_are_numbered_from_one_and_the_end_is_the_last():
    claim = make_claim()
    log(claim, "one", "two")
    log(claim, "three")
    assert [e.seq for e in event_log.read(claim.owner, claim.job_id)] == [1, 2, 3]
    claim.finish("succeeded", result=result(claim))
    events = event_log.read(claim.owner, claim.job_id, after=2)
    assert [(e.seq, e.data["t"]) for e in events] == [(3, "log"), (4, "end")]
    assert events[-1].data["status"] == "succeeded"


def test_readers_do_not_see_a_chunk_before_the_job_row_includes_it():
    claim = make_claim()
    event_log.append(claim, Batch(1, ('{"t": "log", "message": "early"}',)))
    assert event_log.read(claim.owner, claim.job_id) == []


def test_a_batch_sent_twice_is_stored_once():
    claim = make_claim()
    batch = Batch(1, ('{"t": "log", "message": "once"}',))
    event_log.append(claim, batch)
    event_log.append(claim, batch)
    claim.heartbeat({}, {}, 1, 1)
    claim.heartbeat({}, {}, 1, 1)  # the reply to the heartbeat was lost, too
    assert messages(event_log.read(claim.owner, claim.job_id)) == ["once"]


def test_a_stale_worker_can_neither_overwrite_nor_publish_events():
    stale = make_claim()
    log(stale, "before")
    transitions.requeue(transitions.lose_lease(read(stale.job)))
    current = transitions.claim(read(stale.job), WORKER)
    log(current, "mine")
    with pytest.raises(LostRace):
        event_log.append(stale, Batch(2, ('{"t": "log", "message": "stale"}',)))
    with pytest.raises(LostRace):
        stale.heartbeat({}, {}, 2, 2)
    assert messages(event_log.read(current.owner, current.job_id)) == ["before", "mine"]


def test_the_next_lease_owner_replaces_unpublished_events():
    first = make_claim()
    event_log.append(first, Batch(1, ('{"t": "log", "message": "unseen"}',) * 3))
    first.give_back()
    second = transitions.claim(read(first.job), WORKER)
    log(second, "seen")
    assert messages(event_log.read(second.owner, second.job_id)) == ["seen"]


def test_reading_can_start_in_the_middle_of_a_chunk():
    claim = make_claim()
    log(claim, *(f"{n}" for n in range(1, 101)))
    log(claim, *(f"{n}" for n in range(101, 151)))
    for after in (0, 1, 99, 100, 101, 149, 150):
        assert messages(event_log.read(claim.owner, claim.job_id, after)) == [
            str(n) for n in range(after + 1, 151)
        ]


def test_backwards_returns_the_newest_first_up_to_a_number():
    claim = make_claim()
    log(claim, "1", "2", "3")
    log(claim, "4")
    assert messages(event_log.backwards(claim.job_id, 3)) == ["3", "2", "1"]


def test_another_users_events_are_not_found():
    claim = make_claim()
    with pytest.raises(access.NotFound):
        event_log.read(make_owner(), claim.job_id)


async def test_a_follower_of_an_ended_job_gets_everything_and_stops():
    claim = make_claim()
    log(claim, "one", "two")
    claim.finish("failed", "not_finite")
    events = await asyncio.wait_for(collect(claim.owner, claim.job_id), TIMEOUT_S)
    assert [event.seq for event in events] == [1, 2, 3]
    assert [e.seq for e in await asyncio.wait_for(collect(claim.owner, claim.job_id, 3), TIMEOUT_S)] == []


async def test_an_event_number_in_the_future_replays_all_events():
    claim = make_claim()
    log(claim, "one")
    claim.finish("failed", "not_finite")
    assert [e.seq for e in await asyncio.wait_for(collect(claim.owner, claim.job_id, 2**62), TIMEOUT_S)] == [
        1,
        2,
    ]


async def test_two_hundred_watchers_share_one_reader_and_need_no_threads(monkeypatch):
    monkeypatch.setattr(event_log, "POLL_S", 100 * TIMEOUT_S)  # events arrive by pub/sub alone
    claim = make_claim()
    log(claim, "zero")
    watchers = [asyncio.create_task(collect(claim.owner, claim.job_id, n % 2)) for n in range(200)]

    async def wait_until_all_have(head: int) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                tailer = event_log._tailers().get((claim.owner, claim.job_id))
                if tailer and len(tailer.watchers) == 200 and tailer.head >= head:
                    return
                await asyncio.sleep(0.05)

    await wait_until_all_have(1)
    threads = threading.active_count()
    with tables.count_calls() as counter:
        for n in range(3):
            await asyncio.to_thread(log, claim, f"{n}")
            await wait_until_all_have(2 + n)
        assert threading.active_count() <= threads + 2
    assert tables.reads(counter) <= 20
    await asyncio.to_thread(claim.finish, "failed", "not_finite")
    received = await asyncio.wait_for(asyncio.gather(*watchers), TIMEOUT_S)
    assert {tuple(event.seq for event in events) for events in received} == {(1, 2, 3, 4, 5), (2, 3, 4, 5)}


async def test_a_late_watcher_gets_all_events(monkeypatch):
    monkeypatch.setattr(event_log, "KEPT", 3)
    claim = make_claim()
    log(claim, *(str(n) for n in range(1, 11)))
    early = asyncio.create_task(collect(claim.owner, claim.job_id, 8))
    await asyncio.sleep(1)
    late = asyncio.create_task(collect(claim.owner, claim.job_id, 2))
    await asyncio.to_thread(log, claim, "11")
    await asyncio.to_thread(claim.finish, "failed", "not_finite")
    assert [e.seq for e in await asyncio.wait_for(early, TIMEOUT_S)] == list(range(9, 13))
    assert [e.seq for e in await asyncio.wait_for(late, TIMEOUT_S)] == list(range(3, 13))


async def test_events_that_arrive_during_the_replay_are_not_skipped():
    """While a slow watcher gets the events from before it connected, more events are written."""
    claim = make_claim()
    log(claim, "1", "2")
    other = asyncio.create_task(collect(claim.owner, claim.job_id))
    await asyncio.sleep(1)
    follower = event_log.follow(claim.owner, claim.job_id)
    assert [e.seq for e in await anext(follower)] == [1, 2]  # the replay begins …
    await asyncio.to_thread(log, claim, "3")
    tailer = event_log._tailers()[claim.owner, claim.job_id]
    while tailer.head < 3:  # noqa: ASYNC110  there is no event to wait for
        await asyncio.sleep(0.05)
    await asyncio.to_thread(claim.finish, "failed", "not_finite")
    later = [e.seq async for events in follower for e in events]  # … and ends here
    assert later == [3, 4]
    assert [e.seq for e in await asyncio.wait_for(other, TIMEOUT_S)] == [1, 2, 3, 4]


async def test_events_arrive_by_pubsub_without_polling(monkeypatch):
    monkeypatch.setattr(event_log, "POLL_S", 100 * TIMEOUT_S)
    claim = make_claim()
    follower = event_log.follow(claim.owner, claim.job_id)
    first = asyncio.create_task(anext(follower))
    await asyncio.sleep(1.5)
    await asyncio.to_thread(log, claim, "new")
    assert messages(await asyncio.wait_for(first, TIMEOUT_S)) == ["new"]
    await follower.aclose()


async def test_a_lost_pubsub_message_delays_events_until_the_next_poll(monkeypatch):
    monkeypatch.setattr(event_log, "announce", lambda *_: None)
    claim = make_claim()
    follower = event_log.follow(claim.owner, claim.job_id)
    first = asyncio.create_task(anext(follower))
    await asyncio.sleep(0.5)
    await asyncio.to_thread(log, claim, "unannounced")
    assert messages(await asyncio.wait_for(first, TIMEOUT_S)) == ["unannounced"]
    await follower.aclose()


async def test_a_watcher_that_does_not_read_is_dropped():
    claim = make_claim()
    ticks = event_log.watch(claim.owner, claim.job_id)
    await anext(ticks)
    tailer = event_log._tailers()[claim.owner, claim.job_id]
    for _ in range(event_log.MAX_QUEUED + 1):
        for watcher in tailer.watchers:
            watcher.put(tailer.tick)
    with pytest.raises(event_log.TooSlow):
        await anext(ticks)


async def test_closing_a_stream_frees_its_tailer():
    claim = make_claim()
    follower = event_log.watch(claim.owner, claim.job_id)
    await anext(follower)
    assert event_log._tailers()
    await follower.aclose()
    async with asyncio.timeout(TIMEOUT_S):
        while (claim.owner, claim.job_id) in event_log._tailers():  # noqa: ASYNC110  there is no event to wait for
            await asyncio.sleep(0.05)


async def test_deleting_a_job_ends_its_stream():
    claim = make_claim()
    follower = event_log.watch(claim.owner, claim.job_id)
    await anext(follower)
    await asyncio.to_thread(claim.finish, "failed", "not_finite")
    with contextlib.suppress(StopAsyncIteration):
        while True:
            await asyncio.wait_for(anext(follower), TIMEOUT_S)
    await asyncio.to_thread(transitions.delete, claim.owner, claim.job_id)
    with pytest.raises(access.NotFound):
        await anext(event_log.watch(claim.owner, claim.job_id))

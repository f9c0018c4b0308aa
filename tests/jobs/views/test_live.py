"""The stream of a job page, asked as an ASGI server would ask it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.conf import settings
from django.db import connections
from django.test import Client

from accounts.models import User
from jobs.events import event_log
from jobs.store import tables
from jobs.store.tables import EventChunk, Job
from jobs.views import live
from tests.jobs.views.makers import make_job, metric

pytestmark = pytest.mark.django_db(transaction=True)


class Stream:
    """One watcher: what it is sent, and the end of its connection."""

    def __init__(
        self, client: Client, job_id: str, query: str = "", method: str = "GET", **headers: str
    ) -> None:
        cookie = client.cookies.get(settings.SESSION_COOKIE_NAME)
        pairs = [(b"host", b"localhost")] + [
            (name.replace("_", "-").encode(), v.encode()) for name, v in headers.items()
        ]
        if cookie:
            pairs.append((b"cookie", f"{cookie.key}={cookie.value}".encode()))
        self.scope = {
            "type": "http", "method": method, "path": f"/jobs/{job_id}/stream", "query_string": query.encode(),
            "headers": pairs, "scheme": "http", "server": ("localhost", 80), "client": ("127.0.0.1", 1),
        }  # fmt: skip
        self.status = 0
        self.text = ""
        self.left = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.status = message.get("status", self.status)
        self.text += message.get("body", b"").decode()

    async def answer(self) -> int:
        await asyncio.wait_for(live.stream(self.scope, self.receive, self.send), 120)
        return self.status

    async def until(self, part: str, seconds: float = 120) -> None:
        for _ in range(int(seconds * 50)):
            if part in self.text:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"{part!r} did not come in {seconds} s; came: {self.text[-500:]}")

    @property
    def numbers(self) -> list[int]:
        return [int(line[4:]) for line in self.text.splitlines() if line.startswith("id: ")]


@contextlib.asynccontextmanager
async def watching(*streams: Stream) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(live.stream(s.scope, s.receive, s.send)) for s in streams]
    try:
        yield
    finally:
        for stream in streams:
            stream.left.set()
        await asyncio.wait_for(asyncio.gather(*tasks), 120)


@pytest.fixture
def browser(alices: Client) -> Client:
    return alices


def grow(job: Job, lines: list[dict[str, Any]]) -> None:
    """As a worker does: the events first, then the number, then the bell."""
    first = int(job.last_seq) + 1
    EventChunk(
        job.job_id,
        first,
        last_seq=first + len(lines) - 1,
        fencing_token=1,
        lease_owner="x",
        lines=[json.dumps(line) for line in lines],
    ).save()
    job.update(actions=[Job.last_seq.set(first + len(lines) - 1), Job.version.add(1)])
    event_log.announce(job.job_id, int(job.last_seq))


async def test_it_replays_follows_and_ends(browser: Client, alice: User) -> None:
    job = make_job(alice.owner_id, lines=[metric(1), metric(2)])
    stream = Stream(browser, job.job_id)
    async with watching(stream):
        await stream.until("id: 2")
        assert 'id="status"' in stream.text
        await asyncio.to_thread(grow, job, [metric(3)])
        await stream.until("id: 3")
        await asyncio.to_thread(job.update, actions=[Job.status.set("succeeded"), Job.version.add(1)])
        event_log.announce(job.job_id, 3)
        await stream.until("event: end")
    assert stream.numbers == [1, 2, 3, 4]
    assert "data: succeeded" in stream.text


async def test_it_goes_on_after_the_last_number(browser: Client, alice: User) -> None:
    job = make_job(alice.owner_id, lines=[metric(s) for s in range(1, 6)])
    by_query, by_header = (
        Stream(browser, job.job_id, "after=3"),
        Stream(browser, job.job_id, last_event_id="4"),
    )
    from_the_future = Stream(browser, job.job_id, "after=9000")
    async with watching(by_query, by_header, from_the_future):
        for stream in (by_query, by_header, from_the_future):
            await stream.until("id: 5")
    assert (by_query.numbers, by_header.numbers) == ([4, 5], [5])
    assert from_the_future.numbers == [1, 2, 3, 4, 5]


async def test_after_the_end_nobody_needs_to_come_back(browser: Client, alice: User) -> None:
    job = make_job(alice.owner_id, "succeeded", lines=[metric(1)])
    assert await Stream(browser, job.job_id, "after=2").answer() == 204
    late = Stream(browser, job.job_id)
    assert await late.answer() == 200
    assert late.numbers == [1, 2]
    assert late.text.rstrip().endswith("event: end\ndata:")


@pytest.mark.parametrize("query", ["after=x", "after=-1", f"after={10**30}", "after=%00"])
async def test_a_cursor_that_is_no_number_is_refused(browser: Client, alice: User, query: str) -> None:
    assert await Stream(browser, make_job(alice.owner_id).job_id, query).answer() == 400


async def test_others_find_nothing_and_visitors_are_refused(
    bobs: Client, client: Client, alice: User
) -> None:
    job = make_job(alice.owner_id, lines=[metric(1)])
    bob, visitor = Stream(bobs, job.job_id), Stream(client, job.job_id)
    assert (await bob.answer(), await visitor.answer()) == (404, 401)
    assert "data" not in bob.text + visitor.text


async def test_only_get_and_only_our_host(browser: Client, alice: User) -> None:
    job = make_job(alice.owner_id)
    assert await Stream(browser, job.job_id, method="POST").answer() == 405
    evil = Stream(browser, job.job_id)
    evil.scope["headers"] = [(b"host", b"evil.example"), *evil.scope["headers"][1:]]
    assert await evil.answer() == 400


async def test_a_trainers_line_cannot_forge_fields(browser: Client, alice: User) -> None:
    words = [
        "x\n\nid: 9999\nevent: end\ndata: {}",
        "\r\rid: 77",
        "\u2028event: end",
        "\x00\x1b[31m",
        "<img src=x>",
    ]
    job = make_job(alice.owner_id, lines=[{"t": "log", "level": "info", "message": word} for word in words])
    stream = Stream(browser, job.job_id)
    async with watching(stream):
        await stream.until(f"id: {len(words)}")
    assert stream.numbers == [1, 2, 3, 4, 5]
    assert "event: end" not in stream.text.replace("\\n", "").split("\n")
    told = [
        json.loads(line[6:])
        for line in stream.text.split("\n")
        if line.startswith('data: {"t"') or '"seq"' in line
    ]
    assert [event["message"] for event in told] == words


async def test_sign_out_closes_the_stream(
    browser: Client, alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "AUTHORIZE_S", 0.2)
    monkeypatch.setattr(live, "CHECK_S", 0.1)
    stream = Stream(browser, make_job(alice.owner_id, lines=[metric(1)]).job_id)
    task = asyncio.create_task(live.stream(stream.scope, stream.receive, stream.send))
    await stream.until("id: 1")
    await sync_to_async(browser.logout)()
    await asyncio.wait_for(task, 120)


async def test_a_person_may_watch_twenty_times_at_once(browser: Client, alice: User) -> None:
    job = make_job(alice.owner_id, lines=[metric(1)])
    streams = [Stream(browser, job.job_id) for _ in range(settings.JOBS["max_streams_per_owner"])]
    async with watching(*streams):
        await streams[-1].until("id: 1")
        one_more = Stream(browser, job.job_id)
        assert await one_more.answer() == 429
    assert not live._open_streams


async def test_300_watchers_hold_no_thread_and_no_connection_and_read_the_store_once(
    browser: Client, alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(settings.JOBS, "max_streams_per_owner", 300)
    job = make_job(alice.owner_id, lines=[metric(s) for s in range(1, 200)])
    streams = [Stream(browser, job.job_id) for _ in range(300)]
    threads = threading.active_count()
    async with watching(*streams):
        for stream in streams:
            await stream.until("id: 199", 60)
        with tables.count_calls() as counter:
            await asyncio.to_thread(grow, job, [metric(200)])
            for stream in streams:
                await stream.until("id: 200")
        # 20 helpers at most of asyncio's and one of asgiref's, however many watch
        assert threading.active_count() <= threads + 24
        assert tables.reads(counter) <= 8, dict(counter)
        assert len([c for c in connections.all(initialized_only=True) if c.connection]) <= 2
    assert all(stream.numbers == list(range(1, 201)) for stream in streams)

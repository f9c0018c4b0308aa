"""The event stream of a job page, called as an ASGI server calls it."""

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
    """One client of the stream: what it received, and when it disconnects."""

    def __init__(
        self, client: Client, job_id: str, query: str = "", method: str = "GET", **headers: str
    ) -> None:
        cookie = client.cookies.get(settings.SESSION_COOKIE_NAME)
        pairs = [(b"host", b"localhost")] + [
            (name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()
        ]
        if cookie:
            pairs.append((b"cookie", f"{cookie.key}={cookie.value}".encode()))
        self.scope = {
            "type": "http", "method": method, "path": f"/jobs/{job_id}/stream", "query_string": query.encode(),
            "headers": pairs, "scheme": "http", "server": ("localhost", 80), "client": ("127.0.0.1", 1),
        }  # fmt: skip
        self.status = 0
        self.text = ""
        self.disconnected = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    async def receive(self) -> dict[str, Any]:
        await self.disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.status = message.get("status", self.status)
        self.text += message.get("body", b"").decode()

    async def response_status(self) -> int:
        await asyncio.wait_for(live.stream(self.scope, self.receive, self.send), 120)
        return self.status

    async def wait_for(self, text: str, seconds: float = 120) -> None:
        for _ in range(int(seconds * 50)):
            if text in self.text:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"{text!r} did not arrive in {seconds} s; received: {self.text[-500:]}")

    @property
    def event_ids(self) -> list[int]:
        return [int(line[4:]) for line in self.text.splitlines() if line.startswith("id: ")]


@contextlib.asynccontextmanager
async def watching(*streams: Stream) -> AsyncIterator[None]:
    tasks = [
        asyncio.create_task(live.stream(stream.scope, stream.receive, stream.send)) for stream in streams
    ]
    try:
        yield
    finally:
        for stream in streams:
            stream.disconnected.set()
        await asyncio.wait_for(asyncio.gather(*tasks), 120)


def append_events(job: Job, lines: list[dict[str, Any]]) -> None:
    """As a worker does: first the events, then their number, then the notification."""
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


async def test_a_stream_replays_follows_and_ends(alices: Client, alice: User) -> None:
    job = make_job(alice.owner_id, lines=[metric(1), metric(2)])
    stream = Stream(alices, job.job_id)
    async with watching(stream):
        await stream.wait_for("id: 2")
        assert 'id="status"' in stream.text
        await asyncio.to_thread(append_events, job, [metric(3)])
        await stream.wait_for("id: 3")
        await asyncio.to_thread(job.update, actions=[Job.status.set("succeeded"), Job.version.add(1)])
        event_log.announce(job.job_id, 3)
        await stream.wait_for("event: end")
    assert stream.event_ids == [1, 2, 3, 4]
    assert "data: succeeded" in stream.text


async def test_a_stream_resumes_after_the_last_event_id(alices: Client, alice: User) -> None:
    job = make_job(alice.owner_id, lines=[metric(step) for step in range(1, 6)])
    by_query, by_header = (
        Stream(alices, job.job_id, "after=3"),
        Stream(alices, job.job_id, last_event_id="4"),
    )
    beyond_the_end = Stream(alices, job.job_id, "after=9000")
    async with watching(by_query, by_header, beyond_the_end):
        for stream in (by_query, by_header, beyond_the_end):
            await stream.wait_for("id: 5")
    assert (by_query.event_ids, by_header.event_ids) == ([4, 5], [5])
    assert beyond_the_end.event_ids == [1, 2, 3, 4, 5]


async def test_the_browser_need_not_reconnect_after_the_end(alices: Client, alice: User) -> None:
    job = make_job(alice.owner_id, "succeeded", lines=[metric(1)])
    assert await Stream(alices, job.job_id, "after=2").response_status() == 204
    late = Stream(alices, job.job_id)
    assert await late.response_status() == 200
    assert late.event_ids == [1, 2]
    assert late.text.rstrip().endswith("event: end\ndata:")


@pytest.mark.parametrize("query", ["after=x", "after=-1", f"after={10**30}", "after=%00"])
async def test_an_invalid_cursor_is_rejected(alices: Client, alice: User, query: str) -> None:
    assert await Stream(alices, make_job(alice.owner_id).job_id, query).response_status() == 400


async def test_bob_gets_404_and_anonymous_visitors_get_401(bobs: Client, client: Client, alice: User) -> None:
    job = make_job(alice.owner_id, lines=[metric(1)])
    bob, visitor = Stream(bobs, job.job_id), Stream(client, job.job_id)
    assert (await bob.response_status(), await visitor.response_status()) == (404, 401)
    assert "data" not in bob.text + visitor.text


async def test_only_get_requests_to_an_allowed_host_are_served(alices: Client, alice: User) -> None:
    job = make_job(alice.owner_id)
    assert await Stream(alices, job.job_id, method="POST").response_status() == 405
    other_host = Stream(alices, job.job_id)
    other_host.scope["headers"] = [(b"host", b"evil.example"), *other_host.scope["headers"][1:]]
    assert await other_host.response_status() == 400


async def test_log_messages_cannot_forge_event_stream_fields(alices: Client, alice: User) -> None:
    messages = [
        "x\n\nid: 9999\nevent: end\ndata: {}",
        "\r\rid: 77",
        "\u2028event: end",
        "\x00\x1b[31m",
        "<img src=x>",
    ]
    job = make_job(
        alice.owner_id, lines=[{"t": "log", "level": "info", "message": message} for message in messages]
    )
    stream = Stream(alices, job.job_id)
    async with watching(stream):
        await stream.wait_for(f"id: {len(messages)}")
    assert stream.event_ids == [1, 2, 3, 4, 5]
    assert "event: end" not in stream.text.replace("\\n", "").split("\n")
    events = [
        json.loads(line[6:])
        for line in stream.text.split("\n")
        if line.startswith('data: {"t"') or '"seq"' in line
    ]
    assert [event["message"] for event in events] == messages


async def test_sign_out_closes_the_stream(
    alices: Client, alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "AUTHORIZE_S", 0.2)
    monkeypatch.setattr(live, "CHECK_S", 0.1)
    stream = Stream(alices, make_job(alice.owner_id, lines=[metric(1)]).job_id)
    task = asyncio.create_task(live.stream(stream.scope, stream.receive, stream.send))
    await stream.wait_for("id: 1")
    await sync_to_async(alices.logout)()
    await asyncio.wait_for(task, 120)


async def test_open_streams_are_limited_per_user(alices: Client, alice: User) -> None:
    job = make_job(alice.owner_id, lines=[metric(1)])
    streams = [Stream(alices, job.job_id) for _ in range(settings.JOBS["max_streams_per_owner"])]
    async with watching(*streams):
        await streams[-1].wait_for("id: 1")
        extra = Stream(alices, job.job_id)
        assert await extra.response_status() == 429
    assert not live._open_streams


async def test_300_streams_share_threads_connections_and_reads(
    alices: Client, alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(settings.JOBS, "max_streams_per_owner", 300)
    job = make_job(alice.owner_id, lines=[metric(step) for step in range(1, 200)])
    streams = [Stream(alices, job.job_id) for _ in range(300)]
    threads = threading.active_count()
    async with watching(*streams):
        for stream in streams:
            await stream.wait_for("id: 199", 60)
        with tables.count_calls() as counter:
            await asyncio.to_thread(append_events, job, [metric(200)])
            for stream in streams:
                await stream.wait_for("id: 200")
        # At most 20 threads of asyncio and one of asgiref, however many streams are open.
        assert threading.active_count() <= threads + 24
        assert tables.reads(counter) <= 8, dict(counter)
        assert sum(bool(each.connection) for each in connections.all(initialized_only=True)) <= 2
    assert all(stream.event_ids == list(range(1, 201)) for stream in streams)

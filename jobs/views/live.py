"""The live job page: server-sent events at `/jobs/<id>/stream`, and the polling fallback `/jobs/<id>/live`.

`stream` is a plain ASGI application, because a single sync middleware on its path would cost a thread and an SQL
connection per client. The session is checked at the start and every 30 s. Each job is read once per process and rendered
once per version, no matter how many clients watch it.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from asgiref.sync import sync_to_async
from django.conf import settings
from django.contrib.auth import get_user
from django.contrib.auth.decorators import login_required
from django.core.exceptions import DisallowedHost
from django.core.handlers.asgi import ASGIRequest
from django.db import DatabaseError, close_old_connections
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.template.loader import render_to_string
from django.views.decorators.http import require_safe

from jobs.events import event_log
from jobs.events.history import log_line
from jobs.forms import whole_number
from jobs.store import access
from jobs.store.tables import Job
from jobs.views import presenters

PING_S = 15.0
AUTHORIZE_S = 30.0
CHECK_S = 5.0  # how often an idle stream checks its timers
SEND_S = 30.0  # a client that reads nothing for this long is disconnected
PATH = re.compile(r"^/jobs/([A-Za-z0-9-]{1,64})/stream$")

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_open_streams: Counter[str] = Counter()  # by owner


# ---- the stream ----------------------------------------------------------------------------------------------------


async def stream(scope: Scope, receive: Receive, send: Send) -> None:
    """The ASGI application for every path that `PATH` matches."""
    match = PATH.match(scope["path"])
    assert match, "asgi.py routes only matching paths here"
    if scope["method"] != "GET":
        return await _respond(send, 405, [(b"allow", b"GET")])
    try:
        request = ASGIRequest(scope, io.BytesIO())
        request.get_host()
        after = _cursor(request)
    except (DisallowedHost, ValueError):
        return await _respond(send, 400)
    try:
        owner = await _owner(request)
    except DatabaseError:
        return await _respond(send, 503, [(b"retry-after", b"5")])
    if owner is None:
        return await _respond(send, 401)
    if _open_streams[owner] >= settings.JOBS["max_streams_per_owner"]:
        return await _respond(send, 429, [(b"retry-after", b"5")])
    _open_streams[owner] += 1
    try:
        async with contextlib.aclosing(event_log.watch(owner, match[1], after)) as ticks:
            first = await anext(ticks, None)
            if first is None or (first.job.ended and not first.events):
                # Everything has been sent; 204 tells EventSource not to reconnect.
                return await _respond(send, 204)
            return await _Stream(owner, request, send).run(first, ticks, receive)
    except access.NotFound:
        return await _respond(send, 404)
    finally:
        _open_streams[owner] -= 1
        if not _open_streams[owner]:
            del _open_streams[owner]


def _cursor(request: HttpRequest) -> int:
    raw = request.headers.get("Last-Event-ID") or request.GET.get("after") or "0"
    number = whole_number(raw, 10**19)
    if number is None:
        raise ValueError(raw)
    return number


@dataclass
class _Stream:
    """One open stream."""

    owner: str
    request: HttpRequest
    send: Send
    version: float = -1  # of the job when last sent
    status: str = ""
    written: float = 0.0

    async def run(
        self, first: event_log.Tick, ticks: AsyncGenerator[event_log.Tick, None], receive: Receive
    ) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
            (b"x-content-type-options", b"nosniff"),
        ]
        await self.send({"type": "http.response.start", "status": 200, "headers": headers})
        disconnected = asyncio.ensure_future(_wait_for_disconnect(receive))
        try:
            await self._send(first)
            await self._follow(ticks, disconnected)
            if not disconnected.done():
                await self._write("", last=True)
        except (access.NotFound, event_log.TooSlow):
            await self._write("", last=True)  # the page reconnects with its last number, or gets a 404
        except TimeoutError:
            pass  # the client stopped reading; the server closes the connection
        finally:
            disconnected.cancel()

    async def _follow(
        self, ticks: AsyncGenerator[event_log.Tick, None], disconnected: asyncio.Future[None]
    ) -> None:
        authorized = time.monotonic()
        next_tick: asyncio.Future[Any] = asyncio.ensure_future(anext(ticks, None))
        try:
            while True:
                await asyncio.wait(
                    {next_tick, disconnected}, timeout=CHECK_S, return_when=asyncio.FIRST_COMPLETED
                )
                now = time.monotonic()
                if disconnected.done():
                    return None
                if now - authorized >= AUTHORIZE_S:
                    if await _owner(self.request) != self.owner:
                        return None
                    authorized = now
                if next_tick.done():
                    tick = next_tick.result()
                    if tick is None:
                        return await self._write(_field("end", ""))
                    await self._send(tick)
                    next_tick = asyncio.ensure_future(anext(ticks, None))
                elif now - self.written >= PING_S:
                    await self._write(": ping\n\n")
        finally:
            next_tick.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await next_tick

    async def _send(self, tick: event_log.Tick) -> None:
        """Sends the events and, if the job has changed, its rendered status."""
        text = "".join(frame(tick.job.job_id, event) for event in tick.events)
        if tick.job.version != self.version:
            self.version = tick.job.version
            text += _status_field(tick.job)
        if tick.job.status != self.status:
            self.status = tick.job.status
            text += _field("moved", self.status)
        if text:
            await self._write(text)

    async def _write(self, text: str, *, last: bool = False) -> None:
        self.written = time.monotonic()
        message = {"type": "http.response.body", "body": text.encode(), "more_body": not last}
        async with asyncio.timeout(SEND_S):  # unlike wait_for, creates no task per write
            await self.send(message)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _respond(send: Send, status: int, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    always = [(b"cache-control", b"no-store"), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": status, "headers": always + (headers or [])})
    await send({"type": "http.response.body", "body": b""})


async def _owner(request: HttpRequest) -> str | None:
    """The owner of the session; None once it has ended."""
    return await sync_to_async(owner_of_session)(request)


def owner_of_session(request: HttpRequest) -> str | None:
    close_old_connections()
    key = request.COOKIES.get(settings.SESSION_COOKIE_NAME)
    if not key:
        return None
    request.session = import_module(settings.SESSION_ENGINE).SessionStore(key)
    user = get_user(request)
    return user.owner_id if user.is_authenticated else None


# ---- rendered once, shared by all clients ------------------------------------------------------------------------------


@dataclass
class _Cache:
    """Rendered texts; the oldest are evicted."""

    max_size: int
    texts: OrderedDict[tuple[str, int], str] = field(default_factory=OrderedDict)

    def get(self, key: tuple[str, int], make: Callable[[], str]) -> str:
        text = self.texts.get(key)
        if text is None:
            text = self.texts[key] = make()
            if len(self.texts) > self.max_size:
                self.texts.popitem(last=False)
        return text


_frames = _Cache(5000)  # by job and event number
_statuses = _Cache(500)  # by job and its version


def frame(job_id: str, event: event_log.Event) -> str:
    """An event in the stream's text format."""

    def make() -> str:
        return f"id: {event.seq}\n" + _field("event", json.dumps(payload(event), allow_nan=False))

    return _frames.get((job_id, event.seq), make)


def _status_field(job: Job) -> str:
    return _statuses.get((job.job_id, int(job.version)), lambda: _field("status", status_html(job)))


def payload(event: event_log.Event) -> dict[str, Any]:
    """The event, its number, and its log line."""
    line = log_line(event.seq, event.data)
    log = {"line": {"at": line.at, "level": line.level, "text": line.text}} if line else {}
    return {**event.data, "seq": event.seq, **log}


def status_html(job: Job) -> str:
    """The partials that change with every heartbeat. They contain no form, so one rendering serves every client."""
    context = {"job": job, "state": presenters.job_view(job)}
    return "".join(render_to_string(f"jobs/job_detail.html#{part}", context) for part in ("state", "status"))


def _field(event: str, data: str) -> str:
    lines = "".join(f"data: {line}\n" for line in data.splitlines() or [""])
    return f"event: {event}\n{lines}\n"


# ---- polling, where streams are blocked -----------------------------------------------------------------------------------------


@login_required
@require_safe
def poll(request: HttpRequest, job_id: str) -> HttpResponse:
    """The events after `after`, as JSON."""
    try:
        after = _cursor(request)
    except ValueError:
        return HttpResponse(status=400)
    owner = request.user.owner_id
    try:
        job = access.get_job_for(owner, job_id)
        events = event_log.read(owner, job_id, after, limit=500)
    except access.NotFound as error:
        raise Http404 from error
    state = presenters.job_view(job)
    last = events[-1].seq if events else after
    return JsonResponse(
        {
            "events": [payload(event) for event in events],
            "html": status_html(job),
            "status": job.status,
            "ended": state.ended and last >= job.last_seq,
        },
        headers={"Cache-Control": "no-store"},
    )

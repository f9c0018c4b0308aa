"""The live job page: `/jobs/<id>/stream`, server-sent events, and its fall-back, polling `/jobs/<id>/live`.

`stream` is a plain ASGI application, since one sync middleware on a stream's path would cost a thread and an SQL
connection a watcher. Who watches is asked at the start and every 30 s again. A job is read once per
process and rendered once per version, however many watch.
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
AUTHORISE_S = 30.0
LOOK_S = 5.0  # how long a quiet stream sleeps between looks at its clocks
SEND_S = 30.0  # a reader that takes nothing for so long is dropped
PATH = re.compile(r"^/jobs/([A-Za-z0-9-]{1,64})/stream$")

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_open: Counter[str] = Counter()  # streams by owner


# ---- the stream ----------------------------------------------------------------------------------------------------


async def stream(scope: Scope, receive: Receive, send: Send) -> None:
    """The ASGI application for every path that `PATH` matches."""
    match = PATH.match(scope["path"])
    assert match, "asgi.py sends only matching paths here"
    if scope["method"] != "GET":
        return await _answer(send, 405, [(b"allow", b"GET")])
    try:
        request = ASGIRequest(scope, io.BytesIO())
        request.get_host()
        after = _cursor(request)
    except (DisallowedHost, ValueError):
        return await _answer(send, 400)
    try:
        owner = await _owner(request)
    except DatabaseError:
        return await _answer(send, 503, [(b"retry-after", b"5")])
    if owner is None:
        return await _answer(send, 401)
    if _open[owner] >= settings.JOBS["max_streams_per_owner"]:
        return await _answer(send, 429, [(b"retry-after", b"5")])
    _open[owner] += 1
    try:
        async with contextlib.aclosing(event_log.watch(owner, match[1], after)) as ticks:
            first = await anext(ticks, None)
            if first is None or (first.job.ended and not first.events):
                return await _answer(send, 204)  # all is told; tells EventSource not to come back
            return await _Watch(owner, request, send).run(first, ticks, receive)
    except access.NotFound:
        return await _answer(send, 404)
    finally:
        _open[owner] -= 1
        if not _open[owner]:
            del _open[owner]


def _cursor(request: HttpRequest) -> int:
    raw = request.headers.get("Last-Event-ID") or request.GET.get("after") or "0"
    number = whole_number(raw, 10**19)
    if number is None:
        raise ValueError(raw)
    return number


@dataclass
class _Watch:
    """One open stream."""

    owner: str
    request: HttpRequest
    send: Send
    version: float = -1  # of the job as last shown
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
        left = asyncio.ensure_future(_gone(receive))
        try:
            await self._show(first)
            await self._follow(ticks, left)
            if not left.done():
                await self._write("", last=True)
        except (access.NotFound, event_log.TooSlow):
            await self._write("", last=True)  # the page comes back with its number, or finds a 404
        except TimeoutError:
            pass  # it takes nothing any more: the server closes the connection
        finally:
            left.cancel()

    async def _follow(self, ticks: AsyncGenerator[event_log.Tick, None], left: asyncio.Future[None]) -> None:
        authorised = time.monotonic()
        coming: asyncio.Future[Any] = asyncio.ensure_future(anext(ticks, None))
        try:
            while True:
                await asyncio.wait({coming, left}, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                now = time.monotonic()
                if left.done():
                    return None
                if now - authorised >= AUTHORISE_S:
                    if await _owner(self.request) != self.owner:
                        return None
                    authorised = now
                if coming.done():
                    tick = coming.result()
                    if tick is None:
                        return await self._write(_field("end", ""))
                    await self._show(tick)
                    coming = asyncio.ensure_future(anext(ticks, None))
                elif now - self.written >= PING_S:
                    await self._write(": ping\n\n")
        finally:
            coming.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await coming

    async def _show(self, tick: event_log.Tick) -> None:
        """Sends the events and, where the job has changed since, how it looks now."""
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
        async with asyncio.timeout(SEND_S):  # no task for each write, as wait_for makes one
            await self.send(message)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer(send: Send, status: int, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    always = [(b"cache-control", b"no-store"), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": status, "headers": always + (headers or [])})
    await send({"type": "http.response.body", "body": b""})


async def _owner(request: HttpRequest) -> str | None:
    """Whose session this is now; None once it is over."""
    return await sync_to_async(owner_of_session)(request)


def owner_of_session(request: HttpRequest) -> str | None:
    close_old_connections()
    key = request.COOKIES.get(settings.SESSION_COOKIE_NAME)
    if not key:
        return None
    request.session = import_module(settings.SESSION_ENGINE).SessionStore(key)
    user = get_user(request)
    return user.owner_id if user.is_authenticated else None


# ---- what every watcher of a job shares ------------------------------------------------------------------------------


@dataclass
class _Made:
    """Texts made once for all watchers, the newest kept."""

    most: int
    texts: OrderedDict[tuple[str, int], str] = field(default_factory=OrderedDict)

    def get(self, key: tuple[str, int], make: Callable[[], str]) -> str:
        text = self.texts.get(key)
        if text is None:
            text = self.texts[key] = make()
            if len(self.texts) > self.most:
                self.texts.popitem(last=False)
        return text


_frames = _Made(5000)  # by job and number of the event
_statuses = _Made(500)  # by job and its version


def frame(job_id: str, event: event_log.Event) -> str:
    """An event as text of the stream."""

    def make() -> str:
        return f"id: {event.seq}\n" + _field("event", json.dumps(told(event), allow_nan=False))

    return _frames.get((job_id, event.seq), make)


def _status_field(job: Job) -> str:
    return _statuses.get((job.job_id, int(job.version)), lambda: _field("status", status_html(job)))


def told(event: event_log.Event) -> dict[str, Any]:
    """The event, its number, and the line of the log that it is to a person."""
    line = log_line(event.seq, event.data)
    words = {"line": {"at": line.at, "level": line.level, "text": line.text}} if line else {}
    return {**event.data, "seq": event.seq, **words}


def status_html(job: Job) -> str:
    """The parts of the page that change with every heartbeat. They hold no form, so one rendering serves everybody."""
    context = {"job": job, "state": presenters.state(job)}
    return "".join(render_to_string(f"jobs/job_detail.html#{part}", context) for part in ("state", "status"))


def _field(event: str, data: str) -> str:
    lines = "".join(f"data: {line}\n" for line in data.splitlines() or [""])
    return f"event: {event}\n{lines}\n"


# ---- where streams are cut off -----------------------------------------------------------------------------------------


@login_required
@require_safe
def poll(request: HttpRequest, job_id: str) -> HttpResponse:
    """The news after `after`, as JSON."""
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
    state = presenters.state(job)
    last = events[-1].seq if events else after
    return JsonResponse(
        {
            "events": [told(event) for event in events],
            "html": status_html(job),
            "status": job.status,
            "ended": state.ended and last >= job.last_seq,
        },
        headers={"Cache-Control": "no-store"},
    )

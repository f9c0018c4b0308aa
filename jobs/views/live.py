"""The live job page: `/jobs/<id>/stream`, server-sent events, and its fall-back, polling `/jobs/<id>/live`.

`stream` is a plain ASGI application, since one sync middleware on a stream's path would cost a thread and an SQL
connection a watcher. Who watches is asked at the start and every 30 s again. What a job looks like is read and
rendered once per job and second in this process, however many watch.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from asgiref.sync import sync_to_async
from django.conf import settings
from django.contrib.auth import get_user
from django.contrib.auth.decorators import login_required
from django.core.exceptions import DisallowedHost
from django.core.handlers.asgi import ASGIRequest
from django.db import close_old_connections
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.template.loader import render_to_string
from django.views.decorators.http import require_safe

from jobs import access, feed
from jobs.story import log_line
from jobs.views import showing

PING_S = 15.0
AUTHORISE_S = 30.0
LOOK_S = 5.0  # moves that no event tells of (pause asked, place in the queue) are seen by then
FRESH_S = 1.0
SEND_S = 30.0  # a reader that takes nothing for so long is dropped
STREAMS_PER_USER = 20
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
    job_id = match[1]
    if scope["method"] != "GET":
        return await _answer(send, 405, [(b"allow", b"GET")])
    try:
        request = ASGIRequest(scope, io.BytesIO())
        request.get_host()
        after = _cursor(request)
    except (DisallowedHost, ValueError):
        return await _answer(send, 400)
    owner = await _owner(request)
    if owner is None:
        return await _answer(send, 401)
    if _open[owner] >= STREAMS_PER_USER:
        return await _answer(send, 429, [(b"retry-after", b"5")])
    try:
        look = await looks.at(owner, job_id)
    except access.NotFound:
        return await _answer(send, 404)
    if after > look.last_seq + 1:
        after = 0  # a cursor from another life: tell everything
    if look.ended and after > look.last_seq:
        return await _answer(send, 204)  # tells EventSource not to come back
    _open[owner] += 1
    try:
        await _Watch(owner, job_id, after, request, send).run(receive)
    finally:
        _open[owner] -= 1
        if not _open[owner]:
            del _open[owner]
    return None


def _cursor(request: HttpRequest) -> int:
    raw = request.headers.get("Last-Event-ID") or request.GET.get("after") or "0"
    if not raw.isascii() or not raw.isdigit() or len(raw) > 19:
        raise ValueError(raw)
    return int(raw)


@dataclass
class _Watch:
    """One open stream."""

    owner: str
    job_id: str
    after: int
    request: HttpRequest
    send: Send
    shown: int = -1  # version of the job last sent
    status: str = ""

    async def run(self, receive: Receive) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
            (b"x-content-type-options", b"nosniff"),
        ]
        await self.send({"type": "http.response.start", "status": 200, "headers": headers})
        left = asyncio.ensure_future(_gone(receive))
        events = feed.follow(self.owner, self.job_id, self.after)
        try:
            await self._follow(events, left)
        except (access.NotFound, feed.TooSlow, TimeoutError):
            pass  # deleted, or too slow: the page comes back with its cursor, or finds a 404
        finally:
            left.cancel()
            await events.aclose()  # type: ignore[attr-defined]  # follow is an async generator
        if not left.done() or left.cancelled():
            with contextlib.suppress(TimeoutError):
                await self._write("", last=True)

    async def _follow(self, events: Any, left: asyncio.Future[None]) -> None:
        await self._look(": hello\n\n")
        authorised = pinged = looked = time.monotonic()
        coming = asyncio.ensure_future(anext(events, None))
        try:
            while True:
                done, _ = await asyncio.wait(
                    {coming, left}, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED
                )
                now = time.monotonic()
                if left in done:
                    return
                if now - authorised >= AUTHORISE_S:
                    if await _owner(self.request) != self.owner:
                        return
                    authorised = now
                if coming in done:
                    batch = coming.result()
                    if batch is None:
                        await self._look("", end=True)
                        return
                    await self._look("".join(frame(self.job_id, event) for event in batch))
                    pinged = looked = now
                    coming = asyncio.ensure_future(anext(events, None))
                elif now - looked >= LOOK_S:
                    sent = await self._look("")
                    looked = now
                    if sent:
                        pinged = now
                    elif now - pinged >= PING_S:
                        await self._write(": ping\n\n")
                        pinged = now
        finally:
            coming.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await coming

    async def _look(self, text: str, *, end: bool = False) -> bool:
        """Sends the events and, where the job has changed since, how it looks now."""
        look = await looks.at(self.owner, self.job_id, fresh=end)
        if look.version != self.shown:
            text += _field("status", look.html)
            self.shown = look.version
        if look.status != self.status:
            text += _field("moved", look.status)
            self.status = look.status
        if end:
            text += _field("end", "")
        if text:
            await self._write(text)
        return bool(text)

    async def _write(self, text: str, *, last: bool = False) -> None:
        message = {"type": "http.response.body", "body": text.encode(), "more_body": not last}
        await asyncio.wait_for(self.send(message), SEND_S)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer(send: Send, status: int, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    always = [(b"cache-control", b"no-store"), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": status, "headers": always + (headers or [])})
    await send({"type": "http.response.body", "body": b""})


async def _owner(request: HttpRequest) -> str | None:
    """Whose session this is now; None once it is over."""
    return await sync_to_async(_owner_of_session)(request)


def _owner_of_session(request: HttpRequest) -> str | None:
    close_old_connections()
    key = request.COOKIES.get(settings.SESSION_COOKIE_NAME)
    if not key:
        return None
    request.session = import_module(settings.SESSION_ENGINE).SessionStore(key)
    user = get_user(request)
    return user.owner_id if user.is_authenticated else None  # type: ignore[union-attr]  # ours, not AbstractBaseUser


# ---- what every watcher of a job shares ------------------------------------------------------------------------------


@dataclass
class Look:
    """How a job stands, and the part of its page that shows it."""

    version: int
    status: str
    last_seq: int
    ended: bool
    html: str
    at: float


@dataclass
class Looks:
    """The newest look of each watched job, made at most once a second."""

    newest: OrderedDict[tuple[str, str], Look] = field(default_factory=OrderedDict)
    making: dict[tuple[str, str], asyncio.Lock] = field(default_factory=dict)

    async def at(self, owner: str, job_id: str, *, fresh: bool = False) -> Look:
        key = (owner, job_id)
        asked = time.monotonic()
        lock = self.making.setdefault(key, asyncio.Lock())
        async with lock:
            look = self.newest.get(key)
            # Even a fresh one may be another watcher's, if it was read after we asked.
            if look is None or look.at < (asked if fresh else asked - FRESH_S):
                look = await asyncio.to_thread(self._make, owner, job_id, look)
                self.newest[key] = look
        self.newest.move_to_end(key)
        while len(self.newest) > 500:
            self.making.pop(self.newest.popitem(last=False)[0], None)
        return look

    def _make(self, owner: str, job_id: str, old: Look | None) -> Look:
        at = time.monotonic()
        job = access.get_job_for(owner, job_id)
        state = showing.state(job)
        html = old.html if old and old.version == job.version and state.ended else status_html(job)
        return Look(job.version, job.status, job.last_seq, state.ended, html, at)


looks = Looks()
_frames: OrderedDict[tuple[str, int], str] = OrderedDict()


def frame(job_id: str, event: feed.Event) -> str:
    """An event as text of the stream; made once for all watchers."""
    key = (job_id, event.seq)
    text = _frames.get(key)
    if text is None:
        text = f"id: {event.seq}\n" + _field("event", json.dumps(told(event), allow_nan=False))
        _frames[key] = text
        while len(_frames) > 5000:
            _frames.popitem(last=False)
    return text


def told(event: feed.Event) -> dict[str, Any]:
    """The event, its number, and the line of the log that it is to a person."""
    line = log_line(event.seq, event.data)
    words = {"line": {"at": line.at, "level": line.level, "text": line.text}} if line else {}
    return {**event.data, "seq": event.seq, **words}


def status_html(job: Any) -> str:
    """The parts of the page that change with every heartbeat. They hold no form, so one rendering serves everybody."""
    context = {"job": job, "state": showing.state(job)}
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
    owner = request.user.owner_id  # type: ignore[union-attr]  # ours, not AbstractBaseUser
    try:
        job = access.get_job_for(owner, job_id)
        events = feed.read(owner, job_id, after, limit=500)
    except access.NotFound as error:
        raise Http404 from error
    state = showing.state(job)
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

"""The outermost door: no request's body grows beyond what its address takes.

Django writes a body to disk in full before any view runs, and the server sets no limit of its own, so it is done here:
a declared length is refused before a byte is read, an undeclared one when it has grown too long. Files are taken only
from people we know, a few at a time from each: a stranger's is refused unread.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from django.conf import settings
from django.core.handlers.asgi import ASGIRequest
from django.db import DatabaseError, connections

from llmtuner.api_shell import is_call_without_prefix, unknown_url_error

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MAX_BODY = 4 * 1024 * 1024
MAX_PART = 64 * 1024 * 1024  # of a file that comes in parts
PAGE_PART = 5 * 1024 * 1024  # of one that comes in parts from a page, as it is: jobs.datasets.multipart.PART
FORM_EXTRA = 64 * 1024  # what the form around a file may weigh
_coming: Counter[str] = Counter()  # large bodies on their way, by owner


def limit_of(path: str, kind: str) -> int:
    """A file's worth only where files are taken, and then as a form or a part."""
    path = path.rstrip("/")
    if path.startswith("/datasets/uploads/") and "/parts/" in path:
        return PAGE_PART
    if not kind.startswith("multipart/form-data"):
        return MAX_BODY
    if path in {"/v1/files", "/datasets/upload"}:
        return int(settings.JOBS["max_upload_bytes"]) + FORM_EXTRA
    if path.startswith("/v1/uploads/") and path.endswith("/parts"):
        return MAX_PART + FORM_EXTRA
    return MAX_BODY


def limit_body(app: App) -> App:
    async def guarded(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        headers = dict(scope["headers"])
        if (
            b"transfer-encoding" in headers and b"content-length" in headers
        ):  # a proxy may believe the other one
            message = "A body has a length or comes in chunks, not both."
            return await _answer(send, 400, message, "invalid_body")
        limit = limit_of(scope["path"], headers.get(b"content-type", b"").decode("latin-1").lower())
        length = headers.get(b"content-length", b"0" if b"transfer-encoding" not in headers else b"")
        declared = int(length[:20]) if length.isdigit() else None  # Python reads no number of 4,300 digits
        if declared is not None and declared > limit:
            if not scope["path"].startswith("/v1/") and is_call_without_prefix(scope["path"]):
                error = unknown_url_error(scope["method"], scope["path"])
                return await _answer(send, 404, error.message, "unknown_url")
            return await _refuse(send, limit)
        if limit <= MAX_BODY or (declared is not None and declared <= MAX_BODY):
            return await _counted(app, limit, scope, receive, send)
        owner = await asyncio.to_thread(_owner_of, scope)
        if owner is None:
            return await _answer(send, 401, "Incorrect API key or token provided.", "invalid_api_key")
        if _coming[owner] >= settings.JOBS["max_uploads_per_owner"]:
            message = (
                "You are sending as many files at once as one person may. Try again when one is through."
            )
            return await _answer(send, 429, message, "rate_limit_exceeded")
        _coming[owner] += 1
        coming = True

        def leave() -> None:
            nonlocal coming
            if coming:
                coming = False
                _coming[owner] -= 1

        async def answered(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                leave()  # before the sender knows, who may have the next part at hand
            await send(message)

        try:
            return await _counted(app, limit, scope, receive, answered)
        finally:
            leave()

    return guarded


async def _counted(app: App, limit: int, scope: Message, receive: Receive, send: Send) -> None:
    """The app, as long as the body keeps within the limit."""
    taken, refused = 0, False

    async def counted() -> Message:
        nonlocal taken, refused
        message = await receive()
        taken += len(message.get("body", b""))
        if taken <= limit:
            return message
        if not refused:
            refused = True
            await _refuse(send, limit)
        return {"type": "http.disconnect"}

    async def sent(message: Message) -> None:
        if not refused:
            await send(message)

    await app(scope, counted, sent)


def _owner_of(scope: Message) -> str | None:
    """Who sends this, if we know them; what they may do is asked by the view."""
    from accounts.auth import TwoCredentials, authenticate  # late: these need the settings
    from jobs.views.live import owner_of_session

    request = ASGIRequest(scope, io.BytesIO())
    try:
        if scope["path"].startswith("/v1/"):
            caller = authenticate(request)
            return caller.owner if caller else None
        return owner_of_session(request)
    except TwoCredentials:
        return None
    except DatabaseError:
        return ""  # the view will say that the store is away
    finally:
        connections.close_all()


async def _refuse(send: Send, limit: int) -> None:
    message = f"The request's body is too large. The limit here is {limit:,} bytes."
    await _answer(send, 413, message, "request_too_large")


async def _answer(send: Send, status: int, message: str, code: str) -> None:
    kind = "rate_limit_error" if status == 429 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    headers = [
        (b"content-type", b"application/json"),
        (b"retry-after", b"5") if status == 429 else (b"x-should-retry", b"false"),
        (b"cache-control", b"no-store"),
        (b"connection", b"close"),  # the rest of the body is not worth reading
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})

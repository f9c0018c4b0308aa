"""ASGI middleware that limits the size of request bodies, by path.

Django writes the whole body to disk before any view runs, and the server has no limit. This middleware refuses a declared
length that is too large before a byte is read, and a body without a declared length as soon as it is too large. Files are
accepted only from known users, a few at a time from each; an unknown sender's file is refused before it is read.
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
MAX_PART = 64 * 1024 * 1024  # one part of a multipart upload by the API
PAGE_PART = 5 * 1024 * 1024  # one part sent by a page as a raw body; see jobs.datasets.multipart.PART
FORM_EXTRA = 64 * 1024  # for the form around a file
_receiving: Counter[str] = Counter()  # large bodies being received, by owner


def limit_of(path: str, content_type: str) -> int:
    """The limit for this request. A large body is allowed only where files are accepted, as a form or as a part."""
    path = path.rstrip("/")
    if path.startswith("/datasets/uploads/") and "/parts/" in path:
        return PAGE_PART
    if not content_type.startswith("multipart/form-data"):
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
        if b"transfer-encoding" in headers and b"content-length" in headers:  # a proxy may use the other one
            message = "Send either Content-Length or Transfer-Encoding, not both."
            return await _answer(send, 400, message, "invalid_body")
        limit = limit_of(scope["path"], headers.get(b"content-type", b"").decode("latin-1").lower())
        length = headers.get(b"content-length", b"0" if b"transfer-encoding" not in headers else b"")
        # Python refuses to parse a number with 4,300 digits.
        declared = int(length[:20]) if length.isdigit() else None
        if declared is not None and declared > limit:
            if not scope["path"].startswith("/v1/") and is_call_without_prefix(scope["path"]):
                error = unknown_url_error(scope["method"], scope["path"])
                return await _answer(send, 404, error.message, "unknown_url")
            return await _refuse(send, limit)
        if limit <= MAX_BODY or (declared is not None and declared <= MAX_BODY):
            return await _limited(app, limit, scope, receive, send)
        owner = await asyncio.to_thread(_owner_of, scope)
        if owner is None:
            return await _answer(send, 401, "Incorrect API key or token provided.", "invalid_api_key")
        if _receiving[owner] >= settings.JOBS["max_uploads_per_owner"]:
            message = "You are uploading too many files at once. Try again when one of them has finished."
            return await _answer(send, 429, message, "rate_limit_exceeded")
        _receiving[owner] += 1
        counted = True

        def release() -> None:
            nonlocal counted
            if counted:
                counted = False
                _receiving[owner] -= 1

        async def releasing_send(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                release()  # freed before the client sees the response, because it may send the next part at once
            await send(message)

        try:
            return await _limited(app, limit, scope, receive, releasing_send)
        finally:
            release()

    return guarded


async def _limited(app: App, limit: int, scope: Message, receive: Receive, send: Send) -> None:
    """Runs the app while the body stays within the limit."""
    received, refused = 0, False

    async def limited_receive() -> Message:
        nonlocal received, refused
        message = await receive()
        received += len(message.get("body", b""))
        if received <= limit:
            return message
        if not refused:
            refused = True
            await _refuse(send, limit)
        return {"type": "http.disconnect"}

    async def guarded_send(message: Message) -> None:
        if not refused:
            await send(message)

    await app(scope, limited_receive, guarded_send)


def _owner_of(scope: Message) -> str | None:
    """The sender, if known. The view checks what they may do."""
    from accounts.auth import TwoCredentials, authenticate  # late: needs the settings
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
        return ""  # the view will report that the store is unreachable
    finally:
        connections.close_all()


async def _refuse(send: Send, limit: int) -> None:
    message = f"The request body is too large. The limit here is {limit:,} bytes."
    await _answer(send, 413, message, "request_too_large")


async def _answer(send: Send, status: int, message: str, code: str) -> None:
    kind = "rate_limit_error" if status == 429 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    headers = [
        (b"content-type", b"application/json"),
        (b"retry-after", b"5") if status == 429 else (b"x-should-retry", b"false"),
        (b"cache-control", b"no-store"),
        (b"connection", b"close"),  # the rest of the body is not read
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})

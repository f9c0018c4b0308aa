"""The outermost door: no request's body grows beyond what its address takes.

Django writes a body to disk in full before any view runs, and the server sets no limit of its own, so it is done here:
a declared length is refused before a byte is read, an undeclared one when it has grown too long.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from django.conf import settings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MAX_BODY = 4 * 1024 * 1024
FORM_EXTRA = 64 * 1024  # what the form around a file may weigh


def limit_of(path: str, kind: str) -> int:
    """A file's worth only where files are taken, and only as a form."""
    path = path.rstrip("/")
    takes_files = path in {"/v1/files", "/datasets/upload"} or (
        path.startswith("/v1/uploads/") and path.endswith("/parts")
    )
    if takes_files and kind.startswith("multipart/form-data"):
        return int(settings.JOBS["max_upload_bytes"]) + FORM_EXTRA
    return MAX_BODY


def bounded(app: App) -> App:
    async def guarded(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        headers = dict(scope["headers"])
        limit = limit_of(scope["path"], headers.get(b"content-type", b"").decode("latin-1").lower())
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            return await _refuse(send, limit)
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

        return await app(scope, counted, sent)

    return guarded


async def _refuse(send: Send, limit: int) -> None:
    message = f"The request's body is too large. The limit here is {limit:,} bytes."
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": "request_too_large"}
    headers = [
        (b"content-type", b"application/json"),
        (b"x-should-retry", b"false"),
        (b"cache-control", b"no-store"),
        (b"connection", b"close"),  # the rest of the body is not worth reading
    ]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})

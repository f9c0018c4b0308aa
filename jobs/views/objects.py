"""Downloads from local storage through signed links that expire. With S3, links point to S3 itself.

Files are sent block by block from an async iterator. Under ASGI, a FileResponse would hold the whole file in memory.
"""

from __future__ import annotations

import mimetypes
import re
from collections.abc import AsyncIterator
from typing import IO
from urllib.parse import quote

from asgiref.sync import sync_to_async
from django.http import (
    HttpRequest,
    HttpResponse,
    HttpResponseBase,
    HttpResponseNotFound,
    StreamingHttpResponse,
)

from jobs.store import blobs

BLOCK = 256 * 1024


async def download(request: HttpRequest, token: str, filename: str) -> HttpResponseBase:
    """`/objects/<token>/<filename>`; supports one byte range, so that browsers can resume a download."""
    link = blobs.read_link(token)
    if link is None:
        return HttpResponse(
            "This link has expired. Reload the page it was on to get a new one.\n", status=403
        )
    key, name = link
    size = await sync_to_async(blobs.size_of)(key)
    if size is None:
        return HttpResponseNotFound("Not found.\n")
    span = byte_range(request.headers.get("Range", ""), size)
    if span is None:
        return HttpResponse(status=416, headers={"Content-Range": f"bytes */{size}"})
    start, end = span
    file = await sync_to_async(blobs.open_file)(key, start)
    response = StreamingHttpResponse(
        _blocks(file, end - start), status=200 if (start, end) == (0, size) else 206
    )
    response["Content-Length"] = str(end - start)
    response["Accept-Ranges"] = "bytes"
    if response.status_code == 206:
        response["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    # User uploads are only ever downloaded, never rendered by the browser.
    kind = mimetypes.guess_type(name)[0] if name.endswith((".json", ".zip", ".csv")) else None
    response["Content-Type"] = kind or "application/octet-stream"
    response["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(name, safe='')}"
    response["X-Content-Type-Options"] = "nosniff"
    response["Cache-Control"] = "private, no-store"
    return response


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """(start, end) of the bytes to send: all of them if the header is missing or unsupported, and None if the range cannot be
    satisfied."""
    match = re.fullmatch(r"bytes=(\d{0,19})-(\d{0,19})", header.strip())
    if not match or match[0] == "bytes=-":
        return 0, size
    first, last = match.groups()
    if not first:
        return (max(size - int(last), 0), size) if int(last) and size else None
    start, end = int(first), min(int(last) + 1, size) if last else size
    return (start, end) if start < end else None


async def _blocks(file: IO[bytes], left: int) -> AsyncIterator[bytes]:
    """Yields the file in blocks. A thread is used only during each read."""
    read = sync_to_async(file.read, thread_sensitive=False)
    try:
        while left > 0 and (block := await read(min(BLOCK, left))):
            left -= len(block)
            yield block
    finally:
        file.close()

"""Downloads from local storage by signed links that expire. On S3 the links are S3's own and never come here.

Sent block by block from an async iterator: a FileResponse under ASGI would hold the whole file in memory.
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
    """`/objects/<token>/<filename>`; answers one byte range, as browsers ask to go on after a break."""
    told = blobs.read_link(token)
    if told is None:
        return HttpResponse(
            "This link has expired. Ask for a new one on the page it came from.\n", status=403
        )
    key, name = told
    size = await sync_to_async(blobs.size_of)(key)
    if size is None:
        return HttpResponseNotFound("There is no such object.\n")
    wanted = byte_range(request.headers.get("Range", ""), size)
    if wanted is None:
        return HttpResponse(status=416, headers={"Content-Range": f"bytes */{size}"})
    start, end = wanted
    file = await sync_to_async(blobs.open_file)(key, start)
    response = StreamingHttpResponse(
        _blocks(file, end - start), status=200 if (start, end) == (0, size) else 206
    )
    response["Content-Length"] = str(end - start)
    response["Accept-Ranges"] = "bytes"
    if response.status_code == 206:
        response["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    # What people uploaded is only ever saved, never shown.
    kind = mimetypes.guess_type(name)[0] if name.endswith((".json", ".zip", ".csv")) else None
    response["Content-Type"] = kind or "application/octet-stream"
    response["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(name, safe='')}"
    response["X-Content-Type-Options"] = "nosniff"
    response["Cache-Control"] = "private, no-store"
    return response


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """(start, end) of the bytes to send; everything where the header asks for nothing we know; None if there is no such
    part."""
    found = re.fullmatch(r"bytes=(\d{0,19})-(\d{0,19})", header.strip())
    if not found or found[0] == "bytes=-":
        return 0, size
    first, last = found.groups()
    if not first:
        return (max(size - int(last), 0), size) if int(last) and size else None
    start, end = int(first), min(int(last) + 1, size) if last else size
    return (start, end) if start < end else None


async def _blocks(file: IO[bytes], left: int) -> AsyncIterator[bytes]:
    """A thread is borrowed for each read only."""
    read = sync_to_async(file.read, thread_sensitive=False)
    try:
        while left > 0 and (block := await read(min(BLOCK, left))):
            left -= len(block)
            yield block
    finally:
        file.close()

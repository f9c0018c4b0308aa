"""What uvicorn runs: Django, and before it the live stream, which holds no thread and no SQL connection."""

from __future__ import annotations

import io
import os
from typing import IO, Any

import django
from django.core.handlers.asgi import ASGIHandler

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "llmtuner.settings")
os.umask(0o077)  # what the web process writes holds people's data: for its own account only

django.setup(set_prefix=False)

from jobs.views import live  # noqa: E402  needs the settings that were loaded above
from llmtuner import checks  # noqa: E402  likewise
from llmtuner.body_limit import limit_body  # noqa: E402  likewise

checks.refuse_unsafe_start()


class Handler(ASGIHandler):
    def create_request(self, scope: dict[str, Any], body_file: IO[bytes]) -> Any:
        """Django takes a form without Content-Length for empty, but the length of one that came in chunks is known
        by now: the body has been read in full, within the limit of `body_limit`."""
        request, refusal = super().create_request(scope, body_file)
        if request is not None and "HTTP_TRANSFER_ENCODING" in request.META:
            request.META["CONTENT_LENGTH"] = str(body_file.seek(0, io.SEEK_END))
            body_file.seek(0)
        return request, refusal


pages = Handler()


async def route(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http" and live.PATH.match(scope["path"]):
        await live.stream(scope, receive, send)
    else:
        await pages(scope, receive, send)


application = limit_body(route)

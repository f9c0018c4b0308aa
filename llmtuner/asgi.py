"""The ASGI application: Django, and in front of it the live stream, which holds no thread and no SQL connection."""

from __future__ import annotations

import io
import os
from typing import IO, Any

import django
from django.core.handlers.asgi import ASGIHandler

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "llmtuner.settings")
os.umask(0o077)  # the web process writes users' data: no other account may read it

django.setup(set_prefix=False)

from jobs.views import live  # noqa: E402  needs the settings loaded above
from llmtuner import checks  # noqa: E402  likewise
from llmtuner.body_limit import limit_body  # noqa: E402  likewise

checks.refuse_unsafe_start()


class Handler(ASGIHandler):
    def create_request(self, scope: dict[str, Any], body_file: IO[bytes]) -> Any:
        """Sets the length of a chunked body, because Django treats a form without Content-Length as empty. It is known by now:
        the body has been read completely, within the limit set by `body_limit`."""
        request, error_response = super().create_request(scope, body_file)
        if request is not None and "HTTP_TRANSFER_ENCODING" in request.META:
            request.META["CONTENT_LENGTH"] = str(body_file.seek(0, io.SEEK_END))
            body_file.seek(0)
        return request, error_response


pages = Handler()


async def route(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http" and live.PATH.match(scope["path"]):
        await live.stream(scope, receive, send)
    else:
        await pages(scope, receive, send)


application = limit_body(route)

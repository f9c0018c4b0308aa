"""What uvicorn runs: Django, and before it the live stream, which holds no thread and no SQL connection."""

from __future__ import annotations

import os
from typing import Any

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "llmtuner.settings")
os.umask(0o077)  # what the web process writes holds people's data: for its own account only

django = get_asgi_application()

from jobs.views import live  # noqa: E402  needs the settings that were loaded above
from llmtuner import checks  # noqa: E402  likewise
from llmtuner.bounded import bounded  # noqa: E402  likewise

checks.refuse_unsafe_start()


async def route(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http" and live.PATH.match(scope["path"]):
        await live.stream(scope, receive, send)
    else:
        await django(scope, receive, send)


application = bounded(route)

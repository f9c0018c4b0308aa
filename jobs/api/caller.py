"""The door of every operation: who calls, may they do this, and not too often."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

from asgiref.sync import SyncToAsync
from django.conf import settings
from django.core.cache import cache
from django.db import connections
from django.http import HttpRequest
from ninja.security import HttpBearer

from accounts.auth import Caller, authenticate
from jobs.api.errors import ApiError

WINDOW_S = 60
Result = TypeVar("Result")


class CallerRequest(HttpRequest):
    """A request that came through the door (for the type checker; ninja sets `auth`)."""

    auth: Caller


class Bearer(HttpBearer):
    """`auth=READ` on a router or an operation. Runs in a thread also for async operations."""

    def __init__(self, scope: str) -> None:
        super().__init__()
        self.scope = scope

    def __call__(self, request: HttpRequest) -> Caller | None:
        caller = authenticate(request)
        if caller is None:
            return None
        if self.scope not in caller.scopes:
            raise ApiError(
                403,
                f"This key may not do that: it lacks the scope '{self.scope}'. Make one that has it on your account's page.",
                code="insufficient_scope",
            )
        check_rate(caller.owner)
        return caller

    def authenticate(self, request: HttpRequest, token: str) -> Any:
        raise NotImplementedError("__call__ reads the credential itself")


def check_rate(owner: str) -> None:
    """At most so many requests a minute and person, over all processes. Without Redis nobody is counted."""
    limit = settings.API_REQUESTS_PER_MINUTE
    now = time.time()
    key = f"v1:{owner}:{int(now // WINDOW_S)}"
    try:
        cache.add(key, 0, WINDOW_S * 2)
        count = cache.incr(key)
    except Exception:  # the counter is a courtesy: work goes on when its store is down
        return
    if count > limit:
        wait = WINDOW_S - now % WINDOW_S
        raise ApiError(
            429, f"More than {limit} requests in a minute.", code="rate_limit_exceeded", retry_after=wait
        )


class Streaming(Bearer):
    """A door for async operations. It borrows a thread from the common pool, and gives the request's own one back."""

    is_async = True

    async def __call__(self, request: HttpRequest) -> Caller | None:  # type: ignore[override]  # ninja awaits it
        caller = await in_pool(super().__call__, request)
        give_thread_back()
        return caller


# A class each, because the OpenAPI document names a security scheme after its class.
class ReadKey(Bearer):
    pass


class WriteKey(Bearer):
    pass


class ReadStreamKey(Streaming):
    pass


class InferenceKey(Streaming):
    pass


def give_thread_back() -> None:
    """Django gives each request a thread for its sync signals and keeps it until the answer's last byte, so a thousand
    streams would be a thousand threads. This lets it go now; whatever needs one later gets a new one."""
    context = SyncToAsync.thread_sensitive_context.get(None)
    executor = SyncToAsync.context_to_thread_executor.pop(context, None) if context else None
    if executor is not None:
        executor.shutdown(wait=False)


async def in_pool(function: Callable[..., Result], *args: Any) -> Result:
    """Runs sync code in a thread of the common pool, which keeps no SQL connection afterwards."""

    def run() -> Result:
        try:
            return function(*args)
        finally:
            connections.close_all()

    return await asyncio.to_thread(run)


READ, WRITE = ReadKey("read"), WriteKey("write")
READ_STREAM, INFERENCE = ReadStreamKey("read"), InferenceKey("inference")

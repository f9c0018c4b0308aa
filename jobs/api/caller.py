"""Authenticates every request: who is calling, what they are allowed to do, and how often."""

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
    """An authenticated request (for the type checker; ninja sets `auth`)."""

    auth: Caller


class Bearer(HttpBearer):
    """Used as `auth=READ` on a router or an operation. Runs in a thread, even for async operations."""

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
                f"This key does not have the scope '{self.scope}'. Create one that has it on your account page.",
                code="insufficient_scope",
            )
        check_rate(caller.owner)
        return caller

    def authenticate(self, request: HttpRequest, token: str) -> Any:
        raise NotImplementedError("__call__ reads the credential")


def check_rate(owner: str) -> None:
    """Limits a user's requests per minute across all processes. While Redis is down there is no limit."""
    limit = settings.API_REQUESTS_PER_MINUTE
    now = time.time()
    key = f"v1:{owner}:{int(now // WINDOW_S)}"
    try:
        cache.add(key, 0, WINDOW_S * 2)
        count = cache.incr(key)
    except Exception:  # a store that is down must not stop requests
        return
    if count > limit:
        wait = WINDOW_S - now % WINDOW_S
        raise ApiError(
            429,
            f"You have sent more than {limit} requests in a minute. Wait a moment before sending more.",
            code="rate_limit_exceeded",
            retry_after=wait,
        )


class StreamingBearer(Bearer):
    """For async operations: uses a thread from the shared pool and releases the request's own thread."""

    is_async = True

    async def __call__(self, request: HttpRequest) -> Caller | None:  # type: ignore[override]  # ninja awaits it
        caller = await in_pool(super().__call__, request)
        release_thread()
        return caller


# One class each, because the OpenAPI document names a security scheme after its class.
class ReadKey(Bearer):
    pass


class WriteKey(Bearer):
    pass


class ReadStreamKey(StreamingBearer):
    pass


class InferenceKey(StreamingBearer):
    pass


def release_thread() -> None:
    """Releases the request's thread. Django keeps one per request, for sync signals, until the last byte of the response
    is sent, so a thousand streams would hold a thousand threads. Code that needs a thread later gets a new one."""
    context = SyncToAsync.thread_sensitive_context.get(None)
    executor = SyncToAsync.context_to_thread_executor.pop(context, None) if context else None
    if executor is not None:
        executor.shutdown(wait=False)


async def in_pool(function: Callable[..., Result], *args: Any) -> Result:
    """Runs sync code in a thread from the shared pool, then closes the thread's SQL connections."""

    def run() -> Result:
        try:
            return function(*args)
        finally:
            connections.close_all()

    return await asyncio.to_thread(run)


READ, WRITE = ReadKey("read"), WriteKey("write")
READ_STREAM, INFERENCE = ReadStreamKey("read"), InferenceKey("inference")

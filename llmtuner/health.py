"""Health checks for load balancers: `/healthz` reports that the process responds, and `/readyz` that its stores do.

Load balancers use an IP address instead of the host name, so both are answered before the host name is checked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import redis
from asgiref.sync import async_to_sync, iscoroutinefunction
from django.conf import settings
from django.db import connections
from django.http import HttpRequest, HttpResponse, HttpResponseBase, HttpResponseNotAllowed, JsonResponse
from django.utils.decorators import sync_and_async_middleware
from pynamodb.attributes import NumberAttribute

log = logging.getLogger(__name__)
TIMEOUT_S = 4.0  # a store that takes longer counts as unreachable
CACHE_S = 2.0  # a store is checked at most this often, no matter how many requests arrive
CACHE_BUCKET_S = 30.0  # longer, because every request to the bucket costs money
_threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="health")


@sync_and_async_middleware
def probes(get_response: Callable[[HttpRequest], HttpResponseBase]) -> Callable[[HttpRequest], object]:
    """The outermost middleware, which answers health checks and passes on all other requests."""
    views = {"/healthz": alive, "/readyz": ready}

    async def respond(request: HttpRequest) -> HttpResponse:
        if request.method not in {"GET", "HEAD"}:
            return HttpResponseNotAllowed(["GET", "HEAD"])
        response = await views[request.path_info]()
        response["Cache-Control"] = "no-store"
        return response

    if iscoroutinefunction(get_response):

        async def async_middleware(request: HttpRequest) -> HttpResponseBase:
            return await (respond(request) if request.path_info in views else get_response(request))

        return async_middleware

    def middleware(request: HttpRequest) -> HttpResponseBase:
        return async_to_sync(respond)(request) if request.path_info in views else get_response(request)

    return middleware


async def alive() -> JsonResponse:
    return JsonResponse({"status": "ok"})


async def ready() -> JsonResponse:
    """200 if every store responds, else 503. The cause is logged, not sent to the client."""
    states = await asyncio.gather(*(probe.state() for probe in PROBES))
    is_ready = set(states) == {"ok"}
    stores = {probe.name: state for probe, state in zip(PROBES, states, strict=True)}
    return JsonResponse(
        {"status": "ok" if is_ready else "waiting", "stores": stores}, status=200 if is_ready else 503
    )


@dataclass
class Probe:
    """The state of one store: ok, unreachable (may recover) or misconfigured (will not). At most one check at a time runs,
    in a thread, so a store that hangs blocks one thread and nothing else."""

    name: str
    check: Callable[[], None]
    cache_s: float = CACHE_S
    _pending: Future[str] | None = None
    _until: float = field(default=0.0)

    async def state(self) -> str:
        if self._pending is None or (self._pending.done() and time.monotonic() >= self._until):
            self._pending = _threads.submit(self._outcome)
        done, _ = await asyncio.wait({asyncio.wrap_future(self._pending)}, timeout=TIMEOUT_S)
        return done.pop().result() if done else "unreachable"

    def _outcome(self) -> str:
        from jobs.store import errors as store_errors  # imported late because it needs the settings

        cache_s = CACHE_S
        try:
            self.check()
        except Exception as error:  # any failure is reported as a state
            state = store_errors.outage(error) or store_errors.UNREACHABLE
            log.warning("%s is %s: %s", self.name, state, error)
        else:
            state, cache_s = "ok", self.cache_s
        finally:
            connections.close_all()
        self._until = time.monotonic() + cache_s
        return state


def _sql() -> None:
    from accounts.models import User

    User.objects.exists()


def _dynamodb() -> None:
    """Reads a nonexistent key from every table: this proves that the table exists and can be read."""
    from jobs.store.tables import TABLES

    for table in TABLES:
        attributes = table.get_attributes().values()
        hash_key = next(attribute for attribute in attributes if attribute.is_hash_key)
        range_key = next((attribute for attribute in attributes if attribute.is_range_key), None)
        with suppress(table.DoesNotExist):
            table.get(_nonexistent(hash_key), _nonexistent(range_key) if range_key else None)


def _nonexistent(attribute: object) -> object:
    return -1 if isinstance(attribute, NumberAttribute) else "-"


def _redis() -> None:
    with redis.Redis.from_url(settings.REDIS_URL, socket_timeout=3, socket_connect_timeout=3) as client:
        client.set("llmtuner:readyz", "ok", ex=60)


def _bucket() -> None:
    from jobs.store import blobs

    blobs.put_file("probes/readyz", [b"ok"])
    with blobs.open_file("probes/readyz") as file:
        if file.read() != b"ok":
            raise blobs.Damaged("probes/readyz")


PROBES = (
    Probe("sql", _sql),
    Probe("dynamodb", _dynamodb),
    Probe("redis", _redis),
    Probe("bucket", _bucket, cache_s=CACHE_BUCKET_S),
)

"""For machines that ask how we are: `/healthz` says that the process answers, `/readyz` that its stores do.

Load balancers ask by our address instead of our name, so both are answered before any host is checked.
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
WAIT_S = 4.0  # for one store; longer than that counts as unreachable
KEEP_S = 2.0  # however often we are asked, a store is asked this often
KEEP_BUCKET_S = 30.0  # every request to it costs money
_threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="health")


@sync_and_async_middleware
def probes(get_response: Callable[[HttpRequest], HttpResponseBase]) -> Callable[[HttpRequest], object]:
    """The first middleware."""
    views = {"/healthz": alive, "/readyz": ready}

    async def answer(request: HttpRequest) -> HttpResponse:
        if request.method not in {"GET", "HEAD"}:
            return HttpResponseNotAllowed(["GET", "HEAD"])
        response = await views[request.path_info]()
        response["Cache-Control"] = "no-store"
        return response

    if iscoroutinefunction(get_response):

        async def async_middleware(request: HttpRequest) -> HttpResponseBase:
            return await (answer(request) if request.path_info in views else get_response(request))

        return async_middleware

    def middleware(request: HttpRequest) -> HttpResponseBase:
        return async_to_sync(answer)(request) if request.path_info in views else get_response(request)

    return middleware


async def alive() -> JsonResponse:
    return JsonResponse({"status": "ok"})


async def ready() -> JsonResponse:
    """200 when every store answers, else 503; what is wrong goes to the log, not to whoever asks."""
    states = await asyncio.gather(*(probe.state() for probe in PROBES))
    is_ready = set(states) == {"ok"}
    stores = {probe.name: state for probe, state in zip(PROBES, states, strict=True)}
    return JsonResponse(
        {"status": "ok" if is_ready else "waiting", "stores": stores}, status=200 if is_ready else 503
    )


@dataclass
class Probe:
    """One store: ok, unreachable (it may come back by itself) or misconfigured (it will not). It is asked in a thread,
    by one at a time, so that a store that hangs costs a thread and no more."""

    name: str
    ask: Callable[[], None]
    keep_s: float = KEEP_S
    _asked: Future[str] | None = None
    _until: float = field(default=0.0)

    async def state(self) -> str:
        if self._asked is None or (self._asked.done() and time.monotonic() >= self._until):
            self._asked = _threads.submit(self._outcome)
        done, _ = await asyncio.wait({asyncio.wrap_future(self._asked)}, timeout=WAIT_S)
        return done.pop().result() if done else "unreachable"

    def _outcome(self) -> str:
        from jobs.store import errors as store_errors  # late: it needs the settings

        keep_s = KEEP_S
        try:
            self.ask()
        except Exception as error:  # a probe reports any failure, whatever its kind
            state = store_errors.outage(error) or store_errors.UNREACHABLE
            log.warning("%s is %s: %s", self.name, state, error)
        else:
            state, keep_s = "ok", self.keep_s
        finally:
            connections.close_all()
        self._until = time.monotonic() + keep_s
        return state


def _sql() -> None:
    from accounts.models import User

    User.objects.exists()


def _dynamodb() -> None:
    """A read of every table, by a key that no row has: it shows that the table exists and that we may read it."""
    from jobs.store.tables import TABLES

    for table in TABLES:
        hash_key, range_key = table._hash_key_attribute(), table._range_key_attribute()
        with suppress(table.DoesNotExist):
            table.get(_no_key(hash_key), _no_key(range_key) if range_key else None)


def _no_key(attribute: object) -> object:
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
    Probe("bucket", _bucket, keep_s=KEEP_BUCKET_S),
)

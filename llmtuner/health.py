"""For machines that ask how we are: `/healthz` says that the process answers, `/readyz` that its stores do."""

from __future__ import annotations

import asyncio
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable

import redis
from asgiref.sync import sync_to_async
from django.conf import settings
from django.db import connection
from django.http import HttpRequest, JsonResponse

log = logging.getLogger(__name__)
_KEEP_S = 2.0  # however often it is asked, the stores are asked this often
_last: tuple[float, dict[str, str]] = (0.0, {})


async def alive(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"status": "ok"})


async def ready(request: HttpRequest) -> JsonResponse:
    """200 when every store answers, else 503; what is wrong goes to the log, not to whoever asks."""
    global _last
    if time.monotonic() - _last[0] > _KEEP_S:
        probes = {"sql": _sql, "dynamodb": _dynamodb, "redis": _redis}
        answers = await asyncio.gather(*(_probe(name, probe) for name, probe in probes.items()))
        _last = (time.monotonic(), dict(zip(probes, answers, strict=True)))
    stores = _last[1]
    is_ready = set(stores.values()) == {"ok"}
    return JsonResponse(
        {"status": "ok" if is_ready else "waiting", "stores": stores}, status=200 if is_ready else 503
    )


async def _probe(name: str, probe: Callable[[], object]) -> str:
    try:
        await asyncio.wait_for(sync_to_async(probe, thread_sensitive=name == "sql")(), 4)
    except Exception as e:  # a probe reports any failure, whatever its kind
        log.warning("%s is not reachable: %s", name, e)
        return "unreachable"
    return "ok"


def _sql() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")


def _dynamodb() -> None:
    if not settings.DYNAMODB_ENDPOINT:
        return  # AWS's own: its reachability is not ours to judge on every probe
    request = urllib.request.Request(settings.DYNAMODB_ENDPOINT)  # noqa: S310  the operator's own address
    try:
        urllib.request.urlopen(request, timeout=3).close()  # noqa: S310
    except urllib.error.HTTPError:
        return  # any answer will do: an unsigned request is refused with 400


def _redis() -> None:
    with redis.Redis.from_url(settings.REDIS_URL, socket_timeout=3, socket_connect_timeout=3) as client:
        client.ping()

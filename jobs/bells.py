"""Redis, which rings bells: news of jobs, streamed tokens, the wish to be served. Losing it loses nothing that matters."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import redis
import redis.asyncio
from django.conf import settings

TIMEOUTS: dict[str, Any] = {"socket_connect_timeout": 2, "socket_timeout": 3, "health_check_interval": 15}


@lru_cache(maxsize=1)
def client() -> redis.Redis:
    """One pool for each process, for threads and plain code."""
    return redis.Redis.from_url(settings.REDIS_URL, decode_responses=True, **TIMEOUTS)


def own_client(socket_timeout: float = 3) -> redis.asyncio.Redis:
    """A connection of its own for one reader, who closes it (`aclose`). Nobody else's reply can ever be read on it, also
    when the reader is cancelled in the middle of a command."""
    return redis.asyncio.Redis.from_url(
        settings.REDIS_URL,
        decode_responses=True,
        max_connections=1,
        **(TIMEOUTS | {"socket_timeout": socket_timeout}),
    )

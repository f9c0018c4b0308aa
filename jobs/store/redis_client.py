"""Redis, which rings bells: news of jobs, streamed tokens, the wish to be served. Losing it loses nothing that matters."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import redis
import redis.asyncio
from celery import current_app
from django.conf import settings

log = logging.getLogger(__name__)

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


# ---- messages to workers -------------------------------------------------------------------------------------------


def enqueue(task: str, *args: str, expires: float | None = None) -> None:
    """Sends a task's message, by its name. Best effort: it never raises and never waits long; the reconciler sends it
    again, for what has to be done stands in the store."""
    try:
        current_app.send_task(task, args=args, expires=expires)
    except Exception as error:
        log.warning("the message %s could not be sent: %s", task, error)


def enqueue_training(waiting: int) -> None:
    """Wakes training workers, unless as many messages are in the queue as jobs are `waiting`. Best effort."""
    try:
        if int(client().llen("training")) < waiting:
            enqueue("run_next")
    except Exception as error:
        log.warning("the training queue could not be read: %s", error)

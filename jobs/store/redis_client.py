"""Redis: notifications of new events, streamed tokens and task messages. It holds no data that must not be lost."""

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
    """One pool per process, for threads and synchronous code."""
    return redis.Redis.from_url(settings.REDIS_URL, decode_responses=True, **TIMEOUTS)


def own_client(socket_timeout: float = 3) -> redis.asyncio.Redis:
    """A dedicated connection for one reader, which must close it (`aclose`). A reader that is cancelled in the middle of a
    command would otherwise leave its reply to the next user of the connection."""
    return redis.asyncio.Redis.from_url(
        settings.REDIS_URL,
        decode_responses=True,
        max_connections=1,
        **(TIMEOUTS | {"socket_timeout": socket_timeout}),
    )


# ---- messages to workers -------------------------------------------------------------------------------------------


def enqueue(task: str, *args: str, expires: float | None = None) -> None:
    """Sends a task message by name. Best effort: it never raises and never blocks for long. The reconciler sends lost
    messages again, because the work itself is recorded in the store."""
    try:
        current_app.send_task(task, args=args, expires=expires)
    except Exception as error:
        log.warning("could not send the task message %s: %s", task, error)


def enqueue_training(waiting: int) -> None:
    """Wakes training workers, unless the queue already has a message for each of the `waiting` jobs. Best effort."""
    try:
        if int(client().llen("training")) < waiting:
            enqueue("run_next")
    except Exception as error:
        log.warning("could not read the training queue: %s", error)

"""The stores that bin/up brings: Redis and the embedded DynamoDB."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import redis

from llmtuner.env import stored_secret
from llmtuner.local_stack.preflight import StartupError, port_is_open
from llmtuner.local_stack.supervisor import Supervisor, wait_for


def write_redis_configuration(var: Path) -> None:
    folder = var / "redis"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "redis.conf").write_text(
        f'bind 127.0.0.1\nport {os.environ["REDIS_PORT"]}\ndir {folder}\nappendonly yes\nsave ""\n'
        f"requirepass {stored_secret(var / 'redis-password')}\n"
    )
    (folder / "redis.conf").chmod(0o600)


def redis_answers() -> bool:
    """Whether our Redis is ready. An open port is not enough: Redis opens it before it has loaded its data, and the port may
    be another Redis server's."""
    try:
        with redis.Redis.from_url(
            os.environ["REDIS_URL"], socket_timeout=1, socket_connect_timeout=1
        ) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def start_redis(supervisor: Supervisor, var: Path) -> None:
    """Starts Redis, with empty data if it cannot read its file.

    Redis repairs a file with a truncated end, but exits if the file is damaged in the middle. None of its data is essential,
    because DynamoDB has everything that is queued. So the damaged file is moved away and Redis starts empty."""

    def started() -> bool:
        supervisor.start("redis")
        wait_for("redis", lambda: redis_answers() or supervisor.has_exited("redis"), 120, var)
        return not supervisor.has_exited("redis")

    if "redis" not in supervisor.names or started():
        return
    supervisor.stop_one("redis")
    folder, aside = var / "redis", var / time.strftime("redis-damaged-%Y%m%d-%H%M%S")
    folder.rename(aside)
    write_redis_configuration(var)
    if not started():  # the data file was not the cause
        supervisor.stop_one("redis")
        shutil.rmtree(folder)
        aside.rename(folder)
        raise StartupError(f"Redis did not start. Its log: {var}/logs/redis.log")
    print(
        f"\n  Redis could not read its data, so it started empty. No work is lost: jobs and datasets are stored elsewhere.\n"
        f"  The damaged data was moved to {aside}",
        flush=True,
    )


def start_dynamodb(supervisor: Supervisor, var: Path) -> None:
    if "dynamodb" not in supervisor.names:
        return
    supervisor.start("dynamodb")
    port = int(os.environ["DYNAMODB_PORT"])
    wait_for("dynamodb", lambda: port_is_open(port) or supervisor.has_exited("dynamodb"), 20, var)
    if supervisor.has_exited("dynamodb"):
        raise StartupError(f"DynamoDB did not start. Its log: {var}/logs/dynamodb.log")

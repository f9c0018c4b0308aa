"""The connection to DynamoDB that all tables share, and a counter of its calls."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.conf import settings
from pynamodb.connection.table import TableConnection
from pynamodb.models import Model

_lock = threading.Lock()
_clients: dict[tuple[float, float, int], Any] = {}
_counters: list[Counter[str]] = []


class Table(Model):
    """Base class of all tables. PynamoDB creates a botocore client for each class (100 ms and 10 MB each); ours share
    one per combination of timeouts."""

    @classmethod
    def _get_connection(cls) -> TableConnection:
        known = cls._connection is not None
        table = super()._get_connection()
        if not known:
            timeouts = (
                cls.Meta.connect_timeout_seconds,
                cls.Meta.read_timeout_seconds,
                cls.Meta.max_retry_attempts,
            )
            with _lock:
                if timeouts not in _clients:
                    _clients[timeouts] = table.connection.client
                    _clients[timeouts].meta.events.register("before-call.dynamodb", _count)
                table.connection._client = _clients[timeouts]
        return table


class ConnectionMeta:
    """Connection settings; each table's `Meta` adds its name."""

    region = settings.AWS_REGION
    host = settings.DYNAMODB_ENDPOINT or None
    # botocore always needs credentials. The embedded server verifies the signature, and DynamoDB Local accepts any. On
    # AWS, botocore finds its own. We don't use those in AWS_ACCESS_KEY_ID, which may be valid only for the bucket.
    _local_credentials = host and (settings.DYNAMODB_SECRET or "AWS_ACCESS_KEY_ID" not in os.environ)
    aws_access_key_id = "local" if _local_credentials else None
    aws_secret_access_key = (settings.DYNAMODB_SECRET or "local") if _local_credentials else None
    connect_timeout_seconds = 2
    read_timeout_seconds = 5
    max_retry_attempts = 2
    max_pool_connections = 50
    billing_mode = "PAY_PER_REQUEST"


def table_name(name: str) -> str:
    return f"{settings.DYNAMODB_TABLE_PREFIX}{name}"


def _count(model: Any, **_: Any) -> None:
    for counter in list(_counters):
        counter[model.name] += 1


@contextmanager
def count_calls() -> Iterator[Counter[str]]:
    """Counts this process's DynamoDB calls inside the block, by operation. `reads(counter)` adds up the reads."""
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def reads(counter: Counter[str]) -> int:
    return sum(n for name, n in counter.items() if name in {"GetItem", "BatchGetItem", "Query", "Scan"})

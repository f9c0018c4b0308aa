"""`/healthz` and `/readyz` of a started web process, and the errors of pages and API when a store is unreachable or
misconfigured."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from tests import services

KEY, SECRET = "some-key", "some-secret"
API_KEY = "Bearer sk-llmt-abcdefgh1234-" + "A" * 43  # well-formed, so it is looked up in SQL
PROBE = {"Host": "10.0.0.7"}  # the header that a load balancer sends


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[services.Service]:
    service = services.s3(tmp_path, KEY, SECRET).start()
    (tmp_path / "s3" / "bucket").mkdir()
    yield service
    service.kill()


def bucket(s3: services.Service, **change: str) -> dict[str, str]:
    return {
        "AWS_STORAGE_BUCKET_NAME": "bucket",
        "AWS_S3_ENDPOINT_URL": f"http://127.0.0.1:{s3.port}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
    } | change


def get(port: int, path: str, **headers: str) -> tuple[int, str, Message]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read().decode(), response.headers


def readiness(port: int) -> tuple[int, dict[str, str]]:
    status, body, _ = get(port, "/readyz", **PROBE)
    return status, json.loads(body)["stores"]


def test_health_checks_accept_any_host_header(start_web: Callable[..., int], s3: Any, folder: Path):
    port = start_web(
        **bucket(s3), PUBLIC_URL="https://tuner.example.com", DATABASE_URL=f"sqlite:///{folder}/db.sqlite3"
    )
    assert get(port, "/healthz", **PROBE)[0] == 200
    assert readiness(port) == (200, dict.fromkeys(("sql", "dynamodb", "redis", "bucket"), "ok"))
    assert get(port, "/v1/models", **PROBE)[0] == 400


@pytest.mark.usefixtures("transactional_db")
def test_unavailable_stores_are_reported_as_unreachable(start_web: Callable[..., int], s3: services.Service):
    unused_port = services.free_port()
    port = start_web(
        **bucket(s3, AWS_S3_ENDPOINT_URL=f"http://127.0.0.1:{unused_port}"),
        DATABASE_URL=f"postgres://tuner:secret@127.0.0.1:{unused_port}/tuner",
        REDIS_URL=f"redis://:secret@127.0.0.1:{unused_port}/0",
        DYNAMODB_ENDPOINT=f"http://127.0.0.1:{unused_port}",
    )
    assert readiness(port) == (503, dict.fromkeys(("sql", "dynamodb", "redis", "bucket"), "unreachable"))
    assert get(port, "/healthz", **PROBE)[0] == 200

    status, body, headers = get(port, "/v1/models", Authorization=API_KEY)
    assert (status, json.loads(body)["error"]["code"], headers["Retry-After"]) == (503, "unavailable", "5")
    status, body, _ = get(port, "/jobs/", Cookie="session=abcdefghijklmnopqrstuvwxyz123456")
    assert status == 503
    assert "Part of the service is unavailable" in body
    assert get(port, "/jobs/ftjob-1/stream", Cookie="session=abcdefghijklmnopqrstuvwxyz123456")[0] == 503


@pytest.mark.usefixtures("transactional_db")
def test_wrong_store_settings_are_reported_as_misconfigured(
    start_web: Callable[..., int], s3: services.Service, tmp_path: Path, redis: Any
):
    """A wrong Redis password, missing tables in SQL and DynamoDB, and a wrong S3 secret."""
    port = start_web(
        **bucket(s3, AWS_SECRET_ACCESS_KEY="wrong"),
        DATABASE_URL=f"sqlite:///{tmp_path}/empty.sqlite3",
        REDIS_URL=f"redis://:wrong@127.0.0.1:{redis.port}/0",
        DYNAMODB_TABLE_PREFIX="no-such-",
    )
    assert readiness(port) == (503, dict.fromkeys(("sql", "dynamodb", "redis", "bucket"), "misconfigured"))

    status, body, headers = get(port, "/v1/models", Authorization=API_KEY)
    assert (status, json.loads(body)["error"]["code"], headers["x-should-retry"]) == (
        503,
        "misconfigured",
        "false",
    )
    assert "Retry-After" not in headers
    status, body, _ = get(port, "/jobs/", Cookie="session=abcdefghijklmnopqrstuvwxyz123456")
    assert status == 503
    assert "Part of the service is misconfigured" in body


def test_a_missing_bucket_is_reported_as_misconfigured(start_web: Callable[..., int], s3: services.Service):
    port = start_web(**bucket(s3, AWS_STORAGE_BUCKET_NAME="another"))
    assert readiness(port)[1]["bucket"] == "misconfigured"


def test_a_store_that_hangs_does_not_block_the_probe(start_web: Callable[..., int]):
    """The store accepts connections and never responds. Each probe is answered, and only one thread waits for the store."""
    import socket

    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        port = start_web(DATABASE_URL=f"postgres://tuner:secret@127.0.0.1:{silent.getsockname()[1]}/tuner")
        for _ in range(3):
            assert readiness(port)[1]["sql"] == "unreachable"
        silent.settimeout(0.5)
        connections = 0
        try:
            while True:
                silent.accept()
                connections += 1
        except TimeoutError:
            assert connections == 1

"""`/healthz` and `/readyz`, and what people and programs are told when a store is away or set up incorrectly, by a started
web process."""

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
API_KEY = "Bearer sk-llmt-abcdefgh1234-" + "A" * 43  # of the right form, so SQL is asked for it
AGENT = {"Host": "10.0.0.7"}  # as a load balancer asks


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
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers


def readiness(port: int) -> tuple[int, dict[str, str]]:
    status, body, _ = get(port, "/readyz", **AGENT)
    return status, json.loads(body)["stores"]


def test_health_checks_accept_any_host_header(start_web: Callable[..., int], s3: Any, folder: Path):
    port = start_web(
        **bucket(s3), PUBLIC_URL="https://tuner.example.com", DATABASE_URL=f"sqlite:///{folder}/db.sqlite3"
    )
    assert get(port, "/healthz", **AGENT)[0] == 200
    assert readiness(port) == (200, dict.fromkeys(("sql", "dynamodb", "redis", "bucket"), "ok"))
    assert get(port, "/v1/models", **AGENT)[0] == 400


@pytest.mark.usefixtures("transactional_db")
def test_unavailable_stores_are_reported_as_unreachable(start_web: Callable[..., int], s3: services.Service):
    nobody = services.free_port()
    port = start_web(
        **bucket(s3, AWS_S3_ENDPOINT_URL=f"http://127.0.0.1:{nobody}"),
        DATABASE_URL=f"postgres://tuner:secret@127.0.0.1:{nobody}/tuner",
        REDIS_URL=f"redis://:secret@127.0.0.1:{nobody}/0",
        DYNAMODB_ENDPOINT=f"http://127.0.0.1:{nobody}",
    )
    assert readiness(port) == (503, dict.fromkeys(("sql", "dynamodb", "redis", "bucket"), "unreachable"))
    assert get(port, "/healthz", **AGENT)[0] == 200

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
    """A wrong password of Redis, tables that don't exist in SQL and DynamoDB, and a wrong secret of S3."""
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
    """It accepts connections and says nothing; each probe is answered all the same, by one waiting thread in all."""
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

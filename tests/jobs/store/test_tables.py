"""Reading and writing rows, against a real DynamoDB engine."""

from __future__ import annotations

import socket
import struct
import time

import pytest

from jobs.store import tables
from jobs.store.tables import Job, Usage, new_id, time_of

pytestmark = pytest.mark.usefixtures("stores")


def test_ids_sort_by_time_and_contain_it():
    first, second = new_id("file"), new_id("file")
    assert first[:15] <= second[:15]
    assert len(first) == len("file-") + 26
    assert abs(time_of(second) - time.time()) < 5


def test_an_id_does_not_reveal_the_next_one(monkeypatch):
    monkeypatch.setattr(time, "time_ns", lambda: 1_790_000_000 * 10**9)
    ids = [new_id("file") for _ in range(20)]  # all in one millisecond
    assert len({id[:15] for id in ids}) == 1
    assert ids != sorted(ids), "the random part counts upwards"


def test_a_second_put_of_the_same_row_is_refused():
    row = Usage(new_id("user"), "x", body_hash="a")
    assert tables.put_new(row) is row
    other = Usage(row.owner, "x", body_hash="b")
    assert tables.put_new(other, lambda row: row.body_hash == "b") is None
    stored = tables.put_new(other, lambda row: row.body_hash == "a")
    assert stored is not None
    assert stored.body_hash == "a"


def test_an_update_returns_the_updated_row():
    job = Job(new_id("user"), new_id("ftjob"), status="queued", settings={"epochs": 1.5})
    tables.put_new(job)
    updated = tables.update(job, [Job.status.set("running"), Job.version.add(1)], Job.status == "queued")
    assert updated is not None
    assert (updated.status, updated.version, updated.settings) == ("running", 1, {"epochs": 1.5})
    assert job.status == "queued"
    assert tables.update(job, [Job.status.set("running")], Job.status == "queued") is None


def test_a_refused_update_that_was_already_applied_counts_as_done():
    job = Job(new_id("user"), new_id("ftjob"), lease_owner="me")
    tables.put_new(job)
    updated = tables.update(
        job, [Job.fencing_token.set(1)], Job.fencing_token == 9, lambda row: row.lease_owner == "me"
    )
    assert updated is not None
    assert updated.fencing_token == 0


def test_calls_are_counted():
    with tables.count_calls() as calls:
        assert tables.get(Job, "nobody", "nothing") is None
        list(tables.rows(Job, "nobody"))
    assert tables.reads(calls) == 2


def test_the_embedded_dynamodb_survives_a_client_that_dies_during_a_request(dynamodb):
    """As after kill -9 of a worker. Without llmtuner/dynalite_guard.cjs the whole server would exit."""
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", dynamodb.port)) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
            time.sleep(0.05)
            # Closing sends a reset instead of a normal end.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    time.sleep(0.3)
    assert dynamodb.process.poll() is None
    assert dynamodb.is_up()

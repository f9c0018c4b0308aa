"""Addresses that do not exist answer in OpenAI's shape and say what to use instead."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from typing import Any

import pytest
from django.conf import settings
from django.test import Client

from tests.jobs.api.conftest import Person

PROGRAM = {"Accept": "application/json", "Authorization": "Bearer sk-any"}
BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def refusal(method: str, path: str, headers: dict[str, str], status: int = 404) -> dict[str, Any]:
    answer = Client().generic(method, path, b"{}", "application/json", headers=headers)
    assert answer.status_code == status, answer.content
    assert answer["Content-Type"] == "application/json"
    assert "set-cookie" not in answer
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] is None
    assert f"{method} {path}" in error["message"]
    return error


@pytest.mark.parametrize(
    ("method", "path", "instead"),
    [
        ("GET", "/v1/nothing/of/it", "/v1/docs"),
        ("GET", "/v1/", "/v1/docs"),
        ("POST", "/v1/chat/completions/", "Use /v1/chat/completions."),
        ("GET", "/v1//models", "Use /v1/models."),
        ("GET", "/v1/v1/models", "Use /v1/models."),
        ("POST", "/v1/v1/chat/completions", "Use /v1/chat/completions."),
        ("POST", "/v1/fine-tunes", "/v1/fine_tuning/jobs"),
        ("GET", "/v1/fine-tunes/ft-1/events", "/v1/fine_tuning/jobs"),
        ("GET", "/v1/engines", "/v1/models"),
        ("POST", "/v1/edits", "/v1/chat/completions"),
        ("POST", "/v1/responses", "/v1/chat/completions"),
        ("POST", "/v1/embeddings", "Embeddings are not supported"),
        ("POST", "/v1/images/generations", "text"),
        ("POST", "/v1/batches", "batch"),
    ],
)
def test_an_unknown_url_is_named_with_what_to_use(method: str, path: str, instead: str):
    error = refusal(method, path, PROGRAM)
    assert error["code"] == "unknown_url"
    assert instead in error["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/chat/completions"),
        ("POST", "/completions"),
        ("GET", "/models"),
        ("GET", "/models/starter"),
        ("GET", "/models/"),  # with a key: a program
        ("POST", "/files"),
        ("GET", "/files/file-1/content"),
        ("POST", "/uploads/upload-1/parts"),
        ("GET", "/fine_tuning/jobs"),
        ("POST", "/fine_tuning/jobs"),
        ("POST", "/fine_tuning/jobs/ftjob-1/cancel"),
        ("POST", "/responses"),
    ],
)
def test_a_base_url_without_v1_is_told_so(method: str, path: str):
    error = refusal(method, path, PROGRAM)
    assert error["code"] == "unknown_url"
    assert f"base_url to {settings.PUBLIC_URL}/v1" in error["message"]


@pytest.mark.parametrize(("method", "path"), [("POST", "/chat/completions"), ("GET", "/models")])
def test_so_is_one_without_a_key(method: str, path: str):
    assert "base_url" in refusal(method, path, {"Accept": "*/*"})["message"]


@pytest.mark.django_db
def test_a_person_still_gets_pages():
    page = Client()
    assert page.get("/models", headers=BROWSER).headers["Location"] == "/models/"
    for path in ("/models/", "/models/ft:x/"):
        assert page.get(path, headers=BROWSER).status_code == 302  # to sign in
        assert page.get(path, headers={"Accept": "*/*"}).status_code == 302  # a script of the page
    answer = page.get("/chat/completions", headers=BROWSER)
    assert (answer.status_code, answer["Content-Type"]) == (404, "text/html; charset=utf-8")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/models", "GET"),
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/files", "GET or POST"),
        ("PATCH", "/v1/fine_tuning/jobs/ftjob-1", "GET"),
    ],
)
def test_a_wrong_method_is_named_with_the_right_one(method: str, path: str, allowed: str):
    error = refusal(method, path, PROGRAM, 405)
    assert error["code"] == "method_not_allowed"
    assert f"Use {allowed}." in error["message"]


def test_a_large_file_sent_without_v1_is_told_so_too(web: Any, people: dict[str, Person]):
    connection = http.client.HTTPConnection("127.0.0.1", int(web.url.rsplit(":", 1)[1]), timeout=20)
    connection.putrequest("POST", "/files")
    connection.putheader("Content-Type", "multipart/form-data; boundary=b")
    connection.putheader("Content-Length", str(10**8))
    connection.putheader("Authorization", f"Bearer {people['alice'].key}")
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 404
    assert b"base_url" in answer.read()
    connection.close()


# ---- lists -------------------------------------------------------------------------------------


@pytest.fixture
def things(stores: None, people: dict[str, Person]) -> dict[str, str]:
    from tests.jobs.api.things import put_things

    return put_things(people["alice"])


LISTS = ["files", "files?order=asc", "files?purpose=fine-tune-results", "fine_tuning/jobs", "models"]
LISTS += ["fine_tuning/jobs?metadata[note]=x", "webhook_endpoints"]
LISTS += ["fine_tuning/jobs/{job_id}/events", "fine_tuning/jobs/{job_id}/checkpoints"]


@pytest.mark.parametrize("after", ["unknown", "", "file-01HZZZZZZZZZZZZZZZZZZZZZZZ", "ü", "ftjob-1"])
@pytest.mark.parametrize("path", LISTS)
def test_an_unknown_cursor_is_refused_by_every_list(
    path: str, after: str, things: dict[str, str], people: dict[str, Person]
):
    path = path.format(**things)
    answer = Client().get(
        f"/v1/{path}{'&' if '?' in path else '?'}after={after}",
        headers={"Authorization": f"Bearer {people['alice'].key}"},
    )
    assert answer.status_code == 400, answer.content
    assert answer.json()["error"]["param"] == "after"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("files", "file_id"),
        ("files?order=asc", "file_id"),
        ("fine_tuning/jobs", "job_id"),
        ("models", "model_id"),
        ("webhook_endpoints", "webhook_endpoint_id"),
    ],
)
def test_a_cursor_of_somebody_else_is_unknown(
    path: str, name: str, things: dict[str, str], people: dict[str, Person]
):
    for person, status in (("alice", 200), ("bob", 400)):
        answer = Client().get(
            f"/v1/{path}{'&' if '?' in path else '?'}after={things[name]}",
            headers={"Authorization": f"Bearer {people[person].key}"},
        )
        assert answer.status_code == status, answer.content
        if status == 200:
            assert things[name] not in [row["id"] for row in answer.json()["data"]]


def test_a_list_goes_on_after_a_file_that_was_just_deleted(stores: None, people: dict[str, Person]):
    """As `for file in client.files.list(): client.files.delete(file.id)` does."""
    from jobs.store import access, tables

    bob = people["bob"]
    for row in access.list_datasets(bob.owner, 1000):
        row.delete()
    ids = []
    for _ in range(3):
        ids.append(tables.new_id("file"))
        tables.Dataset(bob.owner, ids[-1], name="a", status="ready").save()
    page, key = Client(), {"Authorization": f"Bearer {bob.key}"}
    after, seen = "", []
    while True:
        payload = page.get(f"/v1/files?limit=1{after}", headers=key).json()
        seen += [row["id"] for row in payload["data"]]
        if not payload["has_more"]:
            break
        assert page.delete(f"/v1/files/{seen[-1]}", headers=key).status_code == 200
        after = f"&after={seen[-1]}"
    assert seen == ids[::-1]


# ---- filters -----------------------------------------------------------------------------------


def listed(person: Person, path: str) -> list[str]:
    """All ids, page by page, as the client follows them: an empty page ends the list."""
    ids: list[str] = []
    after = ""
    while True:
        answer = Client().get(f"/v1/{path}{after}", headers={"Authorization": f"Bearer {person.key}"})
        assert answer.status_code == 200, answer.content
        payload = answer.json()
        ids += [row["id"] for row in payload["data"]]
        if not payload["has_more"] or not payload["data"]:
            return ids
        after = f"&after={payload['last_id']}"


@pytest.fixture
def many(stores: None, people: dict[str, Person]) -> Iterator[list[str]]:
    """5,100 jobs, of which the first and the last are of team blue and have succeeded."""
    from jobs.store import tables
    from jobs.store.tables import Job

    bob = people["bob"]
    for row in tables.rows(Job, bob.owner):
        row.delete()
    ids = [f"ftjob-{number:026d}" for number in range(5100)]
    with Job.batch_write() as batch:
        for number, job_id in enumerate(ids):
            blue = job_id in (ids[0], ids[-1])
            job = Job(bob.owner, job_id, base="starter", status="succeeded" if blue else "failed")
            job.metadata = {"team": "blue" if blue else "red", "n": str(number), "quote": '"team": "blue"'}
            batch.save(job)
    yield ids
    with Job.batch_write() as batch:
        for job_id in ids:
            batch.delete(Job(bob.owner, job_id))


@pytest.mark.slow
def test_no_match_is_lost_behind_thousands_of_others(
    many: list[str], people: dict[str, Person], monkeypatch: pytest.MonkeyPatch
):
    from jobs.store import access, tables

    bob, blue = people["bob"], [many[-1], many[0]]
    assert listed(bob, "fine_tuning/jobs?limit=100&metadata[team]=blue") == blue
    assert listed(bob, "fine_tuning/jobs?metadata[team]=blue&metadata[n]=0") == [many[0]]
    for nothing in ("metadata[team]=green", "metadata[te]=blue", "metadata[team]=blue&metadata[n]=1"):
        assert listed(bob, f"fine_tuning/jobs?{nothing}") == []
    results = listed(bob, "files?purpose=fine-tune-results&limit=100")
    assert results == [id.replace("ftjob-", "file-results-") for id in blue]

    with tables.count_calls() as counter:  # many matches: one short read
        reds = access.list_jobs(bob.owner, 20, metadata={"team": "red"})
    assert [job.job_id for job in reds] == many[-2:-22:-1]
    assert (reds.has_more, tables.reads(counter)) == (True, 1)

    monkeypatch.setattr(access, "SEARCH_LIMIT", 1000)  # few: an answer that has something stops
    with tables.count_calls() as counter:
        first = access.list_jobs(bob.owner, 20, metadata={"team": "blue"})
    assert [job.job_id for job in first] == blue[:1]
    assert first.has_more
    assert tables.reads(counter) == 4  # 100 + 200 + 400 + 800 rows
    assert listed(bob, "fine_tuning/jobs?metadata[team]=blue") == blue

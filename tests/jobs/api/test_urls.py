"""Unknown URLs get an error in OpenAI's format that says what to use instead."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from typing import Any

import pytest
from django.conf import settings
from django.test import Client

from tests.jobs.api.conftest import ApiUser

API_CLIENT = {"Accept": "application/json", "Authorization": "Bearer sk-any"}
BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def get_error(method: str, path: str, headers: dict[str, str], status: int = 404) -> dict[str, Any]:
    response = Client().generic(method, path, b"{}", "application/json", headers=headers)
    assert response.status_code == status, response.content
    assert response["Content-Type"] == "application/json"
    assert "set-cookie" not in response
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] is None
    assert f"{method} {path}" in error["message"]
    return error


@pytest.mark.parametrize(
    ("method", "path", "alternative"),
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
def test_an_unknown_url_error_names_the_alternative(method: str, path: str, alternative: str) -> None:
    error = get_error(method, path, API_CLIENT)
    assert error["code"] == "unknown_url"
    assert alternative in error["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/chat/completions"),
        ("POST", "/completions"),
        ("GET", "/models"),
        ("GET", "/models/starter"),
        ("GET", "/models/"),  # with a key, so from an API client
        ("POST", "/files"),
        ("GET", "/files/file-1/content"),
        ("POST", "/uploads/upload-1/parts"),
        ("GET", "/fine_tuning/jobs"),
        ("POST", "/fine_tuning/jobs"),
        ("POST", "/fine_tuning/jobs/ftjob-1/cancel"),
        ("POST", "/responses"),
    ],
)
def test_a_base_url_without_v1_is_explained(method: str, path: str) -> None:
    error = get_error(method, path, API_CLIENT)
    assert error["code"] == "unknown_url"
    assert f"base_url to {settings.PUBLIC_URL}/v1" in error["message"]


@pytest.mark.parametrize(("method", "path"), [("POST", "/chat/completions"), ("GET", "/models")])
def test_a_base_url_without_v1_is_explained_without_a_key_too(method: str, path: str) -> None:
    assert "base_url" in get_error(method, path, {"Accept": "*/*"})["message"]


@pytest.mark.django_db
def test_a_browser_still_gets_pages() -> None:
    client = Client()
    assert client.get("/models", headers=BROWSER).headers["Location"] == "/models/"
    for path in ("/models/", "/models/ft:x/"):
        assert client.get(path, headers=BROWSER).status_code == 302  # to sign in
        assert client.get(path, headers={"Accept": "*/*"}).status_code == 302  # one of the page's scripts
    response = client.get("/chat/completions", headers=BROWSER)
    assert (response.status_code, response["Content-Type"]) == (404, "text/html; charset=utf-8")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/models", "GET"),
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/files", "GET or POST"),
        ("PATCH", "/v1/fine_tuning/jobs/ftjob-1", "GET"),
    ],
)
def test_a_wrong_method_error_names_the_allowed_ones(method: str, path: str, allowed: str) -> None:
    error = get_error(method, path, API_CLIENT, 405)
    assert error["code"] == "method_not_allowed"
    assert f"Use {allowed}." in error["message"]


def test_a_large_upload_without_v1_is_explained_too(web: Any, users: dict[str, ApiUser]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", int(web.url.rsplit(":", 1)[1]), timeout=20)
    connection.putrequest("POST", "/files")
    connection.putheader("Content-Type", "multipart/form-data; boundary=b")
    connection.putheader("Content-Length", str(10**8))
    connection.putheader("Authorization", f"Bearer {users['alice'].key}")
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 404
    assert b"base_url" in response.read()
    connection.close()


# ---- lists -------------------------------------------------------------------------------------


@pytest.fixture
def resource_ids(stores: None, users: dict[str, ApiUser]) -> dict[str, str]:
    from tests.jobs.api.resources import create_resources

    return create_resources(users["alice"])


LISTS = ["files", "files?order=asc", "files?purpose=fine-tune-results", "fine_tuning/jobs", "models"]
LISTS += ["fine_tuning/jobs?metadata[note]=x", "webhook_endpoints"]
LISTS += ["fine_tuning/jobs/{job_id}/events", "fine_tuning/jobs/{job_id}/checkpoints"]


@pytest.mark.parametrize("after", ["unknown", "", "file-01HZZZZZZZZZZZZZZZZZZZZZZZ", "ü", "ftjob-1"])
@pytest.mark.parametrize("path", LISTS)
def test_every_list_rejects_an_unknown_cursor(
    path: str, after: str, resource_ids: dict[str, str], users: dict[str, ApiUser]
) -> None:
    path = path.format(**resource_ids)
    response = Client().get(
        f"/v1/{path}{'&' if '?' in path else '?'}after={after}",
        headers=users["alice"].headers,
    )
    assert response.status_code == 400, response.content
    assert response.json()["error"]["param"] == "after"


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
def test_another_users_cursor_is_unknown(
    path: str, name: str, resource_ids: dict[str, str], users: dict[str, ApiUser]
) -> None:
    for caller, status in (("alice", 200), ("bob", 400)):
        response = Client().get(
            f"/v1/{path}{'&' if '?' in path else '?'}after={resource_ids[name]}",
            headers=users[caller].headers,
        )
        assert response.status_code == status, response.content
        if status == 200:
            assert resource_ids[name] not in [row["id"] for row in response.json()["data"]]


def test_a_list_continues_after_a_deleted_file(stores: None, users: dict[str, ApiUser]) -> None:
    """This is what `for file in client.files.list(): client.files.delete(file.id)` does."""
    from jobs.store import access, tables

    bob = users["bob"]
    for row in access.list_datasets(bob.owner, 1000):
        row.delete()
    ids = []
    for _ in range(3):
        ids.append(tables.new_id("file"))
        tables.Dataset(bob.owner, ids[-1], name="a", status="ready").save()
    client = Client()
    after, seen = "", []
    while True:
        payload = client.get(f"/v1/files?limit=1{after}", headers=bob.headers).json()
        seen += [row["id"] for row in payload["data"]]
        if not payload["has_more"]:
            break
        assert client.delete(f"/v1/files/{seen[-1]}", headers=bob.headers).status_code == 200
        after = f"&after={seen[-1]}"
    assert seen == ids[::-1]


# ---- filters -----------------------------------------------------------------------------------


def list_ids(user: ApiUser, path: str) -> list[str]:
    """All IDs, page by page as the official client reads them: an empty page ends the list."""
    ids: list[str] = []
    after = ""
    while True:
        response = Client().get(f"/v1/{path}{after}", headers=user.headers)
        assert response.status_code == 200, response.content
        payload = response.json()
        ids += [row["id"] for row in payload["data"]]
        if not payload["has_more"] or not payload["data"]:
            return ids
        after = f"&after={payload['last_id']}"


@pytest.fixture
def job_ids(stores: None, users: dict[str, ApiUser]) -> Iterator[list[str]]:
    """5,100 jobs, of which only the first and the last have succeeded and have the metadata `team: blue`."""
    from jobs.store import tables
    from jobs.store.tables import Job

    bob = users["bob"]
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
def test_a_filter_finds_matches_among_thousands_of_jobs(
    job_ids: list[str], users: dict[str, ApiUser], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.store import access, tables

    bob, blue = users["bob"], [job_ids[-1], job_ids[0]]
    assert list_ids(bob, "fine_tuning/jobs?limit=100&metadata[team]=blue") == blue
    assert list_ids(bob, "fine_tuning/jobs?metadata[team]=blue&metadata[n]=0") == [job_ids[0]]
    for nothing in ("metadata[team]=green", "metadata[te]=blue", "metadata[team]=blue&metadata[n]=1"):
        assert list_ids(bob, f"fine_tuning/jobs?{nothing}") == []
    results = list_ids(bob, "files?purpose=fine-tune-results&limit=100")
    assert results == [id.replace("ftjob-", "file-results-") for id in blue]

    with tables.count_calls() as counter:  # many matches: one short read is enough
        reds = access.list_jobs(bob.owner, 20, metadata={"team": "red"})
    assert [job.job_id for job in reds] == job_ids[-2:-22:-1]
    assert (reds.has_more, tables.reads(counter)) == (True, 1)

    # Few matches: a search that has found something stops at the limit.
    monkeypatch.setattr(access, "SEARCH_LIMIT", 1000)
    with tables.count_calls() as counter:
        first = access.list_jobs(bob.owner, 20, metadata={"team": "blue"})
    assert [job.job_id for job in first] == blue[:1]
    assert first.has_more
    assert tables.reads(counter) == 4  # 100 + 200 + 400 + 800 rows
    assert list_ids(bob, "fine_tuning/jobs?metadata[team]=blue") == blue

"""Addresses that do not exist answer in OpenAI's shape and say what to use instead."""

from __future__ import annotations

import http.client
from typing import Any

import pytest
from django.conf import settings
from django.test import Client

from tests.api.conftest import Person

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
        ("POST", "/v1/embeddings", "no embeddings"),
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

"""Numbers longer than Python parses (it raises at 4,300 digits) are refused wherever a client can send one, never with an
internal error."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver, reverse

from accounts import api_keys
from accounts.models import User
from jobs.forms import NewJobForm
from llmtuner.body_limit import limit_body
from tests.factories import PASSWORD, browser_of, make_user
from tests.jobs.views.makers import make_dataset, make_job, make_model
from training.plan.config import FIELDS

LONG = "9" * 5000
PADDED = "0" * 11 + "1" * 4989  # starts like a small number
JSON = {"content_type": "application/json"}


def without_exceptions(client: Client) -> Client:
    client.raise_request_exception = False
    return client


@pytest.fixture
def browser(alice: User) -> Client:
    return without_exceptions(browser_of(alice))


def test_malformed_part_numbers_get_400(browser: Client) -> None:
    upload = browser.post(reverse("jobs:begin_upload"), {"name": "a.jsonl", "bytes": "9", "mark": "x"}).json()
    links = upload["url"].replace("parts/", "links/")
    for numbers in (LONG, PADDED, f"1,{LONG}", "x", "-1", "²", "1,,2"):
        response = browser.post(links, {"numbers": numbers})
        assert (response.status_code, list(response.json())) == (400, ["error"]), numbers[:9]
    for numbers in ("1", ""):
        assert browser.post(links, {"numbers": numbers}).status_code == 200


@pytest.mark.parametrize("line", [LONG, PADDED])
def test_a_long_line_number_is_refused(browser: Client, alice: User, line: str) -> None:
    dataset = make_dataset(alice.owner_id)
    response = browser.post(
        reverse("jobs:dataset_row", args=[dataset.dataset_id]), {"line": line}, follow=True
    )
    assert response.status_code == 200
    assert "Line: enter a line number" in response.content.decode()


def test_the_dataset_page_ignores_a_long_line_number(browser: Client, alice: User) -> None:
    address = reverse("jobs:dataset", args=[make_dataset(alice.owner_id).dataset_id])
    for line in (LONG, PADDED):
        assert browser.get(address, {"line": line, "as": line}).status_code == 200


@pytest.mark.parametrize("number", [LONG, PADDED, "1e400", "-" + LONG, "9" * 400])
def test_the_job_and_playground_forms_refuse_long_numbers(browser: Client, alice: User, number: str) -> None:
    dataset = make_dataset(alice.owner_id)
    values = dict.fromkeys([*NewJobForm.base_fields, *FIELDS], number) | {"dataset": dataset.dataset_id}
    for name in ("jobs:new_job", "jobs:estimate", "jobs:count_tokens"):
        assert browser.post(reverse(name), values).status_code < 500
    for field in FIELDS:
        fields = {"dataset": dataset.dataset_id, "base": "starter", field: number}
        assert browser.post(reverse("jobs:estimate"), fields).status_code < 500, field
    fields = {"model": "starter", "prompt": "a", "max_tokens": number, "temperature": number, "top_p": number}
    assert browser.post(reverse("jobs:playground"), fields).status_code < 500


def urls(patterns: list[Any], before: str = "") -> Iterator[str]:
    """Every URL path of the studio, with a long number for each of its parameters."""
    for pattern in patterns:
        if isinstance(pattern, URLResolver):
            yield from urls(pattern.url_patterns, before + str(pattern.pattern))
        elif isinstance(pattern, URLPattern) and not str(pattern.pattern).startswith("^"):
            path = before + str(pattern.pattern)
            for kind in pattern.pattern.converters:
                path = path.replace(f":{kind}>", ">").replace(f"<{kind}>", LONG)
            for name in ("int", "str", "path", "slug", "uuid"):
                for kind in pattern.pattern.converters:
                    path = path.replace(f"<{name}:{kind}>", LONG)
            yield "/" + path.replace("^", "").replace("$", "")


@pytest.mark.slow
def test_no_url_fails_on_a_long_number(sam: User, alice: User) -> None:
    """Requested by staff, who may open all of them, with long numbers in the path and in all usual parameters."""
    paths = sorted(set(urls(get_resolver().url_patterns)))
    assert len(paths) > 100
    query = dict.fromkeys(
        ["after", "line", "as", "limit", "page", "p", "q", "id", "month", "numbers", "step"], LONG
    )
    failed = []
    for path in paths:
        browser = without_exceptions(browser_of(sam))
        for response in (
            browser.get(path, query),
            browser.post(path, query | {"credential": f'{{"id": {LONG}}}'}),
        ):
            if response.status_code >= 500:
                failed.append(
                    (response.request["REQUEST_METHOD"], path.replace(LONG, "N"), response.status_code)
                )
    assert not failed


BODIES: dict[str, str] = {
    "long numbers": f'{{"email": {LONG}, "password": {LONG}, "code": {LONG}, "refresh_token": {LONG}, "sessions": [{LONG}]}}',
    "long numbers that can be parsed": f'{{"sessions": [{"9" * 400}], "id": {"9" * 400}, "authenticators": [{"9" * 400}]}}',
    "deeply nested arrays": "[" * 100_000,
    "deeply nested objects": '{"email": ' * 50_000,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("body", BODIES)
def test_no_call_of_the_sign_in_api_fails(alice: User, body: str) -> None:
    alice.set_password(PASSWORD)
    alice.save()
    sign_in = {"email": alice.email, "password": PASSWORD}
    tokens = Client().post("/_allauth/app/v1/auth/login", sign_in, **JSON).json()["meta"]
    paths = [path for path in set(urls(get_resolver().url_patterns)) if "/_allauth/app/" in path]
    assert len(paths) > 20
    failed = []
    for path in sorted(paths):
        for headers in ({}, {"x-session-token": tokens["session_token"]}):
            for method in ("post", "put", "patch", "delete"):
                request: Callable[..., Any] = getattr(without_exceptions(Client()), method)
                response = request(path, BODIES[body], headers=headers, **JSON)
                if response.status_code >= 500:
                    failed.append((method, path.replace(LONG, "N"), response.status_code))
    assert not failed


def test_the_api_refuses_long_numbers(transactional_db: None) -> None:
    alice = make_user("alice")
    _, key = api_keys.create(alice, "all", list(api_keys.SCOPES))
    client, headers = without_exceptions(Client()), {"authorization": f"Bearer {key}"}
    job, model = make_job(alice.owner_id, "succeeded"), make_model(alice.owner_id)
    event = f"ftevent-{job.job_id.removeprefix('ftjob-')}-{LONG}"
    for path, query in (
        ("files", {"limit": LONG}),
        ("fine_tuning/jobs", {"limit": LONG, "after": LONG}),
        (f"fine_tuning/jobs/{job.job_id}/events", {"after": event}),
        (f"fine_tuning/jobs/{job.job_id}/events", {"limit": PADDED}),
        (f"fine_tuning/jobs/{job.job_id}/checkpoints", {"limit": LONG}),
        (f"models/{model.model_id}:ckpt-step-{LONG}", {}),
    ):
        assert 400 <= client.get(f"/v1/{path}", query, headers=headers).status_code < 500, path
    for name, body in {
        "fine_tuning/jobs": '{"model": "starter", "training_file": "file-1", "seed": %s}',
        "completions": '{"model": "starter", "prompt": "a", "max_tokens": %s}',
        "chat/completions": '{"model": "starter", "messages": [], "llmtuner": {"top_k": %s}}',
        "uploads": '{"bytes": %s, "filename": "a.jsonl", "purpose": "fine-tune"}',
    }.items():
        response = client.post(f"/v1/{name}", body % LONG, headers=headers, **JSON)
        assert response.status_code == 400, name


def test_a_huge_content_length_is_refused() -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("the request must not reach the app")

    async def status_for(length: str) -> int:
        sent.clear()
        headers = [(b"content-length", length.encode())]
        scope = {"type": "http", "path": "/jobs/", "headers": headers}

        async def receive() -> Any:
            raise AssertionError("the body must not be read")

        async def send(message: Any) -> None:
            sent.append(message)

        await limit_body(app)(scope, receive, send)
        return int(sent[0]["status"])

    assert asyncio.run(status_for(LONG)) == 413
    assert asyncio.run(status_for("9" * 30)) == 413


def test_a_huge_byte_range_is_clamped(alice: User) -> None:
    from jobs.views.objects import byte_range

    assert byte_range(f"bytes=0-{LONG}", 10) == (0, 10)

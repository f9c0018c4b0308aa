"""Numbers longer than Python reads (it raises at 4,300 digits), wherever people can send one: refused, never an error of ours."""

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
PADDED = "0" * 11 + "1" * 4989  # its beginning looks like a small number
JSON = {"content_type": "application/json"}


def quiet(client: Client) -> Client:
    client.raise_request_exception = False
    return client


@pytest.fixture
def browser(alice: User) -> Client:
    return quiet(browser_of(alice))


def test_malformed_part_numbers_get_400(browser: Client) -> None:
    begun = browser.post(reverse("jobs:begin_upload"), {"name": "a.jsonl", "bytes": "9", "mark": "x"}).json()
    links = begun["url"].replace("parts/", "links/")
    for numbers in (LONG, PADDED, f"1,{LONG}", "x", "-1", "²", "1,,2"):
        answer = browser.post(links, {"numbers": numbers})
        assert (answer.status_code, list(answer.json())) == (400, ["error"]), numbers[:9]
    for numbers in ("1", ""):
        assert browser.post(links, {"numbers": numbers}).status_code == 200


@pytest.mark.parametrize("line", [LONG, PADDED])
def test_a_long_line_number_is_refused(browser: Client, alice: User, line: str) -> None:
    dataset = make_dataset(alice.owner_id)
    answer = browser.post(reverse("jobs:dataset_row", args=[dataset.dataset_id]), {"line": line}, follow=True)
    assert answer.status_code == 200
    assert "Line: enter a line number" in answer.content.decode()


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
        sent = {"dataset": dataset.dataset_id, "base": "starter", field: number}
        assert browser.post(reverse("jobs:estimate"), sent).status_code < 500, field
    asked = {"model": "starter", "prompt": "a", "max_tokens": number, "temperature": number, "top_p": number}
    assert browser.post(reverse("jobs:playground"), asked).status_code < 500


def addresses(patterns: list[Any], before: str = "") -> Iterator[str]:
    """Every address of the studio, with a long number wherever one stands in it."""
    for pattern in patterns:
        if isinstance(pattern, URLResolver):
            yield from addresses(pattern.url_patterns, before + str(pattern.pattern))
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
    """Asked by staff, who reach all of them, with a number in the path and in every usual parameter."""
    found = sorted(set(addresses(get_resolver().url_patterns)))
    assert len(found) > 100
    query = dict.fromkeys(
        ["after", "line", "as", "limit", "page", "p", "q", "id", "month", "numbers", "step"], LONG
    )
    broken = []
    for address in found:
        browser = quiet(browser_of(sam))
        for answer in (
            browser.get(address, query),
            browser.post(address, query | {"credential": f'{{"id": {LONG}}}'}),
        ):
            if answer.status_code >= 500:
                broken.append(
                    (answer.request["REQUEST_METHOD"], address.replace(LONG, "N"), answer.status_code)
                )
    assert not broken


BODIES: dict[str, str] = {
    "a number": f'{{"email": {LONG}, "password": {LONG}, "code": {LONG}, "refresh_token": {LONG}, "sessions": [{LONG}]}}',
    "a number that can be read": f'{{"sessions": [{"9" * 400}], "id": {"9" * 400}, "authenticators": [{"9" * 400}]}}',
    "deep": "[" * 100_000,
    "deep in an object": '{"email": ' * 50_000,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("body", BODIES)
def test_no_call_of_the_sign_in_api_fails(alice: User, body: str) -> None:
    alice.set_password(PASSWORD)
    alice.save()
    sign_in = {"email": alice.email, "password": PASSWORD}
    tokens = Client().post("/_allauth/app/v1/auth/login", sign_in, **JSON).json()["meta"]
    found = [
        address for address in set(addresses(get_resolver().url_patterns)) if "/_allauth/app/" in address
    ]
    assert len(found) > 20
    broken = []
    for address in sorted(found):
        for headers in ({}, {"x-session-token": tokens["session_token"]}):
            for method in ("post", "put", "patch", "delete"):
                ask: Callable[..., Any] = getattr(quiet(Client()), method)
                answer = ask(address, BODIES[body], headers=headers, **JSON)
                if answer.status_code >= 500:
                    broken.append((method, address.replace(LONG, "N"), answer.status_code))
    assert not broken


def test_the_api_refuses_long_numbers(transactional_db: None) -> None:
    alice = make_user("alice")
    _, key = api_keys.create(alice, "all", list(api_keys.SCOPES))
    client, headers = quiet(Client()), {"authorization": f"Bearer {key}"}
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
        answer = client.post(f"/v1/{name}", body % LONG, headers=headers, **JSON)
        assert answer.status_code == 400, name


def test_a_huge_content_length_is_refused() -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("nothing of it may be read")

    async def ask(length: str) -> int:
        sent.clear()
        headers = [(b"content-length", length.encode())]
        scope = {"type": "http", "path": "/jobs/", "headers": headers}

        async def send(message: Any) -> None:
            sent.append(message)

        await limit_body(app)(scope, None, send)  # type: ignore[arg-type]
        return int(sent[0]["status"])

    assert asyncio.run(ask(LONG)) == 413
    assert asyncio.run(ask("9" * 30)) == 413


def test_a_huge_byte_range_is_clamped(alice: User) -> None:
    from jobs.views.objects import byte_range

    assert byte_range(f"bytes=0-{LONG}", 10) == (0, 10)

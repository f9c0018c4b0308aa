"""Tenant isolation: every URL × every method × every other caller, generated from the URL resolver so that no URL is
forgotten.

Bob, anonymous callers, and keys without permission get exactly the response for an unknown ID, and nothing of Alice's
changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from allauth.headless.tokens.strategies.jwt import internal
from django.conf import settings
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client
from django.urls import URLResolver, get_resolver

from tests.jobs.api.conftest import ApiUser, make_api_user, make_session
from tests.jobs.api.resources import CANARY, create_resources, snapshot

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("stores")]
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

# The kind of each URL. A URL in none of these sets fails the build: add it to the right one.
OBJECTS = {  # one resource of one user
    "v1/files/<file_id>",
    "v1/files/<file_id>/content",
    "v1/files/<file_id>/versions",
    "v1/files/<file_id>/split",
    "v1/files/<file_id>/merge",
    "v1/uploads/<upload_id>/parts",
    "v1/uploads/<upload_id>/complete",
    "v1/uploads/<upload_id>/cancel",
    "v1/fine_tuning/jobs/<job_id>",
    "v1/fine_tuning/jobs/<job_id>/cancel",
    "v1/fine_tuning/jobs/<job_id>/pause",
    "v1/fine_tuning/jobs/<job_id>/resume",
    "v1/fine_tuning/jobs/<job_id>/events",
    "v1/fine_tuning/jobs/<job_id>/checkpoints",
    "v1/models/<path:model>",
    "v1/webhook_endpoints/<webhook_endpoint_id>",
    "datasets/uploads/<str:upload_id>/parts/<int:number>/",
    "datasets/uploads/<str:upload_id>/links/",
    "datasets/uploads/<str:upload_id>/complete/",
    "datasets/uploads/<str:upload_id>/cancel/",
    "datasets/<str:dataset_id>/",
    "datasets/<str:dataset_id>/report/",
    "datasets/<str:dataset_id>/read-as/",
    "datasets/<str:dataset_id>/row/",
    "datasets/<str:dataset_id>/columns/",
    "datasets/<str:dataset_id>/delete/",
    "datasets/<str:dataset_id>/fix/",
    "datasets/<str:dataset_id>/rows/",
    "datasets/<str:dataset_id>/rows/<str:row>/",
    "datasets/<str:dataset_id>/draft/",
    "datasets/<str:dataset_id>/merge/",
    "jobs/<str:job_id>/",
    "jobs/<str:job_id>/edit/",
    "jobs/<str:job_id>/actions/",
    "jobs/<str:job_id>/pause/",
    "jobs/<str:job_id>/resume/",
    "jobs/<str:job_id>/cancel/",
    "jobs/<str:job_id>/retry/",
    "jobs/<str:job_id>/rename/",
    "jobs/<str:job_id>/delete/",
    "jobs/<str:job_id>/live",
    "jobs/<str:job_id>/metrics.csv",
    "jobs/<str:job_id>/log.txt",
    "models/<path:model_id>/",
    "models/<path:model_id>/download.zip",
    "models/<path:model_id>/names/",
    "models/<path:model_id>/delete/",
    "notifications/<str:webhook_endpoint_id>/test/",
    "notifications/<str:webhook_endpoint_id>/delete/",
    "account/keys/<int:pk>/revoke/",
    "account/devices/<int:pk>/sign-out/",
    "accounts/2fa/webauthn/keys/<int:pk>/remove/",
    "accounts/2fa/webauthn/keys/<int:pk>/edit/",
    "objects/<str:token>/<str:filename>",  # a signed link grants access by itself; the tokens here are not signed
}
OWN = {  # shows or creates the caller's own resources
    "",
    "v1/files",
    "v1/uploads",
    "v1/fine_tuning/jobs",
    "v1/models",
    "v1/webhook_endpoints",
    "v1/completions",
    "v1/chat/completions",
    "datasets/",
    "datasets/upload/",
    "datasets/uploads/",
    "jobs/",
    "jobs/new/",
    "jobs/new/estimate/",
    "jobs/estimates/",
    "jobs/new/base/",
    "jobs/new/base/remove/",
    "jobs/new/count/",
    "models/",
    "playground/",
    "playground/stream",
    "notifications/",
    "notifications/email/",
    "account/",
    "account/keys/",
    "account/export/",
    "account/delete/",
}
PUBLIC = {"v1/", "v1/docs", "v1/openapi.json"}
STAFF = ("admin/",)
ALLAUTH = ("accounts/", "_allauth/app/v1/")


def iter_routes(patterns: list[Any], before: str = "") -> Iterator[str]:
    for pattern in patterns:
        route = before + str(pattern.pattern)
        if isinstance(pattern, URLResolver):
            yield from iter_routes(pattern.url_patterns, route)
        else:
            yield route


ROUTES = sorted(set(iter_routes(get_resolver().url_patterns)))


def route_kind(route: str) -> str | None:
    if route in OBJECTS:
        return "object"
    if route in OWN:
        return "own"
    if route in PUBLIC:
        return "open"
    if route.startswith(STAFF):
        return "staff"
    return "allauth" if route.startswith(ALLAUTH) else None


def test_every_url_is_classified() -> None:
    assert not [route for route in ROUTES if route_kind(route) is None], "classify these routes in this file"
    assert not (OBJECTS | OWN | PUBLIC) - set(ROUTES), (
        "these routes no longer exist: remove them from this file"
    )


UNKNOWN_IDS = {
    "file_id": "file-01HZZZZZZZZZZZZZZZZZZZZZZZ",
    "dataset_id": "file-01HZZZZZZZZZZZZZZZZZZZZZZZ",
    "job_id": "ftjob-01HZZZZZZZZZZZZZZZZZZZZZZZ",
    "model": "ft:starter:nobody:none:zzzzzzzz",
    "model_id": "ft:starter:nobody:none:zzzzzzzz",
    "upload_id": "upload-01HZZZZZZZZZZZZZZZZZZZZZZZ",
    "webhook_endpoint_id": "hook-01HZZZZZZZZZZZZZZZZZZZZZZZ",
    "pk": "987654321",
    "owner": "user-NOBODY",
}


def path_for(route: str, ids: dict[str, str]) -> str:
    """A path for the route: our IDs by parameter name, placeholders for parameters of allauth and the admin."""
    route = re.sub(r"\(\?P<(\w+)>[^)]*\)", lambda result: {"app_label": "jobs"}.get(result[1], "x"), route)
    route = route.replace("^", "").replace("$", "")
    return "/" + re.sub(r"<(?:\w+:)?(\w+)>", lambda result: ids.get(result[1], "1"), route)


# ---- callers ----------------------------------------------------------------------------------


CALLERS = (
    "Bob's cookie",
    "Bob's key",
    "Bob's token",
    "anonymous",
    "Alice's read-only key",
    "Alice's expired key",
)


def client_as(caller: str, users: dict[str, ApiUser]) -> Client:
    alice, bob = users["alice"], users["bob"]
    client = Client(raise_request_exception=False)
    credential = ""
    if caller == "Bob's cookie":
        client.cookies[settings.SESSION_COOKIE_NAME] = make_session(bob.user).session_key
    elif caller == "Bob's token":
        credential = internal.create_access_token(bob.user, make_session(bob.user), {})
    else:
        credential = {
            "Bob's key": bob.key,
            "Alice's read-only key": alice.reader,
            "Alice's expired key": alice.expired,
        }.get(caller, "")
    if credential:
        client.defaults["HTTP_AUTHORIZATION"] = f"Bearer {credential}"
    return client


def send(client: Client, method: str, path: str, ids: dict[str, str]) -> tuple[int, bytes]:
    """With the IDs also in the body, in every field that takes one."""
    options: dict[str, Any] = {}
    if method in {"POST", "PUT", "PATCH", "DELETE"}:
        fields = {
            "model": ids["model"],
            "dataset": ids["dataset_id"],
            "prompt": "hello",
            "base": "starter",
            "name": "taken",
            "aliases": "ft:taken:by::bob",
        }
        if path.startswith("/v1/"):
            api_fields = {
                "training_file": ids["file_id"],
                "file_id": ids["file_id"],
                "messages": [{"role": "user", "content": "hello"}],
                "max_tokens": 1,
            }
            api_fields |= {
                "part_ids": ["part-1"],
                "bytes": 3,
                "filename": "f",
                "purpose": "fine-tune",
                "mime_type": "text/plain",
            }
            options = {"data": {**fields, **api_fields}, "content_type": "application/json"}
            if path.endswith("/parts") and method == "POST":
                options = {"data": {"data": SimpleUploadedFile("part", b"abc")}}
        elif method == "POST":
            options = {"data": {**fields, "name": "taken"}}
    response = (
        client.generic(method, path) if not options else getattr(client, method.lower())(path, **options)
    )
    body = b"" if response.streaming else response.content
    for value in sorted(
        {v for v in {*ids.values(), *UNKNOWN_IDS.values()} if len(v) > 8}, key=len, reverse=True
    ):
        body = body.replace(value.encode(), b"ID").replace(value.replace(":", "%3A").encode(), b"ID")
    body = re.sub(rb'req_[0-9a-f]{24}|name="csrfmiddlewaretoken" value="\w+"|hx-headers=\S+', b"", body)
    return response.status_code, body + str(response.get("Location", "")).partition("?")[0].replace(
        path, "PATH"
    ).encode()


@pytest.fixture
def users_and_ids(transactional_db: None) -> tuple[dict[str, ApiUser], dict[str, str]]:
    users = {name: make_api_user(name) for name in ("alice", "bob")}
    return users, create_resources(users["alice"])


@pytest.mark.parametrize("caller", CALLERS)
def test_alices_resources_do_not_exist_for_others(caller: str, users_and_ids: Any) -> None:
    users, ids = users_and_ids
    before = snapshot(users["alice"], ids)
    failures: list[tuple[Any, ...]] = []
    for route in sorted(OBJECTS):
        is_api = route.startswith("v1/")
        for method in METHODS:
            for_alices_ids = send(client_as(caller, users), method, path_for(route, ids), ids)
            status, body = for_alices_ids
            if caller == "Alice's read-only key" and is_api:
                if method in {"GET", "HEAD"} and status not in {200, 405}:
                    failures.append((route, method, status, "a read key must be able to read"))
                if method not in {"GET", "HEAD"} and status not in {403, 405}:
                    failures.append((route, method, status, "a read key must not be able to write"))
                continue
            # Without permission a caller cannot even learn whether a URL exists: the API sends 401, pages the sign-in.
            if status == 405:
                continue
            # OPTIONS: allauth's views list their methods.
            if status not in {302, 401, 403, 404} and method != "OPTIONS":
                failures.append((route, method, status, "access granted"))
            if CANARY.encode() in body:
                failures.append((route, method, status, "canary leaked"))
            for_unknown_ids = send(
                client_as(caller, users), method, path_for(route, UNKNOWN_IDS), UNKNOWN_IDS
            )
            if for_alices_ids != for_unknown_ids:
                failures.append(
                    (route, method, for_alices_ids[0], for_unknown_ids[0], "differs from an unknown ID")
                )
    assert not failures, "\n".join(map(str, failures))
    assert snapshot(users["alice"], ids) == before


@pytest.mark.parametrize("caller", CALLERS)
def test_lists_and_forms_of_others_contain_nothing_of_alices(caller: str, users_and_ids: Any) -> None:
    users, ids = users_and_ids
    before = snapshot(users["alice"], ids)
    failures: list[tuple[Any, ...]] = []
    for route in sorted(OWN | PUBLIC):
        for method in METHODS:
            status, body = send(client_as(caller, users), method, path_for(route, ids), ids)
            if status >= 500:
                failures.append((route, method, status, "server error"))
            if caller == "Alice's read-only key" and route.startswith("v1/"):
                if method == "POST" and status not in {403, 404, 405}:
                    failures.append((route, method, status, "a read key must not be able to write"))
                continue
            if CANARY.encode() in body:
                failures.append((route, method, status, "canary leaked"))
            no_access = caller in {"Bob's cookie", "anonymous", "Alice's expired key"} and route in OWN
            if no_access and route.startswith("v1/") and status not in {401, 405}:
                failures.append((route, method, status, "access granted"))
    assert not failures, "\n".join(map(str, failures))
    assert snapshot(users["alice"], ids) == before


@pytest.mark.parametrize("caller", ["Bob's cookie", "Bob's key", "anonymous", "Alice's read-only key"])
def test_admin_and_allauth_pages_contain_nothing_of_alices(caller: str, users_and_ids: Any) -> None:
    users, ids = users_and_ids
    before = snapshot(users["alice"], ids)
    failures: list[tuple[Any, ...]] = []
    for route in ROUTES:
        kind = route_kind(route)
        if kind not in {"staff", "allauth"}:
            continue
        client = client_as(caller, users)
        for method in METHODS:
            status, body = send(client, method, path_for(route, ids), ids)
            if status >= 500 or CANARY.encode() in body:
                failures.append((route, method, status))
            if (
                kind == "staff"
                and status == 200
                and route not in {"admin/login/", "admin/jsi18n/"}
                and method != "OPTIONS"
            ):
                failures.append((route, method, status, "access granted"))
    assert not failures, "\n".join(map(str, failures))
    assert snapshot(users["alice"], ids) == before

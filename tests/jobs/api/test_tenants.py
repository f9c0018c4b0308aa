"""Every address × every verb × everybody else: generated from the URL resolver, so that no address is forgotten.

Bob, strangers and keys that may not get the very bytes that an id nobody has would get, and nothing of Alice's moves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
from allauth.headless.tokens.strategies.jwt import internal
from django.conf import settings
from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client
from django.urls import URLResolver, get_resolver

from tests.jobs.api.conftest import Person, make_person
from tests.jobs.api.things import CANARY, everything_of, put_things

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("stores")]
VERBS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

# What each address is. An address that stands in none of these lists fails the build: say here whose it is.
OBJECTS = {  # one thing of one person
    "v1/files/<file_id>",
    "v1/files/<file_id>/content",
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
    "objects/<str:token>/<str:filename>",  # a signed link is its own right; these tokens are not signed
}
OWN = {  # shows or makes things of whoever asks
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
OPEN = {"v1/", "v1/docs", "v1/openapi.json"}
STAFF = ("admin/",)
ALLAUTH = ("accounts/", "_allauth/app/v1/")


def walk(patterns: list[Any], before: str = "") -> Iterator[str]:
    for pattern in patterns:
        route = before + str(pattern.pattern)
        if isinstance(pattern, URLResolver):
            yield from walk(pattern.url_patterns, route)
        else:
            yield route


ROUTES = sorted(set(walk(get_resolver().url_patterns)))


def kind_of(route: str) -> str | None:
    if route in OBJECTS:
        return "object"
    if route in OWN:
        return "own"
    if route in OPEN:
        return "open"
    if route.startswith(STAFF):
        return "staff"
    return "allauth" if route.startswith(ALLAUTH) else None


def test_every_address_stands_in_the_matrix():
    assert not [route for route in ROUTES if kind_of(route) is None], "say in this file whose these are"
    assert not (OBJECTS | OWN | OPEN) - set(ROUTES), "these are gone: take them out of this file"


NOBODYS = {
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


def path_of(route: str, ids: dict[str, str]) -> str:
    """A path for the route: our ids by the parameter's name, anything for allauth's and the admin's own."""
    route = re.sub(r"\(\?P<(\w+)>[^)]*\)", lambda result: {"app_label": "jobs"}.get(result[1], "x"), route)
    route = route.replace("^", "").replace("$", "")
    return "/" + re.sub(r"<(?:\w+:)?(\w+)>", lambda result: ids.get(result[1], "1"), route)


# ---- who asks ----------------------------------------------------------------------------------


def session_for(user: Any) -> Any:
    session = import_module(settings.SESSION_ENGINE).SessionStore()
    session[SESSION_KEY] = str(user.pk)
    session[BACKEND_SESSION_KEY] = settings.AUTHENTICATION_BACKENDS[0]
    session[HASH_SESSION_KEY] = user.get_session_auth_hash()
    session.save()
    return session


WHO = ("Bob's cookie", "Bob's key", "Bob's token", "nobody", "Alice's reader", "Alice's expired key")


def as_who(who: str, people: dict[str, Person]) -> Client:
    alice, bob = people["alice"], people["bob"]
    client = Client(raise_request_exception=False)
    credential = ""
    if who == "Bob's cookie":
        client.cookies[settings.SESSION_COOKIE_NAME] = session_for(bob.user).session_key
    elif who == "Bob's token":
        credential = internal.create_access_token(bob.user, session_for(bob.user), {})
    else:
        credential = {
            "Bob's key": bob.key,
            "Alice's reader": alice.reader,
            "Alice's expired key": alice.expired,
        }.get(who, "")
    if credential:
        client.defaults["HTTP_AUTHORIZATION"] = f"Bearer {credential}"
    return client


def request_once(client: Client, verb: str, path: str, ids: dict[str, str]) -> tuple[int, bytes]:
    """With every id also in the body, under each name that takes one."""
    options: dict[str, Any] = {}
    if verb in {"POST", "PUT", "PATCH", "DELETE"}:
        fields = {
            "model": ids["model"],
            "dataset": ids["dataset_id"],
            "prompt": "hello",
            "base": "starter",
            "name": "taken",
            "aliases": "ft:taken:by::bob",
        }
        if path.startswith("/v1/"):
            more = {
                "training_file": ids["file_id"],
                "messages": [{"role": "user", "content": "hello"}],
                "max_tokens": 1,
            }
            more |= {
                "part_ids": ["part-1"],
                "bytes": 3,
                "filename": "f",
                "purpose": "fine-tune",
                "mime_type": "text/plain",
            }
            options = {"data": {**fields, **more}, "content_type": "application/json"}
            if path.endswith("/parts") and verb == "POST":
                options = {"data": {"data": SimpleUploadedFile("part", b"abc")}}
        elif verb == "POST":
            options = {"data": {**fields, "name": "taken"}}
    answer = client.generic(verb, path) if not options else getattr(client, verb.lower())(path, **options)
    body = b"" if answer.streaming else answer.content
    for value in sorted({v for v in {*ids.values(), *NOBODYS.values()} if len(v) > 8}, key=len, reverse=True):
        body = body.replace(value.encode(), b"ID").replace(value.replace(":", "%3A").encode(), b"ID")
    body = re.sub(rb'req_[0-9a-f]{24}|name="csrfmiddlewaretoken" value="\w+"|hx-headers=\S+', b"", body)
    return answer.status_code, body + str(answer.get("Location", "")).partition("?")[0].replace(
        path, "PATH"
    ).encode()


@pytest.fixture
def matrix(transactional_db: None) -> tuple[dict[str, Person], dict[str, str]]:
    people = {name: make_person(name) for name in ("alice", "bob")}
    return people, put_things(people["alice"])


@pytest.mark.parametrize("who", WHO)
def test_what_is_alices_does_not_exist_for_others(who: str, matrix: Any):
    people, ids = matrix
    before = everything_of(people["alice"], ids)
    wrong = []
    for route in sorted(OBJECTS):
        is_call = route.startswith("v1/")
        for verb in VERBS:
            hers = request_once(as_who(who, people), verb, path_of(route, ids), ids)
            status, body = hers
            if who == "Alice's reader" and is_call:
                if verb in {"GET", "HEAD"} and status not in {200, 405}:
                    wrong.append((route, verb, status, "a reader must read"))
                if verb not in {"GET", "HEAD"} and status not in {403, 405}:
                    wrong.append((route, verb, status, "a reader must not write"))
                continue
            # Without a right nobody learns even whether there is such an address: 401 in calls, the sign-in for pages.
            if status == 405:
                continue
            if status not in {302, 401, 403, 404} and verb != "OPTIONS":  # allauth's views tell their verbs
                wrong.append((route, verb, status, "let in"))
            if CANARY.encode() in body:
                wrong.append((route, verb, status, "told"))
            nobodys = request_once(as_who(who, people), verb, path_of(route, NOBODYS), NOBODYS)
            if hers != nobodys:
                wrong.append((route, verb, hers[0], nobodys[0], "told apart from an id that nobody has"))
    assert not wrong, "\n".join(map(str, wrong))
    assert everything_of(people["alice"], ids) == before


@pytest.mark.parametrize("who", WHO)
def test_lists_and_forms_of_others_hold_nothing_of_hers(who: str, matrix: Any):
    people, ids = matrix
    before = everything_of(people["alice"], ids)
    wrong = []
    for route in sorted(OWN | OPEN):
        for verb in VERBS:
            status, body = request_once(as_who(who, people), verb, path_of(route, ids), ids)
            if status >= 500:
                wrong.append((route, verb, status, "broke"))
            if who == "Alice's reader" and route.startswith("v1/"):
                if verb == "POST" and status not in {403, 404, 405}:
                    wrong.append((route, verb, status, "a reader must not write"))
                continue
            if CANARY.encode() in body:
                wrong.append((route, verb, status, "told"))
            outside = who in {"Bob's cookie", "nobody", "Alice's expired key"} and route in OWN
            if outside and route.startswith("v1/") and status not in {401, 405}:
                wrong.append((route, verb, status, "let in"))
    assert not wrong, "\n".join(map(str, wrong))
    assert everything_of(people["alice"], ids) == before


@pytest.mark.parametrize("who", ["Bob's cookie", "Bob's key", "nobody", "Alice's reader"])
def test_the_admin_and_allauths_pages_hold_nothing_of_hers(who: str, matrix: Any):
    people, ids = matrix
    before = everything_of(people["alice"], ids)
    wrong = []
    for route in ROUTES:
        kind = kind_of(route)
        if kind not in {"staff", "allauth"}:
            continue
        client = as_who(who, people)
        for verb in VERBS:
            status, body = request_once(client, verb, path_of(route, ids), ids)
            if status >= 500 or CANARY.encode() in body:
                wrong.append((route, verb, status))
            if (
                kind == "staff"
                and status == 200
                and route not in {"admin/login/", "admin/jsi18n/"}
                and verb != "OPTIONS"
            ):
                wrong.append((route, verb, status, "let in"))
    assert not wrong, "\n".join(map(str, wrong))
    assert everything_of(people["alice"], ids) == before

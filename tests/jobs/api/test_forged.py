"""Requests that another site makes a signed-in browser send: no form is taken, no call of `/v1` honours a cookie, and
nobody is led to another site."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import pytest
from django.conf import settings
from django.test import Client

from tests.jobs.api.conftest import Person, make_person
from tests.jobs.api.test_tenants import ROUTES, path_of, session_for
from tests.jobs.api.things import everything_of, put_things

pytestmark = pytest.mark.usefixtures("stores")
EVIL = "https://evil.example"
TOKEN = "a" * 32
OFF = {"accounts/google/login/token/"}  # there is no Google in tests: nothing is there to be asked


@pytest.fixture
def alice(transactional_db: None) -> Person:
    return make_person("alice")


def browser_of(alice: Person) -> Client:
    client = Client(enforce_csrf_checks=True, raise_request_exception=False)
    client.cookies[settings.SESSION_COOKIE_NAME] = session_for(alice.user).session_key
    return client


@pytest.mark.parametrize("how", ["no token", "a token, but from another site", "plain text"])
def test_no_form_is_taken_from_another_site(alice: Person, how: str):
    ids = put_things(alice)
    before = everything_of(alice, ids)
    browser, options = browser_of(alice), {}
    if how == "a token, but from another site":
        browser.cookies[settings.CSRF_COOKIE_NAME] = TOKEN
        options = {"headers": {"Origin": EVIL, "X-CSRFToken": TOKEN}}
    if how == "plain text":
        options = {"content_type": "text/plain"}
    taken = []
    for route in ROUTES:
        if route.startswith(("v1/", "_allauth/")):  # these know no cookies
            continue
        for verb in ("post", "put", "patch", "delete"):
            answer = getattr(browser, verb)(path_of(route, ids), "name=taken", **{"content_type": "application/x-www-form-urlencoded", **options})  # fmt: skip
            if answer.status_code != (404 if route in OFF else 403):
                taken.append((route, verb, answer.status_code))
    assert not taken
    assert everything_of(alice, ids) == before


def test_programs_doors_honour_no_cookie(alice: Person):
    ids = put_things(alice)
    before = everything_of(alice, ids)
    taken = []
    for route in ROUTES:
        if route.startswith("v1/") and route not in {"v1/", "v1/docs", "v1/openapi.json"}:
            for verb in ("get", "post", "delete"):
                answer = getattr(browser_of(alice), verb)(path_of(route, ids))
                if answer.status_code not in {401, 405}:
                    taken.append((route, verb, answer.status_code))
    assert not taken
    assert everything_of(alice, ids) == before


ELSEWHERE = [
    "https://evil.example", "http://evil.example/", "HTTPS://evil.example", "//evil.example", "///evil.example",
    "////evil.example", "/\\evil.example", "\\/evil.example", "\\\\evil.example", "/\\/evil.example", "https:evil.example",
    "https:/evil.example", "https:///evil.example", "https:\\\\evil.example", "javascript:alert(1)", "JaVaScRiPt:alert(1)",
    "java\tscript:alert(1)", "\tjavascript:alert(1)", " https://evil.example", "\thttps://evil.example",
    "\nhttps://evil.example", "\x00https://evil.example", "data:text/html,x", "vbscript:x", "file:///etc/passwd",
    "ftp://evil.example", "https://testserver@evil.example", "https://testserver:x@evil.example/",
    "https://testserver.evil.example", "https://evil.example#testserver", "https://evil.example?testserver",
    "https://evil.example\\@testserver", "http://[::1]@evil.example", "//evil.example/%2f..", "/%09/evil.example",
    "/\t/evil.example", "/\n/evil.example", "//\tevil.example", "https://evil。example", "https://ｅvil.example",
]  # fmt: skip


@pytest.mark.parametrize("address", ["/accounts/login/", "/accounts/signup/"])
def test_nobody_is_led_to_another_site(alice: Person, address: str):
    here: Any = browser_of(alice).get(address, {"next": "/account/"})
    assert "/account/" in here.get("Location", "") + here.content.decode()
    wrong = []
    for target in ELSEWHERE:
        answer: Any = browser_of(alice).get(address, {"next": target})
        where = answer.get("Location", "")
        there = urlsplit(where.replace("\\", "/").strip())
        if there.scheme or there.netloc or where.startswith(("//", "/\\", "/\t", "/\n")):
            wrong.append((target, where))
        if f'value="{target}"' in answer.content.decode():
            wrong.append((target, "kept in the form"))
    assert not wrong

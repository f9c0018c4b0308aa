"""Cross-site request forgery and open redirects: no form from another site is accepted, `/v1` ignores cookies, and no
redirect leads to another site."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import pytest
from django.conf import settings
from django.test import Client

from tests.jobs.api.conftest import ApiUser, make_api_user, make_session
from tests.jobs.api.resources import create_resources, snapshot
from tests.jobs.api.test_tenants import ROUTES, path_for

pytestmark = pytest.mark.usefixtures("stores")
ATTACKER = "https://evil.example"
TOKEN = "a" * 32
DISABLED = {"accounts/google/login/token/"}  # Google sign-in is not configured in tests


@pytest.fixture
def alice(transactional_db: None) -> ApiUser:
    return make_api_user("alice")


def browser_of(alice: ApiUser) -> Client:
    client = Client(enforce_csrf_checks=True, raise_request_exception=False)
    client.cookies[settings.SESSION_COOKIE_NAME] = make_session(alice.user).session_key
    return client


@pytest.mark.parametrize("attack", ["no token", "a token from another site", "plain text"])
def test_a_form_sent_by_another_site_is_rejected(alice: ApiUser, attack: str) -> None:
    ids = create_resources(alice)
    before = snapshot(alice, ids)
    browser, options = browser_of(alice), {}
    if attack == "a token from another site":
        browser.cookies[settings.CSRF_COOKIE_NAME] = TOKEN
        options = {"headers": {"Origin": ATTACKER, "X-CSRFToken": TOKEN}}
    if attack == "plain text":
        options = {"content_type": "text/plain"}
    accepted = []
    for route in ROUTES:
        if route.startswith(("v1/", "_allauth/")):  # these ignore cookies
            continue
        for method in ("post", "put", "patch", "delete"):
            response = getattr(browser, method)(path_for(route, ids), "name=forged", **{"content_type": "application/x-www-form-urlencoded", **options})  # fmt: skip
            if response.status_code != (404 if route in DISABLED else 403):
                accepted.append((route, method, response.status_code))
    assert not accepted
    assert snapshot(alice, ids) == before


def test_the_api_ignores_session_cookies(alice: ApiUser) -> None:
    ids = create_resources(alice)
    before = snapshot(alice, ids)
    accepted = []
    for route in ROUTES:
        if route.startswith("v1/") and route not in {"v1/", "v1/docs", "v1/openapi.json"}:
            for method in ("get", "post", "delete"):
                response = getattr(browser_of(alice), method)(path_for(route, ids))
                if response.status_code not in {401, 405}:
                    accepted.append((route, method, response.status_code))
    assert not accepted
    assert snapshot(alice, ids) == before


EXTERNAL_URLS = [
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


@pytest.mark.parametrize("page_url", ["/accounts/login/", "/accounts/signup/"])
def test_the_next_parameter_never_redirects_to_another_site(alice: ApiUser, page_url: str) -> None:
    page: Any = browser_of(alice).get(page_url, {"next": "/account/"})
    assert "/account/" in page.get("Location", "") + page.content.decode()
    failures = []
    for target in EXTERNAL_URLS:
        response: Any = browser_of(alice).get(page_url, {"next": target})
        location = response.get("Location", "")
        parsed = urlsplit(location.replace("\\", "/").strip())
        if parsed.scheme or parsed.netloc or location.startswith(("//", "/\\", "/\t", "/\n")):
            failures.append((target, location))
        if f'value="{target}"' in response.content.decode():
            failures.append((target, "kept in the form"))
    assert not failures
